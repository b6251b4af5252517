"""What moves is copied as it lies: few copies, and the same values."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiler.compile import compile_model
from compiler.program import Program
from sim.simulate import simulate


class Scales(nn.Module):
    """Masks of three scales, and their mean: a sum over an outer dimension, rows of whole maps."""

    def __init__(self):
        super().__init__()
        self.head, self.map = nn.Linear(16, 16), nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, queries, image):
        return torch.einsum("bsqc,bchw->bsqhw", self.head(queries), F.relu(self.map(image))).mean(1)


class Halves(nn.Module):
    """Channels of one image, added across: neither operand's view can move behind the sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(F.gelu(x[:, :16] + x[:, 16:]))


class Means(nn.Module):
    """Over outer dimensions, of few parts and of many."""

    def forward(self, x):
        return x.mean(1), x.mean(2, keepdim=True)


@pytest.mark.parametrize("network, shapes, most", [
    (Scales(), ((1, 3, 5, 16), (1, 3, 8, 8)), 120), (Halves(), ((2, 3, 8, 8),), 160), (Means(), ((1, 3, 4, 5, 6),), 150),
], ids=["scales", "halves", "means"])  # fmt: skip
def test_few_copies(network, shapes, most):
    torch.manual_seed(0)
    inputs = tuple(torch.randn(shape) for shape in shapes)
    network = network.eval()
    program = compile_model(network, inputs, arch="sta256", calibration=[inputs], host="forbid")
    run = simulate(program, inputs, engine="isa")
    expected = network(*inputs)
    for found, wanted in zip(run.outputs, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert found.shape == wanted.shape
        assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99
    assert run.bit_exact, run.mismatches
    assert isinstance(program, Program) and program.instruction_count < most
