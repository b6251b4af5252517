import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nmforge as nf
from models import RouterConfig, create_model, dynamic_graph
from models.dgnet import (
    NETWORKS,
    DynamicSequence,
    FixedRouter,
    Router,
    chain,
    edge_density,
    graphs,
    needed_nodes,
    skip_edges,
    threshold_edges,
)
from tests.models.small import fisher_prunes, overfit

SMALL = {
    "dgnet_resnet18": ("resnet18", {"width": 8, "blocks": (4, 2)}),
    "dgnet_resnet50": ("resnet50", {"width": 4, "blocks": (3, 1)}),
    "dgnet_resnext50": ("resnext50_32x4d", {"width": 32, "blocks": (2, 3)}),
    "dgnet_regnetx_400mf": ("regnet_x_400mf", {"depth": 8}),
    "dgnet_mobilenetv2": ("mobilenet_v2", {
        "width": 0.25, "stages": ((1, 16, 1, 1), (6, 24, 3, 2), (6, 32, 2, 2)), "head": 64, "dropout": 0.0,
    }),
}  # fmt: skip
"""Options that make the named networks small, and the network that each extends."""


def sequences(model):
    return [part for part in model.modules() if isinstance(part, DynamicSequence)]


def fix(model, adjacency):
    """Give every stage the graph of a function of its number of nodes."""
    for part in sequences(model):
        for name, names in part.stages.items():
            part.routers[name] = FixedRouter(adjacency(len(names)))


def lively(name, **changes):
    """A small network whose statistics and routers differ from layer to layer and sample to sample; eval mode."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **(SMALL[name][1] | changes))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value, low in ((part.weight, 0.5), (part.bias, -0.1), (part.running_mean, -0.5), (part.running_var, 0.5)):
                nn.init.uniform_(value, low, low + 1)
        if isinstance(part, Router):
            for layer in part.fc:
                nn.init.normal_(layer.weight, std=2 / layer.in_features**0.5)
                nn.init.normal_(layer.bias, -1.5)
                nn.init.constant_(layer.bias[-1:], 1.0)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_and_key_names(name):
    """Everything of the base under its name, and for node i a linear layer from C channels to i edges."""
    base_name = SMALL[name][0]
    with torch.device("meta"):
        base, model = create_model(base_name), create_model(name)
    own, known = model.state_dict(), base.state_dict()
    assert {key: value.shape for key, value in own.items() if ".routers." not in key} == {k: v.shape for k, v in known.items()}
    extra = 0
    for part in sequences(model):
        for first, names in part.stages.items():
            norms = [m for m in part.get_submodule(first).modules() if isinstance(m, nn.BatchNorm2d)]
            channels, nodes = norms[-1].num_features, len(names)
            extra += sum(channels * degree + degree for degree in range(1, nodes))
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters()) == extra > 0


def test_which_blocks_are_nodes():
    with torch.device("meta"):
        mobile, regnet = create_model("dgnet_mobilenetv2"), create_model("dgnet_regnetx_400mf")
    stages = {first: len(names) for first, names in mobile.features.stages.items()}
    assert stages == {"2": 2, "4": 3, "7": 4, "11": 3, "14": 3}  # table 2 of MobileNetV2; stages of one block have no edge
    assert [len(names) for part in sequences(regnet) for names in part.stages.values()] == [2, 7, 12]


@pytest.mark.parametrize("name", SMALL)
def test_the_chain_is_the_static_network(name):
    base_name, options = SMALL[name]
    model = lively(name)
    base = create_model(base_name, num_classes=5, **options)
    base.load_state_dict({key: value for key, value in model.state_dict().items() if ".routers." not in key})
    fix(model, chain)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
        skip_edges(model)
        assert torch.equal(model(x), base(x))
    assert torch.equal(model.train()(x), base.train()(x))


@pytest.mark.parametrize("name", SMALL)
def test_skipping_equals_the_dense_computation(name):
    """Each of six samples with random graphs of its own, a third of the edges missing."""
    model, x = lively(name).double(), torch.randn(6, 3, 32, 32, dtype=torch.float64)
    fix(model, lambda nodes: (torch.rand(6, nodes, nodes) * (torch.rand(6, nodes, nodes) > 0.35)).double().tril(-1))
    rows = edge_density(graphs(model, x))
    assert all(row.edges == row.nodes * (row.nodes - 1) // 2 for row in rows)
    assert any(0 < row.density < 1 and row.needed < 1 for row in rows)
    with torch.no_grad():
        dense = model(x)
        skip_edges(model)
        assert torch.allclose(model(x), dense, rtol=1e-12, atol=1e-14)


def test_routers_choose_for_each_sample():
    torch.manual_seed(0)
    router = Router(8, 5, RouterConfig(threshold=0.3))
    for layer in router.fc:
        nn.init.normal_(layer.weight, std=2)
    with torch.no_grad():
        adjacency = router(torch.randn(4, 8, 1, 1).expand(-1, -1, 6, 6))
    assert adjacency.shape == (4, 5, 5) and not adjacency.triu().any()
    assert bool(((adjacency == 0) | (adjacency > 0.3)).all()) and len((adjacency != 0).flatten(1).unique(dim=0)) == 4


def test_nodes_that_nothing_reads_are_not_computed():
    model = lively("dgnet_resnet18")
    direct = torch.zeros(4, 4)
    direct[3, 0] = direct[2, 1] = 0.5  # node 2 reads node 1, but nobody reads node 2
    model.layer1.routers["0"] = FixedRouter(direct)
    ran = []
    for number in range(4):
        model.layer1.get_submodule(str(number)).register_forward_hook(lambda *_, number=number: ran.append(number))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = model(x)
        skip_edges(model)
        assert torch.equal(model(x), dense)
    assert ran == [0, 1, 2, 3, 0, 3]
    assert needed_nodes(direct[None]).tolist() == [[True, False, False, True]]
    model.train()(x)
    assert ran[6:] == [0, 1, 2, 3]  # in training all nodes run


class Node(nn.Module):
    """A block of one weight, so that everything can be written down."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.conv(x).tanh()


