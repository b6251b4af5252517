import json
import re
import subprocess
import sys
import time

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from algo.channels import channel_groups
from algo.count import count
from algo.fisher import FisherPruner
from algo.sparsify import finalize, model_patterns, sparsify
from algo.verify import verify
from models import Llama, LlamaConfig, create_model, generate
from models.llama import CONFIGS, _choose, llama_key, rotate, rotation

SMALL = LlamaConfig(layers=3, hidden=32, heads=4, intermediate=48, vocabulary=61, positions=24)
GROUPED = LlamaConfig(layers=2, hidden=48, heads=6, kv_heads=2, intermediate=40, vocabulary=61, positions=24, norm_eps=1e-5)


def reference(config: LlamaConfig) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=config.feed_forward,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads // config.groups,
            max_position_embeddings=config.positions, rms_norm_eps=config.norm_eps, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2, mean=1.0 if "norm" in name else 0.0)
    return model


def copied(config: LlamaConfig, theirs: nn.Module) -> Llama:
    ours = Llama(config).eval()
    ours.load_state_dict(dict(llama_key(key, value, config.head_dim) for key, value in theirs.state_dict().items()))
    return ours


def tokens(config: LlamaConfig, batch: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(0, config.vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [SMALL, GROUPED])
def test_equals_transformers(config):
    theirs = reference(config)
    ours, ids = copied(config, theirs), tokens(config)
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5
        prompt = ids[:, :5]
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
    assert generate(ours, prompt.tolist(), new_tokens=12) == expected[:, 5:].tolist()


@pytest.mark.parametrize("config", [SMALL, GROUPED])
@pytest.mark.parametrize("steps", [[17], [1] * 17, [5, 1, 7, 4]])
def test_decoding_with_a_cache_is_the_whole_forward(config, steps):
    torch.manual_seed(0)
    model, ids = Llama(config).eval(), tokens(config)
    cache, at, parts = model.new_cache(3, 20), 0, []
    with torch.no_grad():
        for step in steps:
            before = [keys.clone() for keys, _ in cache]
            logits, after = model(ids[:, at : at + step], torch.arange(at, at + step), cache)
            assert all(torch.equal(old, keys) for old, (keys, _) in zip(before, cache, strict=True))  # nothing in place
            cache, at = after, at + step
            parts.append(logits)
        assert (torch.cat(parts, 1) - model(ids)).abs().max() <= 1e-5


def test_tokens_see_only_what_is_before_them():
    torch.manual_seed(0)
    model, ids = Llama(SMALL).eval(), tokens(SMALL)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % SMALL.vocabulary
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax((0, 2))
    assert difference[:9].max() == 0 and difference[9:].min() > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1500), st.integers(0, 400), st.integers(0, 100))
def test_rotated_products_depend_on_the_distance(first, distance, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)
    config = LlamaConfig(layers=1, hidden=8, heads=1)

    def product(at: int, other: int) -> float:
        turned = [rotate(x, rotation(torch.tensor([place]), config)) for x, place in ((query, at), (key, other))]
        return float((turned[0] * turned[1]).sum())

    assert product(first + distance, first) == pytest.approx(product(distance, 0), abs=2e-3)


def test_rotation_is_a_complex_product():
    config = LlamaConfig(layers=1, hidden=16, heads=2)
    x = torch.randn(2, 2, 5, 8)
    frequency = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones(5, 4), torch.arange(5.0)[:, None] * frequency)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * turn).flatten(-2)
    assert torch.allclose(rotate(x, rotation(torch.arange(5), config)), expected, atol=1e-6)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_llama_7b_on_the_meta_device_in_under_a_second():
    with torch.device("meta"):
        count(create_model("llama_tiny"), torch.zeros(1, 8, dtype=torch.int64))  # torch loads what it needs for the meta device
        started = time.process_time()
        model = create_model("llama_7b")
        counted = count(model, torch.zeros(1, 128, dtype=torch.int64))
    assert time.process_time() - started < 1
    assert counted.parameters == 6_738_415_616
    assert counted.macs == 128 * (6_738_415_616 - 32000 * 4096 - 65 * 4096) + 32 * 2 * 128 * 128 * 4096


WIDTHS = {"llama_7b": 11008, "llama_13b": 13824, "llama_30b": 17920, "llama_65b": 22016}


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_feed_forward_widths(name, width):
    """The intermediate_size of each published checkpoint."""
    assert CONFIGS[name].feed_forward == width


def test_counts_equal_transformers():
    for name in ("llama_13b", "llama_tiny_gqa"):
        config = CONFIGS[name]
        with torch.device("meta"):
            theirs = reference(config)
            ours = create_model(name)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


