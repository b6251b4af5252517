import copy
import random

import pytest
import torch
from torch import nn

from algo.capture import UntraceableError
from algo.channel_gates import ChannelGates
from algo.channels import channel_groups
from algo.checkpoint import save_model
from algo.surgery import check_surgery, load_pruned, prune_channels, resize
from models import create_model
from tests.algo.networks import NARROW, Gated, Network, Residual, Shared, conv, images, random_network, settle


def random_removal(graph, seed):
    choose = random.Random(seed)
    return {
        group.name: choose.sample(range(group.units), choose.randint(0, group.units - 1)) for group in graph.prunable
    }  # fmt: skip


@torch.no_grad()
def gated_outputs(model, graph, removed, x):
    gates = ChannelGates(model, graph)
    for name, units in removed.items():
        gates.alive[name][units] = False
    gates.update()
    result = model(x)
    gates.remove()
    return result


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_gated_network(seed):
    """Random networks, random channels; then it trains and exports."""
    model, x = random_network(seed), images()
    graph = channel_groups(model, x)
    removed = random_removal(graph, seed)
    expected = gated_outputs(model, graph, removed, x)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert prune_channels(model, graph, removed) is model
    assert torch.allclose(model(x), expected, atol=1e-5 * float(expected.abs().max()))
    assert sum(parameter.numel() for parameter in model.parameters()) < size
    model.train()(x).square().mean().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@pytest.mark.parametrize("name", NARROW)
def test_named_networks(name):
    torch.manual_seed(0)
    model = settle(create_model(name, num_classes=5, **NARROW[name]))
    x = torch.randn(2, 3, 32, 32)
    graph = channel_groups(model, x)
    removed = random_removal(graph, 1)
    expected = gated_outputs(model, graph, removed, x)
    prune_channels(model, graph, removed)
    assert torch.allclose(model(x), expected, atol=1e-4 * float(expected.abs().max()))


def test_the_smaller_network_exports_and_says_its_shapes():
    model, x = Network([Residual(6, 4), Gated(6, 3)], stem=6, flatten=True).eval(), images()
    graph = channel_groups(model, x)
    prune_channels(model, graph, {"stem.0": [0, 5], "blocks.0.first.0": [1]})
    assert model.stem[0].out_channels == model.stem[1].num_features == 4
    assert model.blocks[0].second[0].in_channels == 3 and model.blocks[1].body[0].in_channels == 4
    prune_channels(model, channel_groups(model, x), {"blocks.1.body.0": [2]})
    assert model.blocks[1].scale.shape == (5, 1, 1) and model.blocks[1].squeeze.in_features == 5
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-6)
    again = channel_groups(model, x)  # and can be pruned again
    prune_channels(model, again, {"stem.0": [0]})
    assert model.stem[0].out_channels == 3


def test_tied_and_shared_layers_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 2)
            self.c.weight = self.b.weight

        def forward(self, x):
            x = self.a(x)
            return self.d(self.b(x) + self.c(x.relu()))

    model, x = Tied(), torch.randn(2, 3)
    graph = channel_groups(model, x)
    removed = {"a": [1, 4], "b": [0]}
    expected = gated_outputs(model, graph, removed, x)
    prune_channels(model, graph, removed)
    assert model.c.weight is model.b.weight and model.b.weight.shape == (3, 4)
    assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimizer_goes_on(kind):
    torch.manual_seed(0)
    model, x = Network([Residual(6, 4)], stem=6, flatten=False), images()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **options)
    graph = channel_groups(model, x)
    loss = model(x).square().mean()  # still alive while the shapes change
    loss.backward()
    optimizer.step()
    key = "momentum_buffer" if options else "exp_avg"
    before = optimizer.state[model.stem[0].weight][key].clone()
    prune_channels(model, graph, {"stem.0": [0, 2]}, optimizer=optimizer)
    assert torch.equal(optimizer.state[model.stem[0].weight][key], before[[1, 3, 4, 5]])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    model(x).square().mean().backward()
    optimizer.step()


def test_a_checkpoint_loads_into_a_fresh_network(tmp_path):
    model, x = random_network(5), images()
    fresh = copy.deepcopy(model)
    graph = channel_groups(model, x)
    prune_channels(model, graph, random_removal(graph, 5))
    save_model(model, tmp_path, {"epochs": 3})
    assert load_pruned(fresh, tmp_path) == {"epochs": 3}
    assert torch.equal(fresh(x), model(x))
    assert str(fresh) == str(model)  # channel numbers and groups too
    with pytest.raises(ValueError, match="not a pruned form of this network: "):
        load_pruned(Network([Shared(4, 2)], stem=4, flatten=True), tmp_path)


def test_resize_errors():
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="only one of them has 'bias'"):
        resize(layer, {"weight": (3, 4)})
    with pytest.raises(ValueError, match=r"weight is \(3, 4\) here, \(5, 4\) there"):
        resize(layer, {"weight": (5, 4), "bias": (3,)})
    resize(layer, {"weight": (2, 3), "bias": (2,)})
    assert (layer.out_features, layer.in_features) == (2, 3)


def test_prune_errors():
    model = nn.Sequential(conv(3, 4), nn.Conv2d(4, 2, 1))
    graph = channel_groups(model, images())
    with pytest.raises(ValueError, match="group '1' must stay: the network's result"):
        prune_channels(model, graph, {"1": [0]})
    with pytest.raises(ValueError, match=r"group '0.0' has units 0 to 3, not \[4\]"):
        prune_channels(model, graph, {"0.0": [4]})
    with pytest.raises(ValueError, match="group '0.0' must keep at least one of its 4 units"):
        prune_channels(model, graph, {"0.0": range(4)})
    prune_channels(model, graph, {"0.0": [3]})
    with pytest.raises(ValueError, match=r"0.0.weight was \(4, 3, 3, 3\) when .* is now \(3, 3, 3, 3\): trace it again"):
        prune_channels(model, graph, {"0.0": [0]})
    with pytest.raises(ValueError, match=r"is now missing: trace it again"):
        prune_channels(nn.Sequential(), graph, {"0.0": [0]})


class Sized(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(3, 8), nn.Linear(8, 2), middle

    def forward(self, x):
        return self.b(self.middle(self.a(x)))


def test_trial_finds_what_a_graph_does_not_show():
    x = torch.randn(4, 3)
    fixed = Sized(lambda x: x.reshape(-1, 8))
    message = r'Sized fixes a size and cannot run with fewer channels at .*test_surgery.py:\d+, "fixed = .*'
    with pytest.raises(UntraceableError, match=message):
        check_surgery(fixed, channel_groups(fixed, x), x)
    scaled = Sized(lambda x: x / x.shape[1])
    with pytest.raises(UntraceableError, match="Sized does not compute the same with fewer channels"):
        check_surgery(scaled, channel_groups(scaled, x), x)
    fine = Sized(torch.relu)
    before = copy.deepcopy(fine.state_dict())
    check_surgery(fine, channel_groups(fine, x), x)
    assert all(torch.equal(value, before[name]) for name, value in fine.state_dict().items())
