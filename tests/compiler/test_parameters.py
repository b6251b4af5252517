"""Integer parameters of operators against float."""

import numpy as np
import pytest
import torch

from compiler.graph import CompileError, Norm
from compiler.parameters import LARGEST, finest_for_norm, multiplier, norm_parameters
from hw.row import layernorm_rows, norm_constants


@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_norm_parameters_against_float(offset):
    torch.manual_seed(0)
    cols, in_scale = 48, 1e-3
    norm = Norm(torch.randn(cols) * torch.logspace(-3, 1, cols), torch.randn(cols) * 3, 1e-5)
    norm.gamma[5] = norm.beta[7] = 0.0
    x = torch.randint(-16000, 16000, (50, cols))
    exact = norm.apply(x.double().float() * in_scale) - offset
    out_scale = float(exact.abs().max() / 127)
    made = norm_parameters(norm, in_scale=in_scale, out_scale=out_scale, offset=offset)
    ln_inv, ln_shift, row_mult, row_shift = norm_constants(cols)
    y = layernorm_rows(
        x.numpy(), made.gamma, made.beta, made.shift,
        ln_inv=ln_inv, ln_shift=ln_shift, eps=made.eps, row_mult=row_mult, row_shift=row_shift,
    )  # fmt: skip
    assert np.abs(y - (exact / out_scale).numpy()).max() < 0.5 + 0.15
    used = np.abs(made.gamma.astype(int))
    assert used.max() >= 1 << 14 and np.abs(made.beta).max() <= 1 << 30


def test_epsilon_of_a_norm_counts():
    norm = Norm(torch.ones(16), torch.zeros(16), 1e-2)
    made = norm_parameters(norm, in_scale=1e-3, out_scale=1 / 64)
    assert made.eps == round(1e-2 * 16**2 / 1e-6)
    assert norm_parameters(norm, in_scale=1e-9, out_scale=1 / 64).eps == (1 << 32) - 1  # clipped


@pytest.mark.parametrize("size", [1.0, 0.1, 1e-2, 1e-3, 1e-6])
def test_values_that_epsilon_keeps_small_are_not_blown_up(size):
    torch.manual_seed(0)
    cols = 48
    norm = Norm(torch.randn(cols), torch.zeros(cols), 1e-2)
    x = torch.randn(20, cols) * size
    exact, peak = norm.apply(x), float(x.abs().max())
    in_scale, out_scale = max(finest_for_norm(norm, peak), peak / (1 << 14)), float(exact.abs().max() / 127)
    made = norm_parameters(norm, in_scale=in_scale, out_scale=out_scale)
    ln_inv, ln_shift, row_mult, row_shift = norm_constants(cols)
    y = layernorm_rows(
        (x / in_scale).round().long().numpy(), made.gamma, made.beta, made.shift,
        ln_inv=ln_inv, ln_shift=ln_shift, eps=made.eps, row_mult=row_mult, row_shift=row_shift,
    )  # fmt: skip
    assert np.abs(y - (exact / out_scale).numpy()).max() < 3


def test_multipliers_end_where_every_value_saturates_or_vanishes():
    assert multiplier(2.0**-50, "x") == (0, 1) and multiplier(0.0, "x") == (0, 1)
    assert multiplier(2.0**-48, "x") == (1 << 14, 62)
    assert multiplier(LARGEST, "x") == multiplier(1e40, "x") == ((1 << 15) - 1, 1)
    with pytest.raises(CompileError, match="x: a requantisation multiplier must be finite and >= 0, not -1.0"):
        multiplier(-1.0, "x")
