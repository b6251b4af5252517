import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import nmforge as nf
from models import CeiT, create_model
from models.ceit import CONFIGS, resize_positions
from tests.models.small import fisher_prunes, overfit

TINY = {
    "layers": 3, "hidden": 12, "heads": 3, "image": 16, "patch": 2, "channels": 2, "mlp": 2, "stem": 6, "stem_kernel": 3,
    "num_classes": 5,
}  # fmt: skip

# Parameters: coeusguo/ceit README prints 6.4, 24.2 and 94.4 M; the last digits and the MACs were counted on that code
# (convolutions, linear layers, attention's products; batch 1 at 224).
PARAMETERS = {"ceit_tiny": 6_356_904, "ceit_small": 24_204_840, "ceit_base": 94_405_416}
MACS = {"ceit_tiny": 1.395, "ceit_small": 4.760, "ceit_base": 17.749}
WITHOUT_PRODUCTS = {"ceit_tiny": 1.217, "ceit_small": 4.402, "ceit_base": 17.034}  # of attention
NARROW_STEM = {"ceit_tiny": 6_253_832, "ceit_small": 24_003_464, "ceit_base": 94_007_432}


def tiny(**changes):
    """A small CeiT in which every parameter and statistic matters."""
    torch.manual_seed(0)
    model = create_model("ceit_tiny", **(TINY | changes))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "var" in name else value.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    with torch.device("meta"):
        model, x = create_model(name), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            assert model(x).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert round(counter.get_total_flops() / 2e9, 3) == MACS[name]
    operators = counter.get_flop_counts()["Global"]  # convolutions and linear layers alone:
    layers = sum(flops for name, flops in operators.items() if str(name).startswith(("aten.conv", "aten.addmm", "aten.mm")))
    assert layers / 2e9 == pytest.approx(WITHOUT_PRODUCTS[name], abs=1e-3)


@pytest.mark.parametrize("name", NARROW_STEM)
def test_a_stem_of_32_channels_is_not_what_was_published(name):
    with torch.device("meta"):
        size = sum(p.numel() for p in create_model(name, stem=32).parameters())
    assert size == NARROW_STEM[name] and f"{size / 1e6:.1f}" != f"{PARAMETERS[name] / 1e6:.1f}"


def test_names_are_the_authors():
    with torch.device("meta"):
        names = set(create_model("ceit_tiny").state_dict())
    top = {"cls_token", "pos_embed", "pos_layer_embed", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    stem = {"i2t.backbone.conv.weight", *(f"i2t.backbone.bn.{part}" for part in norm), "i2t.proj.weight", "i2t.proj.bias"}
    both = [f"{layer}.{part}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2") for part in ("weight", "bias")]
    leff = [f"leff.conv{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")]
    leff += [f"leff.bn{i}.{part}" for i in (1, 2, 3) for part in norm]
    mlp = [f"feedforward.fc{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
    blocks = {f"blocks.{block}.{name}" for block in range(12) for name in both + leff}
    assert names == top | stem | blocks | {f"lca.{name}" for name in both + mlp}


def attention(module, queries, given, heads):
    """Multi-head attention by its definition, one head after the other."""
    width = given.shape[-1] // heads
    weights, biases = module.qkv.weight.chunk(3), module.qkv.bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((queries, given, given), weights, biases))
    parts = [slice(head * width, (head + 1) * width) for head in range(heads)]
    mixed = [(q[..., s] @ k[..., s].transpose(1, 2) / width**0.5).softmax(-1) @ v[..., s] for s in parts]
    return module.proj(torch.cat(mixed, -1))


def test_against_the_published_formulas():
    model, x = tiny(), torch.randn(3, 2, 16, 16)
    assert isinstance(model, CeiT)
    stem = model.i2t.backbone
    maps = F.max_pool2d(stem.bn(F.conv2d(x, stem.conv.weight, stride=2, padding=1)), 3, 2, 1)  # eq. 1: no activation
    assert maps.shape == (3, 6, 4, 4)
    tokens = F.conv2d(maps, model.i2t.proj.weight, model.i2t.proj.bias, stride=2).flatten(2).transpose(1, 2)
    h = torch.cat([model.cls_token.expand(3, 1, 12), tokens], 1) + model.pos_embed
    classes = []
    for block in model.blocks:
        given = block.norm1(h)
        h = h + attention(block.attn, given, given, 3)
        cls, patches = block.norm2(h).split([1, 4], 1)
        leff = block.leff
        wide = torch.einsum("bnc,dc->bdn", patches, leff.conv1.weight[:, :, 0, 0]) + leff.conv1.bias[:, None]
        wide = F.gelu(leff.bn1(wide.unflatten(2, (2, 2))))
        wide = F.gelu(leff.bn2(F.conv2d(wide, leff.conv2.weight, leff.conv2.bias, padding=1, groups=24)))
        patches = leff.bn3(F.conv2d(wide, leff.conv3.weight, leff.conv3.bias)).flatten(2).transpose(1, 2)
        h = h + torch.cat([cls, patches], 1)  # the normalised class token is added to itself
        classes.append(h[:, 0])
    layers = torch.stack(classes, 1) + model.pos_layer_embed
    given = model.lca.norm1(layers)
    last = layers[:, -1:] + attention(model.lca.attn, given[:, -1:], given, 3)
    last = last + model.lca.feedforward(model.lca.norm2(last))
    with torch.no_grad():
        assert torch.allclose(model(x), model.head(model.norm(last))[:, 0], rtol=1e-4, atol=1e-4)