def sequence(nodes, channels=3, **options):
    names = [str(node) for node in range(nodes)]
    return DynamicSequence([(name, Node(channels)) for name in names], [names], RouterConfig(**options)).double().eval()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**16), st.floats(0, 0.9))
def test_a_batch_of_graphs_is_a_loop_over_samples(nodes, batch, seed, zeros):
    torch.manual_seed(seed)
    part = sequence(nodes)
    adjacency = (torch.randn(batch, nodes, nodes, dtype=torch.float64) * (torch.rand(batch, nodes, nodes) > zeros)).tril(-1)
    part.routers["0"] = FixedRouter(adjacency)
    x = torch.randn(batch, 3, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = []
        for sample in range(batch):
            states = [part.get_submodule("0")(x[sample : sample + 1])]
            for node in range(1, nodes):
                total = torch.zeros_like(states[0])
                for source in range(node):
                    total = total + float(adjacency[sample, node, source]) * states[source]
                states.append(part.get_submodule(str(node))(total))
            expected.append(states[-1])
        assert torch.allclose(part(x), torch.cat(expected), rtol=1e-12, atol=1e-14)
        part.skip = True
        assert torch.allclose(part(x), torch.cat(expected), rtol=1e-12, atol=1e-14)


def test_gradients_through_the_router():
    torch.manual_seed(0)
    part = sequence(4, threshold=0.4)
    for layer in part.routers["0"].fc:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias, std=0.5)
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    weights = [layer.weight for layer in part.routers["0"].fc]
    kept = part.routers["0"](x)[:, 1:]
    assert 0 < int((kept != 0).sum()) < 12  # of 2 x 6 edges some are dropped
    # away from the threshold, where r jumps, r is smooth: its derivative is 1 above and 0 below
    assert torch.autograd.gradcheck(lambda x, *_: part(x), (x, *weights))
    values = torch.tensor([0.05, 0.3, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    for through, slope in ((False, [0, 1, 0, 1]), (True, [1, 1, 1, 1])):
        result = threshold_edges(values, 0.1, straight_through=through)
        assert torch.allclose(result, torch.tensor([0, 0.3, 0, 0.9], dtype=torch.float64))
        assert torch.autograd.grad(result.sum(), values)[0].tolist() == slope


def test_routers_start_with_the_chain_in_front():
    torch.manual_seed(0)
    model = create_model("dgnet_resnet18", blocks=(5,), width=8)
    (adjacency,) = graphs(model, torch.randn(3, 3, 32, 32)).values()
    expected = torch.full((5, 5), 0.15).tril(-2) + 0.9 * chain(5)
    assert adjacency.shape == (3, 5, 5) and torch.allclose(adjacency, expected.expand(3, 5, 5), atol=0.03)


def test_a_trained_network_becomes_dynamic():
    base = create_model("resnet18", width=8, blocks=(2, 2))
    weight = base.layer2[1].conv1.weight
    model = dynamic_graph(base, RouterConfig(threshold=0.3, straight_through=True))
    assert model is base and model.layer2.get_submodule("1").conv1.weight is weight
    assert model.layer1.routers["0"].config.threshold == 0.3
    assert create_model("dgnet_resnet18", width=8, blocks=(2,), threshold=0.3).layer1.routers["0"].config.threshold == 0.3
    assert set(graphs(model, torch.randn(1, 3, 32, 32))) == {"layer1.0", "layer2.0"}


def test_the_dense_computation_exports():
    model, x = lively("dgnet_resnet18"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_it_learns_a_few_digits_by_heart():
    torch.manual_seed(0)
    model = create_model("dgnet_resnet18", width=8, blocks=(3, 2), channels=1, small_stem=True, num_classes=10)
    assert overfit(model, count=16, steps=30, lr=1e-2) == 1.0


def test_sparse():
    model = lively("dgnet_resnet18", width=16)
    chosen = nf.sparsify(model, {"layer*.conv?": "2:4"}, method="sr-ste")
    assert len(chosen) == 12
    before = {name: value.clone() for name, value in graphs(model, torch.ones(1, 3, 32, 32)).items()}
    model.train()(torch.randn(3, 3, 32, 32)).sum().backward()
    nf.finalize(model)
    assert not any(row.violations for row in nf.sparsity_report(model))
    assert before.keys() == graphs(model, torch.ones(2, 3, 32, 32)).keys()


@pytest.mark.parametrize("name", ["dgnet_resnet18", "dgnet_mobilenetv2"])
def test_fisher_prunes_blocks_and_routers_inputs(name):
    model, x = lively(name), torch.randn(3, 3, 32, 32)
    graph = nf.channel_groups(model, x)
    kept = {group.name: group.kept for group in graph.groups if group.kept}
    assert all("routers" in layer or layer in ("fc", "classifier.1") for layer in kept)
    router = "layer1.routers.0.fc.0" if "resnet" in name else "features.routers.2.fc.0"
    assert any(router in group.consumers for group in graph.prunable) and "pads them" in kept[router]
    fisher_prunes(model, x)


def test_fisher_refuses_what_skips():
    model = lively("dgnet_resnet18")
    skip_edges(model)
    with pytest.raises(nf.UntraceableError, match="DynamicSequence 'layer1' cannot be traced .* depends on values"):
        nf.channel_groups(model, torch.randn(2, 3, 32, 32))


def test_wrong_use():
    with pytest.raises(TypeError, match="dynamic graphs are for ResNet, .* of this package, not Linear"):
        dynamic_graph(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="this ResNet has dynamic graphs already"):
        dynamic_graph(create_model("dgnet_resnet18", width=8, blocks=(2,)))
    with pytest.raises(ValueError, match="this ResNet has no stage of two blocks or more"):
        create_model("dgnet_resnet18", width=8, blocks=(1, 1))
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\), not 1"):
        RouterConfig(threshold=1)
    with pytest.raises(ValueError, match="skip_edge must be above 0 and below 1, not 0"):
        RouterConfig(skip_edge=0)
    with pytest.raises(ValueError, match=r"an adjacency matrix must be \(n, n\) or \(B, n, n\), not \(2, 3\)"):
        FixedRouter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="strictly lower triangular: edges come from earlier nodes"):
        FixedRouter(torch.eye(3))
    model = create_model("dgnet_resnet18", width=8, blocks=(2,))
    model.layer1.routers["0"] = FixedRouter(chain(3))
    with pytest.raises(ValueError, match=r"4 samples and 2 nodes need as many graphs, not \(4, 3, 3\)"):
        model(torch.zeros(4, 3, 32, 32))
    with pytest.raises(ValueError, match="dgnet_resnet18 has no option 'tau': it has threshold, straight_through"):
        create_model("dgnet_resnet18", tau=0.1)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), not \(2, 1, 32, 32\)"):
        create_model("dgnet_mobilenetv2")(torch.zeros(2, 1, 32, 32))
