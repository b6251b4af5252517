import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from models import AdapterConfig, ClassTokens, Llama, LlamaAdapter, LlamaConfig, create_model, generate
from models.llama import rotate, rotation

SMALL = LlamaConfig(layers=3, hidden=32, heads=4, intermediate=48, vocabulary=61, positions=24)
GROUPED = LlamaConfig(layers=3, hidden=32, heads=4, kv_heads=2, intermediate=48, vocabulary=61, positions=24)
IDS = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(1))


def adapter(sizes=SMALL, *, gate=None, **options) -> LlamaAdapter:
    torch.manual_seed(0)
    base = Llama(sizes)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = LlamaAdapter(base, AdapterConfig(length=5, layers=2, bottleneck=7), **options).eval()
    if gate is not None:
        for parameter in model.gates:
            nn.init.normal_(parameter, std=gate)
    return model


@pytest.mark.parametrize("sizes", [SMALL, GROUPED])
def test_is_the_base_to_the_bit_at_first(sizes):
    model = adapter(sizes)
    assert (model(IDS) - model.base(IDS)).abs().max() == 0.0
    assert generate(model, IDS[:, :4].tolist(), new_tokens=6) == generate(model.base, IDS[:, :4].tolist(), new_tokens=6)


def code_of_the_authors(model: LlamaAdapter, number: int, x: torch.Tensor) -> torch.Tensor:
    """One layer's attention as in alpaca_finetuning_v1: prompt keys in front, two softmaxes side by side."""
    layer, config = model.base.layers[number].attention, model.base.config
    batch, count = x.shape[:2]
    prompt = model.adapter_query.weight.reshape(2, 1, 5, 32)[number - 1].repeat(batch, 1, 1)
    gate = model.gates[number - 1]
    q, k, v = (w(x).view(batch, count, -1, 8).transpose(1, 2) for w in (layer.wq, layer.wk, layer.wv))
    ka, va = (w(prompt).view(batch, 5, -1, 8).transpose(1, 2) for w in (layer.wk, layer.wv))
    turn = rotation(torch.arange(count), config)
    q, k = rotate(q, turn), rotate(k, turn)
    keys, values = (torch.cat(pair, 2).repeat_interleave(config.groups, 1) for pair in ((ka, k), (va, v)))
    mask = F.pad(torch.full((count, count), -torch.inf).triu(1), (5, 0))
    scores = q @ keys.transpose(2, 3) / 8**0.5 + mask
    scores = torch.cat([gate.tanh() * scores[..., :5].softmax(-1), scores[..., 5:].softmax(-1)], -1)
    return layer.wo((scores @ values).transpose(1, 2).reshape(batch, count, 32))


@pytest.mark.parametrize("sizes", [SMALL, GROUPED])
def test_a_layer_is_that_of_the_authors(sizes):
    model, x = adapter(sizes, gate=1.0), torch.randn(3, 9, 32)
    turn = rotation(torch.arange(9), sizes)
    prompts = model.prompts()
    assert prompts[0] is None and len(prompts) == 3
    for number in (1, 2):
        ours = model.base.layers[number].attention(x, turn, None, prompts[number])[0]
        assert torch.allclose(ours, code_of_the_authors(model, number, x), atol=2e-5)


def test_decoding_with_a_cache_is_the_whole_forward():
    model = adapter(gate=1.0)
    cache, parts = model.new_cache(3, 12), []
    for at in range(11):
        logits, cache = model(IDS[:, at : at + 1], torch.tensor([at]), cache)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), model(IDS), atol=1e-4)


def test_gates_see_the_prompt_at_every_position():
    model = adapter(gate=1.0)
    before = model(IDS)
    with torch.no_grad():
        model.adapter_query.weight += 1
    assert (model(IDS) - before).abs().amax((0, 2)).min() > 0  # the first token too: prompt columns are never masked


def test_learned_parameters_of_7b():
    with torch.device("meta"):
        model = create_model("llama_adapter_7b")
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) == 1_229_760  # arXiv 2303.16199: 30 * 10 * 4096 + 30 * 32
    assert {id(p) for p in learned} == {id(p) for p in model.adapter_parameters().values()}
    assert model.adapter_parameters()["layers.2.attention.gate"].shape == (1, 32, 1, 1)  # the lowest two layers have none


def test_tuning_leaves_the_base_alone(tmp_path):
    model = adapter()
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())
    assert model.base.layers[0].attention.wq.weight.grad is None
    model.save_adapter(tmp_path / "adapter.safetensors")
    saved = load_file(tmp_path / "adapter.safetensors")
    assert set(saved) == {"adapter_query.weight", "layers.1.attention.gate", "layers.2.attention.gate"}
    assert sum(value.numel() for value in saved.values()) == 2 * 5 * 32 + 2 * 4
    fresh = adapter()
    fresh.load_adapter(tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(IDS), model(IDS))
    # the authors' file has a gate in every layer, and is pickled
    torch.save(saved | {"layers.0.attention.gate": torch.ones(1, 4, 1, 1)}, tmp_path / "theirs.pth")
    fresh = adapter()
    fresh.load_adapter(tmp_path / "theirs.pth")
    assert torch.equal(fresh(IDS), model(IDS))


