"""Operators written in others: the same values."""

import itertools

import pytest
import torch

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
