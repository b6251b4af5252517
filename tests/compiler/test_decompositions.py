"""Operators written in others: the same values."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from compiler.compile import compile_model
from compiler.decompositions import mixed_convolution
from models.odconv import ODConv2d, dynamic_conv2d
from sim.simulate import simulate
from tests.compiler.modules import Apply


@pytest.mark.parametrize(("kernels", "groups", "size"), itertools.product((1, 3), (1, 2), (1, 3)))
def test_a_mixed_convolution_is_that_of_mixed_weights(kernels: int, groups: int, size: int) -> None:
    torch.manual_seed(kernels)
    x, weight = torch.randn(2, 4, 7, 6), torch.randn(kernels * 6, 4 // groups, size, size)
    channel, filters = torch.rand(2, 4, 1, 1), torch.rand(2, 6, 1, 1)
    position = torch.rand(2, size * size) if size > 1 else None
    kernel = torch.softmax(torch.randn(2, kernels), 1) if kernels > 1 else None
    rest = (kernels, [2, 1], [size // 2, 1], [1, 1], groups)
    wanted = dynamic_conv2d(x, weight, channel, filters, position, kernel, *rest)
    found = mixed_convolution(x, weight, channel, filters, position, kernel, *rest)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_omni_dimensional_convolutions_run_on_the_accelerator() -> None:
    torch.manual_seed(0)
    module = Apply(lambda m, x: m.c(x).relu(), c=ODConv2d(16, 8, 3, padding=1, kernels=2)).eval()
    x = torch.randn(1, 16, 6, 6)
    program = compile_model(module, x, arch="tiny", calibration=[x], host="forbid")
    run = simulate(program, x, engine="isa")
    assert run.bit_exact
    with torch.no_grad():
        wanted = module(x)
    assert torch.cosine_similarity(run.outputs[0].flatten(), wanted.flatten(), 0) > 0.99


def _checked(module: nn.Module, *inputs: torch.Tensor) -> None:
    """Nothing on the host, and results near float, bit-exact."""
    program = compile_model(module.eval(), inputs, arch="tiny", calibration=[inputs], host="forbid")
    run = simulate(program, inputs, engine="isa")
    assert run.bit_exact
    with torch.no_grad():
        wanted = module(*inputs)
    for found, exact in zip(run.outputs, [wanted] if isinstance(wanted, torch.Tensor) else wanted, strict=True):
        assert torch.cosine_similarity(torch.as_tensor(found).flatten(), exact.flatten(), 0) > 0.99


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(8, 12, batch_first=True, bidirectional=True), nn.GRU(8, 12, num_layers=2), nn.RNN(8, 12, nonlinearity="relu")],
)
def test_recurrent_layers_are_written_out(layer: nn.Module) -> None:
    torch.manual_seed(0)
    width = 24 if isinstance(layer, nn.LSTM) else 12
    _checked(Apply(lambda m, x: m.h(m.r(x)[0]), r=layer, h=nn.Linear(width, 4)), torch.randn(2, 3, 8))


def test_long_recurrent_layers_run_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compiler.decompositions.MAX_STEPS", 5)
    torch.manual_seed(0)
    module = Apply(lambda m, x: m.h(m.r(x)[0]), r=nn.GRU(8, 12, num_layers=2), h=nn.Linear(12, 16))
    program = compile_model(module.eval(), torch.randn(3, 2, 8), arch="tiny", calibration=[torch.randn(3, 2, 8)])
    (row,) = (row for row in program.report().rows if row.place == "host" and "gru" in row.operator)
    assert row.operator == "gru.input"


def test_cells_and_gated_units() -> None:
    torch.manual_seed(0)
    _checked(nn.GRUCell(8, 12), torch.randn(2, 8), torch.randn(2, 12))
    gated: Any = Apply(lambda m, x: m.b(torch.nn.functional.glu(m.a(x))), a=nn.Linear(8, 24), b=nn.Linear(12, 5))
    _checked(gated, torch.randn(2, 5, 8))
