import pytest
import torch
from torch import nn

from models import create_model
from models.detr import DecoderLayer
from models.maskformer import MaskTarget
from models.pft import CONFIGS, PFT, CrossScaleAttention, PFTConfig, PyramidLayer, ScaleLayer, _inside
from tests.models.sparse_checks import check_fisher, check_nm_training

TINY = {"width": 8, "queries": 5, "hidden": 32, "heads": 4, "ffn": 48, "decoder_layers": 2}


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("backbone", [{}, {"backbone": "swin_tiny", "width": 12}])
def test_one_scale_is_maskformer(backbone):
    options = {**TINY, **backbone}
    ours, parent = create_model("pft_small", **options, scales=1), randomise(create_model("maskformer_small", **options))
    shapes = {name.replace(".scales.0", ""): tuple(value.shape) for name, value in ours.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in parent.state_dict().items()}
    ours.load_state_dict({name: parent.state_dict()[name.replace(".scales.0", "")] for name in ours.state_dict()})
    images = torch.randn(2, 3, 64, 70)
    targets = [MaskTarget(torch.tensor(labels), torch.rand(len(labels), 64, 70) < 0.5) for labels in ([0, 2], [1])]
    for a, b in zip(ours(images).layers, parent(images).layers, strict=True):
        assert torch.equal(a.logits, b.logits) and torch.equal(a.masks, b.masks)
    losses, expected = ours.losses(images, targets), parent.losses(images, targets)
    assert losses.keys() == expected.keys() and all(torch.equal(losses[name], expected[name]) for name in losses)


def test_halves_are_the_parents_layer():
    torch.manual_seed(0)
    config = PFTConfig(hidden=32, heads=4, ffn=48)
    layer, parent = ScaleLayer(config).eval(), DecoderLayer(config).eval()
    parent.load_state_dict(layer.state_dict())
    x, query, memory, position = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(2, 9, 32), torch.randn(1, 9, 32)
    assert torch.equal(layer.feed(layer.attend(x, query, memory, position, None)), parent(x, query, memory, position, None))


def across(exchange):
    return randomise(CrossScaleAttention(16, 4, exchange=exchange))


@pytest.mark.parametrize("exchange", ["index", "all"])
def test_cross_scale_attention_is_torchs(exchange):
    op = across(exchange)
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    parts = (op.attention.query, op.attention.key, op.attention.value)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        reference.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        reference.out_proj.load_state_dict(op.attention.output.state_dict())
    x, position = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16)
    expected = torch.empty_like(x)
    for image in range(2):
        for queries in [[q] for q in range(5)] if exchange == "index" else [list(range(5))]:
            own, placed = (value[image][:, queries].reshape(1, -1, 16) for value in (x, x + position))
            expected[image][:, queries] = op.norm(own + reference(placed, placed, own)[0]).view(3, len(queries), 16)
    assert torch.allclose(op(x, position), expected, atol=1e-5)


@pytest.mark.parametrize("exchange", ["index", "all"])
def test_cross_scale_attention_is_permutation_equivariant(exchange):
    op, x, position = across(exchange), torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16)
    expected = op(x, position)
    scales, queries = torch.randperm(3), torch.randperm(5)
    assert torch.allclose(op(x[:, scales], position[:, scales]), expected[:, scales], atol=1e-5)
    assert torch.allclose(op(x[:, :, queries], position[:, :, queries]), expected[:, :, queries], atol=1e-5)


@pytest.mark.parametrize("exchange", ["index", "all"])
def test_who_hears_whom(exchange):
    op, x = across(exchange), torch.randn(1, 3, 5, 16)
    told = x.clone()
    told[0, 1, 2] += 1
    changed = (op(told, 0 * x) - op(x, 0 * x)).abs().amax(-1)[0] > 1e-4
    assert changed[:, 2].all()
    assert changed.any(0).sum() == (1 if exchange == "index" else 5)


@pytest.mark.parametrize("exchange", ["index", "all"])
@pytest.mark.parametrize("masked", [False, True])
def test_predictions_are_means_over_the_scales(exchange, masked):
    model = randomise(create_model("pft_small", **TINY, exchange=exchange, masked=masked))
    output = model(torch.randn(2, 3, 64, 96))
    assert len(output.layers) == 2
    for layer in output.layers:
        assert layer.scales.shape == (2, 3, 5, 16, 24) and torch.equal(layer.masks, layer.scales.mean(1))
        assert layer.logits.shape == (2, 5, 4)
    assert not torch.allclose(output.layers[-1].scales[:, 0], output.layers[-1].scales[:, 2])


