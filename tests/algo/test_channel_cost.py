import numpy as np
import pytest
import torch

from algo.channel_cost import ChannelCost
from algo.channels import channel_groups
from algo.count import count
from algo.surgery import prune_channels
from tests.algo.networks import images, random_network

MEASURES = {
    "macs": lambda counted: counted.macs,
    "parameters": lambda counted: counted.parameters,
    "memory": lambda counted: counted.activations + counted.linear_activations,
}


@pytest.mark.parametrize("seed", range(5))
def test_equals_what_is_counted_after_surgery(seed):
    model = random_network(seed)
    graph = channel_groups(model, images())
    random = np.random.default_rng(seed)
    alive = np.array([random.integers(1, group.units + 1) for group in graph.prunable])
    costs = {measure: ChannelCost(graph, measure) for measure in MEASURES}
    before = count(model, images(1))
    for measure, cost in costs.items():
        assert cost.total(cost.units) == MEASURES[measure](before)
    prune_channels(model, graph, {group.name: range(group.units - left) for group, left in zip(graph.prunable, alive)})
    after = count(model, images(1))
    for measure, cost in costs.items():
        assert cost.total(alive) == MEASURES[measure](after)


def test_savings_are_differences():
    graph = channel_groups(random_network(3), images())
    for measure in MEASURES:
        cost = ChannelCost(graph, measure, extra=1000.0)
        savings = cost.savings(cost.units)
        for group in range(len(cost.units)):
            fewer = cost.units.copy()
            fewer[group] -= 1
            assert savings[group] == cost.total(cost.units) - cost.total(fewer) > 0


def test_by_hand():
    """3 -> 4 -> 2 channels, 3x3 then 1x1, 10x10 places: a middle channel costs 100 * (3 * 9 + 2) MACs."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1))
    graph = channel_groups(model, torch.randn(5, 3, 12, 12))
    units = np.array([4])
    assert ChannelCost(graph, "macs").savings(units).tolist() == [100 * (27 + 2)]
    assert ChannelCost(graph, "memory").savings(units).tolist() == [100]
    assert ChannelCost(graph, "parameters").savings(units).tolist() == [27 + 1 + 2]


def test_unknown_measure():
    graph = channel_groups(random_network(0), images())
    with pytest.raises(ValueError, match="measure must be one of macs, parameters, memory, not 'time'"):
        ChannelCost(graph, "time")  # type: ignore[arg-type]
