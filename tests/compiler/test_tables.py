"""Tables of functions against the functions."""

import numpy as np
import pytest
import torch
from torch import nn

from compiler.graph import CompileError, Function
from compiler.tables import activation_table


@pytest.mark.parametrize("function", [torch.relu, nn.functional.gelu, torch.tanh, nn.functional.silu])
def test_tables_are_exact_to_half_a_step(function):
    table = activation_table(
        Function("f", function), in_scale=0.05, out_scale=0.06, in_offset=0.3, out_offset=0.2
    )
    x = torch.arange(-128, 128, dtype=torch.float64) * 0.05 + 0.3
    assert table.shape == (256,) and table.dtype == np.int8
    error = np.abs(table * 0.06 + 0.2 - function(x).numpy())
    assert error.max() <= 0.03 + 1e-9
    assert (
        activation_table(Function("f", lambda v: v * 100), in_scale=1.0, out_scale=1.0)[0] == -128
    )  # clipped


def test_functions_that_are_not_finite():
    with pytest.raises(CompileError, match=r"function 'log' is not finite everywhere on -6.4..6.35"):
        activation_table(Function("log", torch.log), in_scale=0.05, out_scale=1.0)
