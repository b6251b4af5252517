"""What each operator does to channels: pass them on, or keep them and say why."""

import pytest
import torch
from torch import nn

from algo.channels import channel_groups


def consumers(graph):
    """Who reads the prunable channels of layer ``a``."""
    group = graph.group("a")
    assert (group.units, group.producers, group.kept) == (8, ("a",), None)
    return group.consumers


class Cases(nn.Module):
    """A convolution, something done to its result, and a layer that reads that."""

    def __init__(self, middle, outputs=8, inputs=8):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, outputs, 3), nn.Conv2d(inputs, 2, 1)
        self.norm, self.middle = nn.GroupNorm(2, 8), middle

    def forward(self, x):
        return self.b(self.middle(self, self.a(x)))


KEPT = {
    "group_norm normalises over them": lambda self, x: self.norm(x),
    "softmax works along them": lambda self, x: x.softmax(1),
    "roll works along them": lambda self, x: x.roll(1, dims=1),
    "mean sums over them": lambda self, x: x - x.mean(1, keepdim=True),
    "slice cuts them at fixed places": lambda self, x: torch.cat([x[:, 4:], x[:, :4]], 1),
    "view splits them": lambda self, x: x.view(len(x), 2, 4, 10, 10).transpose(1, 2).reshape(x.shape),
    "pad pads them": lambda self, x: nn.functional.pad(x[:, :], (0, 0, 0, 0, 1, 0))[:, :8],
    "cat combines them with a value that is not pruned": lambda self, x: torch.cat([x, torch.zeros(len(x), 8, 1, 10)], 2),
    "mul combines them with a value that is not pruned": lambda self, x: x * torch.linspace(0, 1, 8)[:, None, None],
    "einsum mixes them": lambda self, x: torch.einsum("bchw,dc->bdhw", x, torch.ones(8, 8)),
    "conv2d is not the call of a layer": lambda self, x: nn.functional.conv2d(x, self.b.weight.repeat(4, 1, 1, 1)),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_cannot_be_pruned_says_why(reason):
    graph = channel_groups(Cases(KEPT[reason]), torch.randn(2, 3, 12, 12))
    kept = graph.group("a").kept
    assert kept.startswith(reason) and "test_channel_rules.py:" in kept


def test_one_channel_over_many():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.where, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x * self.where(x).sigmoid())

    graph = channel_groups(Attention(), torch.randn(2, 3, 12, 12))
    assert consumers(graph) == ("where", "b")
    assert graph.group("where").kept.startswith("mul spreads one of them over many")


FREE = {
    "upsample": lambda self, x: nn.functional.interpolate(x, scale_factor=2.0),
    "pool": lambda self, x: nn.functional.max_pool2d(x, 2) + nn.functional.adaptive_max_pool2d(x, 5),
    "in place": lambda self, x: x.relu_().add_(x),
    "transposed": lambda self, x: x.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (10, 10)),
    "pad pixels": lambda self, x: nn.functional.pad(x, (1, 1, 1, 1)),
    "slice pixels": lambda self, x: x[:, :, 1:-1, ::2],
    "softmax of pixels": lambda self, x: x.flatten(2).softmax(-1).view(x.shape),
    "stack": lambda self, x: torch.stack([x, x.abs()], 0).amax(0),
    "stack behind": lambda self, x: torch.stack([x, x.abs()], -1).sum(-1),
    "where": lambda self, x: torch.where(x > 0, x, torch.zeros_like(x)),
    "spatial mask": lambda self, x: x * torch.ones(10, 10).tril(),
    "activations": lambda self, x: nn.functional.hardswish(nn.functional.logsigmoid(nn.functional.mish(x))),
    "maximum": lambda self, x: torch.max(x, 0.1 * x),
}


@pytest.mark.parametrize("case", FREE)
def test_operators_that_pass_channels_on(case):
    graph = channel_groups(Cases(FREE[case]), torch.randn(2, 3, 12, 12))
    assert consumers(graph) == ("b",)