# -- generation -------------------------------------------------------------------------------------------------------


def test_prompts_of_different_lengths_go_on_as_if_alone():
    torch.manual_seed(0)
    model = Llama(SMALL).eval()
    prompts = [[3, 9, 4, 1, 7], [5], [8, 8, 2]]
    together = generate(model, prompts, new_tokens=8)
    assert together == [generate(model, [prompt], new_tokens=8)[0] for prompt in prompts]
    stop = together[0][3]
    assert generate(model, prompts, new_tokens=8, stop=stop)[0] == together[0][: together[0].index(stop)]


def test_drawing_follows_temperature_and_nucleus():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 2.0):
        share = torch.bincount(_choose(logits, temperature, 1.0, generator), minlength=4) / len(logits)
        assert torch.allclose(share, (logits[0] / temperature).softmax(0), atol=0.02)
    assert torch.softmax(logits[0], 0)[:2].sum() == pytest.approx(0.881, abs=1e-3)  # so 0.7 takes two tokens, 0.6 takes one
    assert set(_choose(logits, 1.0, 0.7, generator).tolist()) == {0, 1}
    assert set(_choose(logits, 1.0, 0.6, generator).tolist()) == {0}
    assert set(_choose(logits, 0.0, 0.6, None).tolist()) == {0}


