"""Groups against the figures of the papers, an independent library and hand-made cases."""

from functools import cache

import pytest
import torch
import torch_pruning
from torch import nn

from algo.channels import channel_groups
from algo.sparsify import sparsify
from models import create_model
from tests.algo.networks import Dense, Gated, Grouped, Halves, Network, Residual, Shared, conv, images

# Groups of convolutions that share their outputs, by stage, and all groups with the classifier's.
SHARING = {"resnet18": ([3, 3, 3, 3], 13), "resnet50": ([4, 5, 7, 4], 38)}


@cache
def traced(name):
    model = create_model(name)
    return model, channel_groups(model, torch.randn(1, 3, 32, 32))



@pytest.mark.parametrize("name", SHARING)
def test_resnets(name):
    _, graph = traced(name)
    sharing = [len(group.producers) for group in graph.groups if len(group.producers) > 1]
    assert (sharing, len(graph.groups)) == SHARING[name]
    assert [group.name for group in graph.groups if group.kept] == ["fc"]
    assert graph.group("fc").kept == "the network's result"


def test_resnext_prunes_whole_groups():
    """Per block: 1x1 and grouped 3x3 in one group of 32 units of 4, 8, 16 or 32 channels; shared outputs as ResNet-50."""
    _, graph = traced("resnext50_32x4d")
    assert len(graph.groups) == 16 + 4 + 1 + 1
    inner = [group for group in graph.prunable if group.units == 32]
    assert [group.outputs[group.name].shape[1] for group in inner] == [4] * 3 + [8] * 4 + [16] * 6 + [32] * 3
    assert all(len(group.producers) == 2 for group in inner)
    assert [len(group.producers) for group in graph.prunable if group.units > 64] == [4, 5, 7, 4]


def test_mobilenet():
    """Per block: expansion and depth-wise; outputs joined by residuals: 1, 2, 3, 4, 3, 3, 1 blocks a stage."""
    _, graph = traced("mobilenet_v2")
    assert len(graph.groups) == 16 + 1 + 7 + 1 + 1
    stages = [group for group in graph.prunable if group.name.endswith(("conv.1", "conv.2"))]
    assert [len(group.producers) for group in stages] == [1, 2, 3, 4, 3, 3, 1]
    stem = graph.group("features.0.0")
    assert stem.producers == ("features.0.0", "features.1.conv.0.0") and stem.units == 32


def test_regnet():
    """Per block: 1x1 and grouped 3x3, units of a group width; one shared output a stage; stem; classifier."""
    _, graph = traced("regnet_x_200mf")
    assert len(graph.groups) == 13 + 4 + 1 + 1
    blocks = [group for group in graph.prunable if group.name.endswith("f.a.0")]
    assert all(group.outputs[group.name].shape[1] == 8 and len(group.producers) == 2 for group in blocks)
    shared = [len(group.producers) for group in graph.prunable if group.name.endswith("proj.0")]
    assert shared == [1 + blocks for blocks in (1, 1, 4, 7)]


def members(graph, group, unit):
    """(layer, side, positions) of one unit, as the library lists them."""
    found = set()
    for (name, dim), positions in group.axes.items():
        if name.endswith(".weight"):
            side = "prune_out_channels" if dim == 0 else "prune_in_channels"
            found.add((name.removesuffix(".weight"), side, tuple(positions[unit].tolist())))
    return found


