import pytest
import torch

from algo.channel_gates import ChannelGates
from algo.channels import channel_groups
from algo.count import count
from tests.algo.networks import images, random_network


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_a_gate_is_a_weight_of_zero(seed):
    """Off units: as if every layer that reads them had zero weights there."""
    model, x = random_network(seed), images()
    graph = channel_groups(model, x)
    plain = model(x)
    gates = ChannelGates(model, graph)
    assert torch.equal(model(x), plain)
    for alive in gates.alive.values():
        alive[::2] = False
    gates.update()
    gated = model(x)
    gates.remove()
    assert torch.equal(model(x), plain) and not torch.equal(gated, plain)
    for group in graph.prunable:
        for name, positions in group.inputs.items():
            layer = model.get_submodule(name)
            if graph.layers[name].groups == 1:
                layer.weight[:, positions[::2].flatten()] = 0
            else:
                layer.weight[group.outputs[name][::2].flatten()] = 0
    assert torch.allclose(model(x), gated, atol=1e-5)


def test_watch_and_mapping():
    model, x = random_network(1), images()
    graph = channel_groups(model, x)
    seen = []
    gates = ChannelGates(model, graph, watch=lambda name, value: seen.append((name, value.shape[1])))
    group = graph.prunable[0]
    gates.update({group.name: torch.zeros(group.units, dtype=torch.bool)})
    model(x)
    assert set(seen) == {(name, graph.layers[name].inputs) for group in graph.prunable for name in group.consumers}
    assert not gates.alive[group.name].any()
    count(model, x)  # on the meta device; the gates still work afterwards
    model(x)
    gates.remove()