def test_queries_are_interchangeable():
    model = randomise(create_model("pft_small", **TINY))
    images, order = torch.randn(1, 3, 64, 64), torch.randperm(5)
    with torch.no_grad():
        before = model(images)
        model.queries.weight.copy_(model.queries.weight[order].clone())
        after = model(images)
    assert torch.allclose(after.logits, before.logits[:, order], atol=1e-4)
    assert torch.allclose(after.masks, before.masks[:, order], atol=1e-4, rtol=1e-4)


def test_masked_attention_stays_inside():
    model = randomise(create_model("pft_small", **TINY, masked=True))
    (prediction,) = model(torch.randn(1, 3, 64, 64)).layers[-1:]
    scales = prediction.scales.clone()
    scales[0, 1, 0], scales[0, 1, 1], scales[0, 1, 1, :4, :8] = -1.0, -1.0, 1.0
    allowed = _inside(prediction._replace(scales=scales), 1, torch.zeros(1, 32, 4, 4))
    assert allowed.shape == (1, 1, 5, 16) and allowed[0, 0, 0].all()  # an empty mask confines nobody
    assert allowed[0, 0, 1].view(4, 4).tolist() == [[True, True, False, False]] + [[False] * 4] * 3
    layer = randomise(PyramidLayer(PFTConfig(hidden=32, heads=4, ffn=48, scales=1)))
    x, query, memory = torch.randn(1, 1, 5, 32), torch.randn(1, 1, 5, 32), torch.randn(1, 16, 32)
    other = memory.clone()
    other[:, ~allowed[0, 0, 1]] += 1  # query 1 may not look there; the others may, after its self-attention
    run = lambda cells: layer(x, query, [(cells, torch.zeros(1, 16, 32))], [allowed])
    changed = (run(other) - run(memory)).abs().amax(-1)[0, 0] > 1e-4
    assert changed[0] and not changed[1]


@pytest.mark.parametrize("options", [{}, {"masked": True, "exchange": "all"}, {"scales": 2}])
def test_trains(options):
    torch.manual_seed(0)
    model = create_model("pft_small", **TINY, **options).train()
    images = torch.randn(2, 3, 64, 64)
    some = MaskTarget(torch.tensor([1]), torch.rand(1, 64, 64) < 0.5)
    targets = [some, MaskTarget(some.labels[:0], some.masks[:0])]
    losses = model.losses(images, targets)
    assert set(losses) == {"class", "focal", "dice", "class_0", "focal_0", "dice_0"}
    sum(losses.values()).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_sizes():
    backbones = {config.backbone for config in CONFIGS.values()}
    assert backbones == {"resnet50", "resnet18", "swin_tiny", "swin_base_384", "swin_large_384"}
    count = lambda **options: sum(parameter.numel() for parameter in create_model("pft_small", **TINY, **options).parameters())
    layer = sum(parameter.numel() for parameter in DecoderLayer(PFTConfig(hidden=32, heads=4, ffn=48)).parameters())
    attention = 4 * (32 * 32 + 32) + 2 * 32
    # per layer another decoder layer a scale and one cross-scale attention; an embedding a scale
    assert count(scales=3) - count(scales=1) == 2 * (2 * layer + attention) + 3 * 32


def test_wrong_use():
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), not \(1, 4, 64, 64\)"):
        create_model("pft_small", **TINY)(torch.zeros(1, 4, 64, 64))
    for change, message in (
        ({"scales": 4}, "scales must be 1 to 3, for strides 32, 16 and 8, not 4"),
        ({"scales": 0}, "scales must be an integer >= 1"),
        ({"exchange": "both"}, "exchange must be one of index, all, not 'both'"),
        ({"levels": 2}, "pft_small has no option 'levels'"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model("pft_small", **change)
    assert isinstance(create_model("pft_small", **TINY), PFT)


def test_sparse():
    torch.manual_seed(0)
    options = {**TINY, "decoder_layers": 1}
    images, targets = torch.randn(2, 3, 64, 64), [MaskTarget(torch.tensor([n]), torch.rand(1, 64, 64) < 0.5) for n in (0, 2)]
    loss = lambda model: sum(model.losses(images, targets).values())
    check_nm_training(create_model("pft_small", **options), loss, minimum=60)
    parts = ("backbone.layer3.0.conv1", "decoder.0.scales.2.mlp.up")
    check_fisher(create_model("pft_small", **options), images, loss, target=0.95, parts=parts)