def library_members(library, names, layer, position, *, prune):
    found = set()
    for dependency, positions in library.get_pruning_group(layer, prune, idxs=[position]):
        if isinstance(dependency.target.module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            where = tuple(sorted(int(index) for index in positions))
            found.add((names[dependency.target.module], dependency.handler.__name__, where))
    return found


def small(blocks, *, flatten):
    model = Network(blocks, stem=6, flatten=flatten).eval()
    return model, channel_groups(model, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "build",
    [
        *(lambda name=name: traced(name) for name in ("resnet18", "resnet50", "mobilenet_v2")),
        lambda: small([Residual(6, 4), Dense(6, 5), Residual(11, 3), Dense(11, 2)], flatten=True),
        lambda: small([Gated(6, 3), Residual(6, 4)], flatten=False),
    ],
    ids=["resnet18", "resnet50", "mobilenet_v2", "dense", "gated"],
)
def test_equals_torch_pruning(build):
    """Every group's first, middle and last unit, where both apply (the library splits grouped convolutions)."""
    model, graph = build()
    names = {part: name for name, part in model.named_modules()}
    library = torch_pruning.DependencyGraph()
    library.build_dependency(model, example_inputs=torch.randn(1, 3, 32, 32), verbose=False)
    assert graph.prunable
    for group in graph.prunable:
        layer = model.get_submodule(group.producers[0])
        prune = torch_pruning.prune_linear_out_channels if isinstance(layer, nn.Linear) else \
            torch_pruning.prune_conv_out_channels
        for unit in {0, group.units // 2, group.units - 1}:
            position = int(group.outputs[group.producers[0]][unit, 0])
            assert members(graph, group, unit) == library_members(library, names, layer, position, prune=prune)


def only(graph, name):
    group = graph.group(name)
    return group.units, group.producers, group.consumers, group.kept


def test_concatenation_and_flatten():
    model = nn.Sequential(Dense(3, 4), Dense(7, 5), nn.Flatten(), nn.Linear(12 * 16, 2))
    graph = channel_groups(model, torch.randn(2, 3, 4, 4))
    assert only(graph, "0.more.0") == (4, ("0.more.0",), ("1.more.0", "3"), None)
    group = graph.group("1.more.0")
    assert group.inputs["3"][1].tolist() == list(range((7 + 1) * 16, (7 + 2) * 16))
    assert [group.name for group in graph.prunable] == ["0.more.0", "1.more.0"]


def test_a_shared_head_is_one_group():
    graph = channel_groups(Network([Shared(4, 6)], stem=4, flatten=False), images())
    units, producers, consumers, kept = only(graph, "blocks.0.head.0")
    assert (units, producers, consumers, kept) == (6, ("blocks.0.head.0",), ("blocks.0.merge",), None)
    assert graph.group("blocks.0.head.0").inputs["blocks.0.merge"].tolist() == [[i, i + 6] for i in range(6)]


def test_grouped_convolution_with_more_outputs():
    graph = channel_groups(Network([Grouped(4, 2, groups=3)], stem=4, flatten=False), images())
    group = graph.group("blocks.0.first.0")
    assert group.units == 3 and group.producers == ("blocks.0.first.0", "blocks.0.grouped.0")
    assert group.outputs["blocks.0.grouped.0"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert group.inputs["blocks.0.grouped.0"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_chunks_stay_equal():
    graph = channel_groups(Network([Halves(4)], stem=4, flatten=False), images())
    assert graph.group("blocks.0.body").outputs["blocks.0.body"].tolist() == [[i, i + 4] for i in range(4)]


def test_transformer():
    encoder = create_model("tinybert_4", layers=1, hidden=24, heads=2, intermediate=40, vocabulary=30, positions=9).encoder
    graph = channel_groups(encoder, torch.randn(2, 5, 24))
    assert [(group.name, group.units) for group in graph.prunable] == [("layers.0.up", 40)]
    assert graph.group("layers.0.attention.query").kept.startswith("view splits them, bert.py:")


def test_transposed_convolution():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 5, 2), nn.Conv2d(5, 2, 1))
    graph = channel_groups(model, torch.randn(2, 3, 8, 8))
    assert [group.name for group in graph.prunable] == ["0", "1"]
    assert graph.group("0").axes.keys() == {("0.weight", 0), ("0.bias", 0), ("1.weight", 0)}
    assert graph.group("1").axes.keys() == {("1.weight", 1), ("1.bias", 0), ("2.weight", 1)}


def test_rows_that_are_no_samples():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(x)[:, 0].sum(0, keepdim=True))

    graph = channel_groups(Merged(), torch.randn(3, 2, 4))
    assert graph.group("a").kept == "b reads 1 rows, no multiple of 3 samples"


def test_errors():
    model = nn.Sequential(conv(3, 4), nn.Conv2d(4, 2, 1))
    sparsify(model, {"1": "2:4"}, method="magnitude")
    with pytest.raises(ValueError, match="layer '1' is 2:4 sparse already.*prune channels first, then sparsify"):
        channel_groups(model, images())
    graph = channel_groups(nn.Sequential(conv(3, 4), nn.Conv2d(4, 2, 1)), images())
    with pytest.raises(ValueError, match="no group is named 'x': there are 0.0, 1"):
        graph.group("x")
    with pytest.raises(TypeError, match="example_inputs must hold at least one tensor with a batch axis"):
        channel_groups(nn.Identity(), torch.tensor(1.0))
