"""The walk: tied parameters, parameters used in other ways, operators without a rule."""

import torch
from torch import nn

from algo.capture import capture
from algo.channel_rules import rule_of
from algo.channels import channel_groups
from algo.propagation import because


def test_tied_weights_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)).relu())

    graph = channel_groups(Tied(), torch.randn(2, 6))
    assert {group.kept for group in graph.groups} == {"the network's result"}  # the last output is the first input too


def test_a_weight_used_twice_in_different_ways_stays():
    class Decoder(nn.Module):
        """A Linear whose weight is a dictionary for another product too."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.a(x)
            return self.b(x), x @ self.a.weight

    graph = channel_groups(Decoder(), torch.randn(2, 4))
    assert graph.group("a").kept.startswith("matmul mixes them, test_propagation.py:")


def test_a_computed_weight_keeps_all_that_meet_it():
    class Standardised(nn.Module):
        """A weight that is computed, as weight standardisation does."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            weight = self.b.weight - self.b.weight.mean((1, 2, 3), keepdim=True)
            return self.c(nn.functional.conv2d(self.a(x), weight, self.b.bias))

    graph = channel_groups(Standardised(), torch.randn(2, 3, 4, 4))
    assert graph.prunable == ()
    assert graph.group("a").kept.startswith("conv2d is not the call of a layer, test_propagation.py:")


def test_operators_and_their_lines():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x).cumsum(0).det()

    nodes = [node for node in capture(Two(), torch.randn(3, 3)).graph.nodes if node.op == "call_function"]
    linear, cumsum, det = nodes
    assert rule_of(linear.target) and rule_of(cumsum.target) and rule_of(det.target) is None
    assert because(linear, "does it").startswith("linear does it, test_propagation.py:")
    assert because(linear, "does it").endswith(" in layer")