def test_weights_of_another_resolution_load(tmp_path):
    small = tiny()
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    large = create_model("ceit_tiny", pretrained=tmp_path / "w.safetensors", **(TINY | {"image": 32}))
    grid = small.pos_embed[:, 1:].transpose(1, 2).reshape(1, 12, 2, 2)
    expected = F.interpolate(grid, (4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(large.pos_embed[:, 1:], expected) and torch.equal(large.pos_embed[:, 0], small.pos_embed[:, 0])
    assert torch.equal(large.head.weight, small.head.weight) and large(torch.zeros(1, 2, 32, 32)).shape == (1, 5)
    again = create_model("ceit_tiny", pretrained=tmp_path / "w.safetensors", **TINY)
    assert torch.equal(again.pos_embed, small.pos_embed)
    with pytest.raises(ValueError, match=r"do not fit ceit_tiny: cls_token is \(1, 1, 12\), the model's \(1, 1, 24\)"):
        create_model("ceit_tiny", pretrained=tmp_path / "w.safetensors", **(TINY | {"hidden": 24}))
    with pytest.raises(ValueError, match="positions must be of square grids, not of 5 and 4 patches"):
        resize_positions(torch.zeros(1, 6, 3), 4)


def test_drop_path_grows_with_depth():
    model = create_model("ceit_tiny", **TINY, drop_path=0.2)
    assert [block.drop[1].rate for block in model.blocks] == pytest.approx([0, 0.1, 0.2])


def test_wrong_use():
    model = create_model("ceit_tiny", **TINY)
    for shape in ((2, 2, 18, 18), (2, 3, 16, 16), (2, 16, 16)):
        with pytest.raises(ValueError, match=r"images must be \(B, 2, 16, 16\), not \(2, "):
            model(torch.zeros(shape))
    for change, message in (
        ({"image": 18}, r"image must be a multiple of 4 \* patch, not 18 with patches of 2"),
        ({"kernel": 4}, "kernel and stem_kernel must be odd, not 4 and 3"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), not 1.0"),
        ({"heads": 5}, "hidden must be a multiple of heads"), ({"layers": 0}, "layers must be an integer >= 1"),
        ({"depth": 3}, "ceit_tiny has no option 'depth': it has layers, hidden"),
        ({"pretrained": True}, "no installable package carries weights of ceit_tiny"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            create_model("ceit_tiny", **(TINY | change))


def test_every_size_runs_at_its_resolution():
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            x = torch.empty(2, config.channels, config.image, config.image)
            assert create_model(name, layers=1)(x).shape == (2, config.num_classes)


def test_it_exports():
    model, x = tiny(), torch.randn(2, 2, 16, 16)
    with torch.no_grad():
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_it_learns_a_few_digits_by_heart():
    torch.manual_seed(0)
    assert overfit(create_model("ceit_mnist", layers=2), steps=40) == 1.0


def test_sparse():
    model, x = tiny(hidden=24), torch.randn(3, 2, 16, 16)
    chosen = nf.sparsify(model, "2:4", method="sr-ste")
    assert {"blocks.0.leff.conv1", "lca.attn.qkv", "i2t.proj"} <= set(chosen) and "head" not in chosen
    model.train()(x).sum().backward()
    nf.finalize(model)
    dense = {row.layer for row in nf.sparsity_report(model) if row.pattern is None}
    assert dense == {"head", *(f"blocks.{i}.leff.conv2" for i in range(3))}  # depth-wise: no group of four
    assert not any(row.violations for row in nf.sparsity_report(model))


def test_what_calibrated_methods_cannot_see_is_named():
    images = [torch.randn(2, 2, 16, 16)]
    with pytest.raises(ValueError, match="the calibration data never reach layer 'lca.attn.qkv': leave it out of the pattern"):
        nf.sparsify(tiny(), "2:4", method="wanda", calibration=images)
    chosen = nf.sparsify(tiny(), "2:4", method="wanda", calibration=images, exclude=("head", "lca.attn.qkv"))
    assert "blocks.0.leff.conv3" in chosen


def test_fisher_prunes_the_hidden_channels():
    torch.manual_seed(0)
    model = create_model("ceit_mnist", layers=2, hidden=24)
    graph = nf.channel_groups(model, torch.zeros(2, 1, 28, 28))
    hidden = ["blocks.0.leff.conv1", "blocks.1.leff.conv1", "lca.feedforward.fc1"]
    assert [group.name for group in graph.prunable] == ["i2t.backbone.conv", *hidden]
    kept = {group.name: group.kept for group in graph.groups}
    assert "normalises over them" in kept["i2t.proj"] and "splits them" in kept["blocks.0.attn.qkv"]
    fisher_prunes(model, torch.randn(3, 1, 28, 28), target=0.75)
