"""Scores against autograd of an explicit mask; pruning inside a training loop."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nmforge as nf
from algo.channels import channel_groups
from algo.count import count
from algo.fisher import FisherPruner
from models import create_model
from tests.algo.networks import NARROW, Network, Residual, conv, images, random_network, settle

LABELS = torch.tensor([0, 3, 1])


def explicit_scores(model, graph, x, loss):
    """Autograd by a mask parameter (samples, units) that multiplies what every layer of a group reads."""
    masks = {group.name: torch.ones(len(x), group.units, dtype=x.dtype, requires_grad=True) for group in graph.prunable}

    def hook(name):
        def multiply(module, args):
            (given,) = args
            columns = [torch.ones(len(x), dtype=x.dtype)] * graph.layers[name].inputs
            for group in graph.prunable:
                for unit, positions in enumerate(group.inputs.get(name, torch.empty(0, 0)).tolist()):
                    for position in positions:
                        columns[position] = masks[group.name][:, unit]
            mask = torch.stack(columns, 1)
            shape = (len(x), *[1] * (given.ndim - 2), -1) if isinstance(module, nn.Linear) else (*mask.shape, 1, 1)
            return (given * mask.view(shape),)

        return model.get_submodule(name).register_forward_pre_hook(multiply)

    handles = [hook(name) for name in graph.layers]
    gradients = torch.autograd.grad(loss(model), list(masks.values()))
    for handle in handles:
        handle.remove()
    return {name: gradient.square().sum(0) for name, gradient in zip(masks, gradients, strict=True)}


def compare(model, x, loss):
    graph = channel_groups(model, x)
    expected = explicit_scores(model, graph, x, loss)
    pruner = FisherPruner(model, x, target=0.9, check=False)
    loss(model).backward()
    scores = pruner.importance()
    pruner.close()
    assert scores.keys() == expected.keys()
    largest = max(float(value.max()) for value in expected.values())
    for name in scores:
        assert (scores[name] - expected[name]).abs().max() <= 1e-6 * largest, name
    return torch.cat(list(scores.values()))


@pytest.mark.parametrize("seed", range(10))
def test_scores_equal_autograd_of_an_explicit_mask(seed):
    """Residual, concatenated, grouped, depth-wise, gated and shared layers; float64, absolute 1e-6 too."""
    model, x = random_network(seed).double(), images().double()
    model.train(seed % 2 == 0)
    scores = compare(model, x, lambda model: F.cross_entropy(model(x), LABELS))
    assert (scores > 0).double().mean() > 0.8  # not a comparison of zeros


@pytest.mark.parametrize("name", NARROW)
def test_scores_of_named_networks(name):
    torch.manual_seed(0)
    model = settle(create_model(name, num_classes=5, **NARROW[name])).double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    compare(model, x, lambda model: F.cross_entropy(model(x), LABELS))


DYNAMIC = {
    "odconv_resnet18_4x": {"width": 8, "blocks": (1, 1)},
    "odconv_mobilenetv2_1x": {"width": 0.25, "stages": ((1, 16, 1, 1), (6, 24, 2, 2)), "head": 64, "dropout": 0.0},
    "dgnet_resnet18": {"width": 8, "blocks": (3, 2)},
    "ceit_mnist": {"layers": 1, "hidden": 12, "stem": 8, "image": 32, "channels": 3},
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_scores_where_weights_or_graphs_depend_on_the_data(name):
    torch.manual_seed(0)
    model = settle(create_model(name, **({"num_classes": 5} | DYNAMIC[name]))).double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    compare(model, x, lambda model: F.cross_entropy(model(x), LABELS))


def test_scores_of_a_transformer():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True).double()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    graph = channel_groups(model, x)
    pruner = FisherPruner(model, x, target=0.9, check=False)
    model(x).square().sum().backward()
    scores = pruner.importance()["linear1"]
    pruner.close()
    mask = torch.ones(3, 1, 20, dtype=torch.float64, requires_grad=True)
    handle = model.linear2.register_forward_pre_hook(lambda _, args: (args[0] * mask,))
    (gradient,) = torch.autograd.grad(model(x).square().sum(), mask)
    handle.remove()
    assert [group.name for group in graph.prunable] == ["linear1"]
    assert torch.allclose(scores, gradient[:, 0].square().sum(0), rtol=1e-9)


def test_frozen_layers_do_not_seem_unimportant():
    model, x = random_network(4).double(), images().double()
    scores = []
    for frozen in (False, True):
        model.stem.requires_grad_(not frozen)
        pruner = FisherPruner(model, x, target=0.9, check=False)
        model(x).square().sum().backward()
        scores.append(pruner.importance()["stem.0"])
        pruner.close()
    assert scores[0].all() and torch.allclose(scores[0], scores[1], rtol=1e-9)


def test_mixed_precision_counts_in_float32():
    model, x = random_network(4), images()
    pruner = FisherPruner(model, x, target=0.9, check=False)
    model(x).square().sum().backward()
    exact = torch.cat(list(pruner.importance().values()))
    pruner._fisher.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    rough = torch.cat(list(pruner.importance().values()))
    pruner.close()
    assert rough.dtype == torch.float32 and float((rough - exact).norm() / exact.norm()) < 0.1


def test_passes_add_up_and_samples_are_squared_apart():
    """Accumulated micro-batches of one sample give what one batch gives, batch norm being fixed."""
    model, x = random_network(4).double(), images().double()
    scores = []
    for parts in (x[None], x[:, None]):
        pruner = FisherPruner(model, x, target=0.9, check=False)
        for part in parts:
            model(part).square().sum().backward()
        scores.append(torch.cat(list(pruner.importance().values())))
        pruner.close()
    assert torch.allclose(scores[0], scores[1], rtol=1e-9)


def train(model, pruner, *, steps, seed=0, optimizer=None):
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 3, 32, 32, generator=generator)
        loss = F.cross_entropy(model(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        pruner.step()
        if pruner.done:
            break
    return losses, optimizer


def test_resnet_to_half_its_macs_then_2_to_4():
    torch.manual_seed(0)
    model = create_model("resnet18", width=16, num_classes=10).train()
    x = torch.randn(4, 3, 32, 32)
    dense = count(model, x).macs
    pruner = FisherPruner(model, x, target=0.5, interval=1, units=8)
    losses, optimizer = train(model, pruner, steps=60)
    assert pruner.done and all(torch.isfinite(torch.tensor(losses)))
    model.eval()
    expected = model(x)
    pruner.finish(optimizer)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert 0.49 <= count(model, x).macs / dense <= 0.5
    assert count(model, x).macs / dense == pytest.approx(pruner.remaining)
    F.cross_entropy(model.train()(x), torch.arange(4)).backward()
    optimizer.step()
    nf.sparsify(model, "2:4", method="magnitude", exclude=["conv1", "fc"])
    nf.verify(model)
    assert torch.isfinite(model(x)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "regnet_x_200mf"])
def test_published_networks_to_half_their_macs(name):
    """Figures of docs/fisher-pruning.md: counted at 224 x 224, about 100 steps on random images of 64 x 64."""
    torch.manual_seed(0)
    model, x = create_model(name).train(), torch.randn(2, 3, 224, 224)
    dense = count(model, x).macs
    pruner = FisherPruner(model, x, interval=1, check=False)
    pruner.units = int(pruner.cost.units.sum()) // 150
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(1000, (2,))
    while not pruner.done:
        F.cross_entropy(model(images), labels).backward()
        pruner.step()
    expected = model.eval()(images)
    pruner.finish()
    assert 0.49 <= count(model, x).macs / dense <= 0.5
    assert torch.allclose(model(images), expected, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("of", ["macs", "parameters", "memory"])
def test_targets(of):
    torch.manual_seed(0)
    model = create_model("resnet18", width=8, num_classes=5).train()
    x = torch.randn(4, 3, 32, 32)
    before = count(model, x[:1].expand(2, -1, -1, -1))
    pruner = FisherPruner(model, x, target=0.8, of=of, normalise="memory" if of == "memory" else None, interval=1, units=8)
    train(model, pruner, steps=40)
    pruner.finish()
    after = count(model, x[:1].expand(2, -1, -1, -1))
    cost = {
        "macs": lambda c: c.macs, "parameters": lambda c: c.parameters,
        "memory": lambda c: c.activations + c.linear_activations,
    }[of]  # fmt: skip
    assert 0.79 <= cost(after) / cost(before) <= 0.8


def test_one_unit_an_interval_the_least_important_per_saving():
    torch.manual_seed(0)
    model, x = Network([Residual(6, 8)], stem=6, flatten=False).eval(), images()
    pruner = FisherPruner(model, x, target=0.5, interval=3, check=False)
    for _ in range(2):
        model(x).square().sum().backward()
        assert pruner.step() == []
    model(x).square().sum().backward()
    scores = pruner.importance()
    savings = pruner.saving.savings(pruner.cost.units) / pruner.saving.total(pruner.cost.units)
    expected = {
        (name, unit): float(value) / saving
        for (name, values), saving in zip(scores.items(), savings) for unit, value in enumerate(values)
    }  # fmt: skip
    (pruned,) = pruner.step()
    assert (pruned.group, pruned.unit) == min(expected, key=expected.get)
    assert pruned.importance == pytest.approx(min(expected.values())) and pruned.iteration == 3
    assert pruned.remaining == pruner.remaining < 1 and pruner.history == [pruned]
    assert not any(value.any() for value in pruner.importance().values())  # counts start anew
    pruner.close()


def test_minimum_and_exclude():
    torch.manual_seed(0)
    model = Network([Residual(6, 8), Residual(6, 4)], stem=6, flatten=False).train()
    pruner = FisherPruner(model, torch.randn(4, 3, 12, 12), target=0.6, interval=1, minimum=3, exclude=["stem*", "*.second.*"])
    for _ in range(6):
        model(torch.randn(4, 3, 12, 12)).square().mean().backward()
        pruner.step()
    assert pruner.gates.alive["stem.0"].all()
    left = [int(alive.sum()) for alive in pruner.gates.alive.values()]
    assert left[0] == 6 and min(left) >= 3 and sum(left) == 6 + 8 + 4 - len(pruner.history)
    assert pruner.remaining > 0.55 and len(pruner.history) >= 4
    pruner.close()


def test_resumes_where_it_was():
    torch.manual_seed(0)
    model = create_model("resnet18", width=8, num_classes=4).eval()  # fixed norms: the weights are all there is
    whole = copy.deepcopy(model)
    options = {"target": 0.8, "interval": 2, "check": False}
    x = torch.randn(4, 3, 32, 32)
    first = FisherPruner(model, x, **options)
    _, optimizer = train(model, first, steps=3, seed=1)
    state, weights, momenta = copy.deepcopy((first.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, first, steps=4, seed=2, optimizer=optimizer)

    whole.load_state_dict(weights)
    second = FisherPruner(whole, x, **options)
    second.load_state_dict(state)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.01, momentum=0.9)
    optimizer.load_state_dict(momenta)
    train(whole, second, steps=4, seed=2, optimizer=optimizer)
    assert second.iteration == first.iteration == 7
    assert [(p.group, p.unit) for p in second.history] == [(p.group, p.unit) for p in first.history[1:]]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="this state is of another network: 'alive.conv1' does not fit"):
        second.load_state_dict(state | {"alive.conv1": torch.ones(3, dtype=torch.bool)})


def test_evaluation_counts_nothing():
    model, x = random_network(2), images()
    pruner = FisherPruner(model, x, target=0.9, check=False)
    with torch.no_grad():
        model(x)
    assert not any(value.any() for value in pruner.importance().values())
    with pytest.raises(RuntimeError, match=r"no gradient has reached a layer: call backward\(\) before step\(\)"):
        for _ in range(25):
            pruner.step()
    pruner.close()


def test_gradients_that_are_not_finite():
    model, x = random_network(2), images()
    pruner = FisherPruner(model, x, target=0.9, interval=1, check=False)
    (model(x) * float("nan")).sum().backward()
    with pytest.raises(RuntimeError, match="gradients are not finite"):
        pruner.step()


def test_bad_options():
    model, x = nn.Sequential(conv(3, 4), nn.Conv2d(4, 2, 1)), images()
    for options, message in {
        "target": ({"target": 0}, "target must be above 0 and at most 1, not 0"),
        "interval": ({"interval": 0}, "interval must be an integer >= 1, not 0"),
        "tolerance": ({"tolerance": -0.1}, "tolerance must be >= 0, not -0.1"),
        "units": ({"units": 1.5}, "units must be an integer >= 1, not 1.5"),
        "minimum": ({"minimum": -1}, "minimum must be an integer >= 1, not -1"),
        "of": ({"of": "time"}, "measure must be one of macs, parameters, memory, not 'time'"),
        "reach": ({"target": 0.2}, r"target must be at least 0\.25\d, what is left with 1 units in each group, not 0.2"),
        "excluded": ({"exclude": ["*"]}, "no channels can be pruned: 1 "),
    }.values():
        with pytest.raises(ValueError, match=message):
            FisherPruner(model, x, **options)
    with pytest.raises(ValueError, match=r"no channels can be pruned:  \(the network's result\)"):
        FisherPruner(nn.Linear(3, 4), torch.randn(2, 3))


class Peeks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        x = self.layer(x)
        return x if x.max() > 0 else -x


def test_an_untraceable_module_is_refused_with_its_line():
    message = r'Peeks \'1\' cannot be traced at .*test_fisher.py:\d+, "return x if x.max\(\) > 0 else -x"'
    with pytest.raises(nf.UntraceableError, match=message):
        nf.FisherPruner(nn.Sequential(nn.Linear(3, 3), Peeks()), torch.randn(2, 3))