def test_gradients_reach_the_gates_first_and_then_the_prompts():
    model = adapter()
    model(IDS).square().mean().backward()
    assert model.gates[0].grad.abs().sum() > 0 and model.adapter_query.weight.grad.abs().sum() == 0
    model = adapter(gate=0.5)
    model(IDS).square().mean().backward()
    assert model.adapter_query.weight.grad.abs().min() > 0


def test_images(tmp_path):
    torch.manual_seed(0)
    vit = create_model("vit_mnist")
    encoder = ClassTokens(vit, depths=(2, 4))
    model = adapter(encoder=encoder, features=encoder.features)
    images = torch.randn(3, 1, 28, 28)
    assert encoder.features == 2 * 96 and encoder(images).shape == (3, 192)
    deepest = encoder(images)[:, 96:]  # what the ViT itself classifies by
    assert torch.allclose(vit.head(deepest), vit(images), atol=1e-5)
    assert torch.equal(model(IDS, images=images), model.base(IDS))  # gates are zero
    for gate in model.gates:
        nn.init.normal_(gate)
    mixed = model(IDS, images=images)
    assert not torch.allclose(mixed, model(IDS), atol=1e-3)
    one = model(IDS[1:2], images=images[1:2])  # each sequence has its own image
    assert torch.allclose(one, mixed[1:2], atol=1e-4)
    prompt = model.prompts(model.image_features(images, 3))[1].tokens
    expected = model.adapter_query.weight[:5] + model.projection(encoder(images))[:, None]
    assert torch.allclose(prompt, expected, atol=1e-6)
    mixed.sum().backward()
    assert model.projection[0].weight.grad is not None and vit.head.weight.grad is None
    assert not model.train().encoder.training and model.base.training
    model.eval().save_adapter(tmp_path / "a.safetensors")
    assert {"projection.0.weight", "projection.2.bias"} <= set(load_file(tmp_path / "a.safetensors"))
    assert len(generate(model, IDS[:, :3].tolist(), new_tokens=4, images=images)) == 3


def test_builder(tmp_path):
    base = create_model("llama_tiny")
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    first = create_model("llama_adapter_tiny", pretrained=tmp_path / "base.safetensors")
    nn.init.ones_(first.gates[0])
    first.save_adapter(tmp_path / "adapter.safetensors")
    options = {"pretrained": tmp_path / "base.safetensors", "adapter": tmp_path / "adapter.safetensors"}
    again = create_model("llama_adapter_tiny", **options)
    assert torch.equal(again(IDS), first(IDS)) and not torch.equal(again(IDS), base(IDS))
    half = create_model("llama_adapter_tiny", dtype=torch.bfloat16, **options)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.isfinite(half(IDS).float()).all()


def test_exports():
    model = adapter(gate=1.0)
    program = torch.export.export(model, (IDS,))
    assert torch.allclose(program.module()(IDS), model(IDS), atol=1e-5)


def test_wrong_use(tmp_path):
    base = Llama(SMALL)
    with pytest.raises(ValueError, match="layers must be at most the 3 layers of the base, not 4"):
        LlamaAdapter(base, AdapterConfig(layers=4))
    with pytest.raises(ValueError, match="length must be an integer >= 1, not 0"):
        AdapterConfig(length=0)
    with pytest.raises(ValueError, match="go together: give both or neither"):
        LlamaAdapter(base, AdapterConfig(layers=1), features=3)
    with pytest.raises(ValueError, match="this adapter takes no images"):
        adapter()(IDS, images=torch.zeros(3, 1, 28, 28))
    vit = create_model("vit_mnist")
    model = adapter(encoder=ClassTokens(vit, (4,)), features=96)
    with pytest.raises(ValueError, match="one image a sequence: 2 images for 3 sequences"):
        model(IDS, images=torch.zeros(2, 1, 28, 28))
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 28, 28\), not \(3, 3, 28, 28\)"):
        model(IDS, images=torch.zeros(3, 3, 28, 28))
    with pytest.raises(ValueError, match=r"depths must be in \[1, 4\], the blocks of the ViT, not \[5\]"):
        ClassTokens(vit, (5,))
    adapter().save_adapter(tmp_path / "a.safetensors")
    other = LlamaAdapter(base, AdapterConfig(length=6, layers=2))
    with pytest.raises(ValueError, match=r"do not fit this adapter: adapter_query.weight is \(10, 32\), the model's \(12, 32\)"):
        other.load_adapter(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        other.load_adapter(tmp_path / "b.safetensors")


def test_an_adapter_alone_learns_answers_by_heart():
    model = adapter()
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    rows = torch.randint(3, 20, (8, 7), generator=torch.Generator().manual_seed(3))  # six tokens that mean nothing, and an answer
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, betas=(0.9, 0.95))
    assert float((model(rows[:, :-1])[:, -1].argmax(-1) == rows[:, -1]).float().mean()) < 0.5
    for _ in range(150):
        loss = F.cross_entropy(model(rows[:, :-1])[:, -1], rows[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model(rows[:, :-1])[:, -1].argmax(-1), rows[:, -1])
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())