def test_a_seed_repeats():
    torch.manual_seed(0)
    model = Llama(SMALL).eval()
    drawn = [
        generate(model, [[1, 2]], new_tokens=12, temperature=1.0, top_p=0.9, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


# -- weights ----------------------------------------------------------------------------------------------------------


def shards(folder, state, count=3):
    """As Hugging Face writes them."""
    names, weight_map = sorted(state), {}
    for part in range(count):
        file = f"model-{part + 1:05}-of-{count:05}.safetensors"
        save_file({name: state[name].contiguous() for name in names[part::count]}, folder / file)
        weight_map |= dict.fromkeys(names[part::count], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def overrides(config):
    return {field: getattr(config, field) for field in config.__dataclass_fields__}


@pytest.mark.parametrize("config", [SMALL, GROUPED])
def test_checkpoints_of_hugging_face_load(tmp_path, config):
    theirs, ids = reference(config), tokens(config)
    shards(tmp_path, theirs.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    ours = create_model("llama_tiny", pretrained=tmp_path, **overrides(config))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "whole")
    again = create_model("llama_tiny", pretrained=tmp_path / "whole", dtype=torch.bfloat16, **overrides(config))
    assert again.output.weight.dtype == torch.bfloat16
    assert torch.equal(again.layers[1].attention.wq.weight, ours.layers[1].attention.wq.weight.bfloat16())


def test_checkpoints_of_meta_load(tmp_path):
    torch.manual_seed(0)
    model, ids = Llama(SMALL).eval(), tokens(SMALL)
    state = model.state_dict()
    assert {"tok_embeddings.weight", "layers.2.attention.wk.weight", "layers.0.feed_forward.w3.weight"} <= set(state)
    assert "output.weight" in state
    assert {"layers.1.attention_norm.weight", "layers.1.ffn_norm.weight", "norm.weight"} <= set(state)
    torch.save(state | {"rope.freqs": torch.ones(4)}, tmp_path / "consolidated.00.pth")
    save_file(state, tmp_path / "own.safetensors")
    for file in ("consolidated.00.pth", "own.safetensors"):
        again = create_model("llama_tiny", pretrained=tmp_path / file, **overrides(SMALL))
        assert torch.equal(again(ids), model(ids))


def test_weights_of_another_size(tmp_path):
    save_file(Llama(SMALL).state_dict(), tmp_path / "w.safetensors")
    message = r"do not fit llama_tiny: tok_embeddings.weight is \(61, 32\), the model's \(512, 64\) \(\d+ more keys differ\)"
    with pytest.raises(ValueError, match=message):
        create_model("llama_tiny", pretrained=tmp_path / "w.safetensors")
    wider = overrides(SMALL) | {"intermediate": 64}
    message = r"layers.0.feed_forward.w1.weight is \(48, 32\), the model's \(64, 32\)"
    with pytest.raises(ValueError, match=message):
        create_model("llama_tiny", pretrained=tmp_path / "w.safetensors", **wider)
    deeper = overrides(SMALL) | {"layers": 4}
    with pytest.raises(ValueError, match=r"layers.3.attention.wq.weight of shape \(32, 32\) is missing"):
        create_model("llama_tiny", pretrained=tmp_path / "w.safetensors", **deeper)


def slices(folder, state, count):
    """As Meta writes them for ``count`` devices: rows of what spreads channels, columns of what collects them, norms whole."""
    for device in range(count):
        part = {}
        for key, value in state.items():
            by_columns = key.split(".")[-2] in ("wo", "w2", "tok_embeddings")
            whole = value.ndim == 1
            part[key] = value if whole else value.chunk(count, 1 if by_columns else 0)[device].clone()
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{device:02}.pth")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_slices_of_meta_are_joined(tmp_path, count):
    torch.manual_seed(0)
    config = LlamaConfig(layers=2, hidden=32, heads=4, intermediate=48, vocabulary=64, positions=24)
    model, ids = Llama(config).eval(), tokens(config)
    slices(tmp_path, model.state_dict(), count)
    (tmp_path / "params.json").write_text("{}")
    again = create_model("llama_tiny", pretrained=tmp_path, **overrides(config))
    assert torch.equal(again(ids), model(ids))
    half = create_model("llama_tiny", pretrained=tmp_path, dtype=torch.float16, **overrides(config))
    assert torch.equal(half.layers[1].attention.wo.weight, model.layers[1].attention.wo.weight.half())


def test_slices_that_do_not_belong_together(tmp_path):
    config = LlamaConfig(layers=2, hidden=32, heads=4, intermediate=48, vocabulary=64, positions=24)
    slices(tmp_path, Llama(config).state_dict(), 4)
    wide = overrides(config) | {"hidden": 64}
    with pytest.raises(ValueError, match=r"tok_embeddings.weight is \(64, 32\), the model's \(64, 64\)"):
        create_model("llama_tiny", pretrained=tmp_path, **wide)
    last = tmp_path / "consolidated.03.pth"
    state = torch.load(last)
    last.unlink()
    with pytest.raises(ValueError, match=r"tok_embeddings.weight is \(64, 24\), the model's \(64, 32\)"):
        create_model("llama_tiny", pretrained=tmp_path, **overrides(config))
    torch.save({key: value for key, value in state.items() if "layers.1" not in key}, last)
    with pytest.raises(ValueError, match="is only in one of consolidated.00.pth and consolidated.03.pth: they are not slices of"):
        create_model("llama_tiny", pretrained=tmp_path, **overrides(config))
    torch.save(state | {"output.weight": torch.ones(16, 31)}, last)
    with pytest.raises(ValueError, match="the slices of output.weight in .* do not fit each other"):
        create_model("llama_tiny", pretrained=tmp_path, **overrides(config))
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"consolidated.01.pth is missing, though there is consolidated.03.pth"):
        create_model("llama_tiny", pretrained=tmp_path, **overrides(config))


PEAK = """
import resource, sys, torch
from models import create_model
sizes = dict(layers=8, hidden=512, heads=8, intermediate=2048, vocabulary=8000)
with torch.device("meta"):
    create_model("llama_tiny", **sizes)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = create_model("llama_tiny", pretrained=sys.argv[1], **sizes)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert not any(parameter.is_meta for parameter in model.parameters())
print(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20, (after - before) / 2**10)
"""


@pytest.mark.parametrize("write", [shards, slices])
def test_loading_shards_and_slices_does_not_double_memory(tmp_path, write):
    sizes = {"layers": 8, "hidden": 512, "heads": 8, "intermediate": 2048, "vocabulary": 8000}
    write(tmp_path, create_model("llama_tiny", **sizes).state_dict(), count=2)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    model, grown = map(float, done.stdout.split())
    assert model > 150 and grown < 1.2 * model, f"a model of {model:.0f} MiB took {grown:.0f} MiB"


# -- other tools, wrong use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, GROUPED])
def test_exports_with_and_without_a_cache(config):
    torch.manual_seed(0)
    model, ids = Llama(config).eval(), tokens(config, 2, 6)
    program = torch.export.export(model, (ids,))
    assert torch.allclose(program.module()(ids), model(ids), atol=1e-6)
    step = (ids[:, :1], torch.tensor([3]), model.new_cache(2, 8))
    program = torch.export.export(model, step)
    other = (ids[:, 1:2], torch.tensor([5]), tuple((k + 0.1, v - 0.1) for k, v in step[2]))
    logits, cache = program.module()(*other)
    expected, kept = model(*other)
    assert torch.allclose(logits, expected, atol=1e-6) and torch.allclose(cache[1][0], kept[1][0], atol=1e-6)


def test_wrong_use():
    for change, message in (
        ({"heads": 5}, "hidden must be a multiple of heads, not 64 with heads = 5"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, not 4 with kv_heads = 3"),
        ({"layers": 0}, "layers must be an integer >= 1, not 0"), ({"heads": 64}, "hidden / heads must be even"),
        ({"depth": 3}, "llama_tiny has no option 'depth': it has dtype, layers, hidden"),
        ({"pretrained": True}, "no installable package carries weights of llama_tiny"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            create_model("llama_tiny", **change)
    with pytest.raises(ValueError, match=re.escape("unknown model 'llama_8b': did you mean llama_")):
        create_model("llama_8b")
    model = create_model("llama_tiny")
    with pytest.raises(ValueError, match="129 tokens, but the model has 128 positions"):
        model(torch.zeros(1, 129, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token numbers must be \(B, S\), at least one of a sequence, not \(4,\)"):
        model(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token numbers must be in 0 to 511, not 512 \(place 1 of sequence 0\)"):
        model(torch.tensor([[511, 512]]))
    with pytest.raises(ValueError, match="token numbers must be in 0 to 511, not 600"):
        generate(model, [[600]], new_tokens=1)
    with pytest.raises(ValueError, match=r"places must be in \[1, 128\], the positions of the model, not 130"):
        generate(model, [[1, 2]], new_tokens=128)
    for options, message in (
        ({"prompts": [[]], "new_tokens": 1}, "at least one token in each"),
        ({"prompts": [], "new_tokens": 1}, "at least one prompt"),
        ({"prompts": [[1]], "new_tokens": 1, "temperature": -1.0}, "temperature must be >= 0"),
        ({"prompts": [[1]], "new_tokens": 1, "top_p": 0.0}, r"top_p in \(0, 1\], not 0.0 and 0.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            generate(model, **options)


def test_wrong_places():
    model, tokens, places = create_model("llama_tiny"), torch.zeros(2, 3, dtype=torch.int64), torch.arange(3)
    cache = model.new_cache(2, 8)
    for arguments, message in (
        ((tokens, places[:2]), r"positions must be integers \(3,\), one a token, not torch.int64 \(2,\)"),
        ((tokens, places.float()), r"positions must be integers \(3,\), one a token, not torch.float32 \(3,\)"),
        ((tokens[:1], places, cache), "the cache must have 4 layers and 1 sequences, not 4 and 2: new_cache gives one"),
        ((tokens, places, cache[:1]), "the cache must have 4 layers and 2 sequences, not 1 and 2"),
        ((tokens, places, ()), "the cache must have 4 layers and 2 sequences, not 0 and 0"),
        ((tokens, places + 6, cache), r"positions in this cache must be in 0 to 7, not 8 \(place 2 of sequence 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)


# -- sparse and pruned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tiny", "llama_tiny_gqa", "llama_adapter_tiny"])
def test_made_sparse(name):
    torch.manual_seed(0)
    model, ids = create_model(name), tokens(CONFIGS["llama_tiny"])
    sparsify(model, "2:4", method="magnitude")
    finalize(model)
    verify(model, model_patterns(model))
    patterns = {layer: str(nm) for layer, nm in model_patterns(model).items()}
    prefix = "base." if "adapter" in name else ""
    assert patterns[f"{prefix}layers.3.attention.wk"] == "2:4" and f"{prefix}output" not in patterns and len(patterns) == 4 * 7
    weight = model.get_submodule(f"{prefix}layers.0.feed_forward.w2").weight
    assert (weight.unflatten(1, (-1, 4)) != 0).sum(-1).max() == 2
    assert torch.isfinite(model(ids)).all()


@pytest.mark.parametrize("name", ["llama_tiny", "llama_tiny_gqa"])
def test_fisher_pruning_takes_channels_of_the_feed_forward_layers_only(name):
    torch.manual_seed(0)
    model, ids = create_model(name, layers=2).train(), tokens(CONFIGS[name])
    graph = channel_groups(model, ids)
    assert [sorted(group.inputs) for group in graph.prunable] == [[f"layers.{n}.feed_forward.w2"] for n in range(2)]
    kept = " ".join(str(group.kept) for group in graph.groups if group.kept)
    assert "norm" in kept and "view" in kept or "unflatten" in kept  # the residual stream and the heads, each with its reason
    pruner = FisherPruner(model, ids, target=0.95, interval=1)
    while not pruner.done:
        model.zero_grad()
        model(ids).logsumexp(-1).mean().backward()
        pruner.step()
    with torch.no_grad():
        gated = model(ids)
    pruner.finish()
    widths = [layer.feed_forward.w1.out_features for layer in model.layers]
    assert sum(widths) < 320 and [layer.feed_forward.w2.in_features for layer in model.layers] == widths
    assert torch.allclose(model(ids), gated, atol=1e-5)
