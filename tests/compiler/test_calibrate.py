"""Calibration data that is bad, or little."""

import pytest
import torch
from torch import nn

from compiler.compile import compile_model
from compiler.frontend import trace
from compiler.graph import CompileError
from compiler.passes import optimise
from compiler.quantise import quantise
from compiler.verify_network import check_network
from sim.simulate import simulate
from tests.compiler.modules import Apply


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 4)).eval()


def test_the_layer_that_overflows_is_named():
    module = _network()
    with torch.no_grad():
        module[2].weight.fill_(1e38)
    x = torch.randn(5, 8)
    graph = optimise(trace(module, x))
    with pytest.raises(CompileError, match=r"calibration: 2 has a NaN or an infinity: .* the model overflows on it"):
        quantise(graph, [1e3 * x])
    with pytest.raises(CompileError, match=r"calibration: input has a NaN or an infinity: the batch has one itself"):
        quantise(graph, [x / 0])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_of_any_finite_size_compile_or_name_the_layer(size):
    module = Apply(lambda m, x: m.second(m.first(x)), first=nn.Linear(8, 12), second=nn.Linear(12, 4))
    x = size * torch.randn(5, 8)
    graph = optimise(trace(module, x))
    try:
        check_network(quantise(graph, [x]))
    except CompileError as error:
        assert str(error).startswith(("first", "second"))


@pytest.mark.parametrize("observer", ["mse", "minmax", "percentile", "entropy"])
def test_activations_that_are_all_zero(observer):
    module = _network()
    program = compile_model(module, torch.zeros(2, 8), arch="tiny", calibration=[torch.zeros(2, 8)], observer=observer)
    (result,) = simulate(program, torch.zeros(2, 8), engine="isa").outputs
    with torch.no_grad():
        exact = module(torch.zeros(2, 8))
    assert (result - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("observer", ["mse", "minmax", "percentile:99", "entropy"])
def test_one_sample_is_enough_to_compile(observer):
    module, x = _network(), torch.randn(1, 8)
    graph = optimise(trace(module, x))
    network = quantise(graph, [x], observer=observer, smooth=0.5, bits16="auto")
    check_network(network)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    x = torch.ones(2, 8)
    graph = optimise(trace(_network(), x))
    with pytest.raises(ValueError, match=f"input 'input' must be float32 like .* not {str(dtype).removeprefix('torch.')}"):
        quantise(graph, [x.to(dtype)])


def test_no_calibration_at_all_is_told():
    with pytest.warns(UserWarning, match="no calibration data: scales are chosen from the example inputs alone"):
        compile_model(_network(), torch.randn(2, 8), arch="tiny")
    with pytest.raises(ValueError, match="quantise needs at least one calibration batch"):
        compile_model(_network(), torch.randn(2, 8), arch="tiny", calibration=[])
