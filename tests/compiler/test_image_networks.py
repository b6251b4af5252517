"""Ordinary small convolutional networks, as users write them: all of each on the accelerator, every byte as the reference,
close to float."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiler.compile import compile_model
from compiler.program import Program
from sim.simulate import simulate
from tests.compiler.image_networks import NETWORKS, settled


@pytest.mark.parametrize("name", NETWORKS)
def test_network_runs_on_the_accelerator_and_is_close_to_float(name):
    torch.manual_seed(0)
    module, shape = NETWORKS[name]
    module, x = settled(module()), torch.randn(shape)
    program = compile_model(module, x, arch="ecp5", host="forbid", calibration=[torch.randn(shape), x])
    run = simulate(program, x, engine="isa")
    with torch.no_grad():
        expected = module(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert isinstance(program, Program) and run.bit_exact
    for got, wanted in zip(run.outputs, expected, strict=True):
        assert got.shape == wanted.shape
        assert F.cosine_similarity(got.flatten(1), wanted.flatten(1)).min() > 0.99


LAYERS = {
    "conv1d": (nn.Conv1d(3, 6, 4, stride=2, padding=1, dilation=2), (2, 3, 17)),
    "same, even kernel": (nn.Conv2d(3, 5, (4, 2), padding="same"), (1, 3, 6, 7)),
    "same, dilated line": (nn.Conv1d(4, 4, 3, padding="same", dilation=3, groups=2), (2, 4, 9)),
    "valid": (nn.Conv2d(3, 5, 2, padding="valid"), (1, 3, 4, 4)),
    "batch norm of rows": (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)), (5, 6)),
    "batch norm before": (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)), (5, 6)),
    "batch norm of lines": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6)), (2, 3, 9)),
    "max pooling of lines": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.MaxPool1d(3, 2, 1)), (2, 3, 12)),
    "average pooling of lines": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1)), (2, 3, 10)),
    "adaptive max pooling": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveMaxPool2d((2, 1))), (2, 3, 6, 7)),
    "ceil mode": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2, ceil_mode=True)), (1, 3, 9, 7)),
    "prelu of one": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.PReLU(init=0.3)), (1, 3, 5, 5)),
    "prelu of channels": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.PReLU(6, init=0.3), nn.Conv2d(6, 2, 1)), (1, 3, 5, 5)),
    "flat tokens": (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)), (2, 5, 4)),
    "flat input": (nn.Sequential(nn.Flatten(), nn.Linear(75, 4)), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_runs_on_the_accelerator_and_is_close_to_float(name):
    torch.manual_seed(1)
    module, shape = LAYERS[name]
    module, x = settled(module), torch.randn(shape)
    program = compile_model(nn.Sequential(module), x, arch="ecp5", host="forbid", calibration=[torch.randn(shape), x])
    run = simulate(program, x, engine="isa")
    with torch.no_grad():
        expected = module(x)
    assert run.bit_exact and run.outputs[0].shape == expected.shape
    assert F.cosine_similarity(run.outputs[0].flatten(), expected.flatten(), dim=0) > 0.99


class Twice(nn.Module):
    """Two convolutions of one image, each with windows of its own, and the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 5, padding=2), nn.Conv2d(3, 6, 1)

    def forward(self, x):
        return torch.cat([F.relu(self.a(x)), self.b(x) + self.c(x)], 1)


def test_an_image_that_is_read_twice_is_one_argument():
    torch.manual_seed(0)
    module, x = Twice().eval(), torch.randn(1, 3, 6, 5)
    program = compile_model(module, x, arch="tiny", host="forbid", calibration=[x])
    assert isinstance(program, Program) and len(program.inputs) > 1
    for given in (x, [x], {program.inputs[0].name: x}):
        run = simulate(program, given, engine="isa")
        assert run.bit_exact and F.cosine_similarity(run.outputs[0].flatten(), module(x).flatten(), dim=0) > 0.999
    both = compile_model(module, x, arch="tiny", calibration=[x], dynamic={program.inputs[0].name: {2: (6, 7)}})
    given = torch.randn(1, 3, 7, 5)
    found = simulate(both, given, engine="isa").outputs[0]
    assert F.cosine_similarity(found.flatten(), module(given).flatten(), dim=0) > 0.99
