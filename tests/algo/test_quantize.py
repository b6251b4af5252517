import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algo.quantize import (
    MULT_MAX,
    MULT_MIN,
    dequantize_weight,
    quantize_weight,
    requant_array,
    requant_params,
    requantize,
)


def test_weight_within_half_a_step_and_zeros_stay():
    torch.manual_seed(0)
    weight = torch.randn(6, 20)
    weight[:, ::3] = 0
    weight[2] = 0
    quantised, scale = quantize_weight(weight)
    assert quantised.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (6,)
    assert scale[2] == 1 and not quantised[2].any()
    assert not quantised[:, ::3].any()
    assert (quantised.abs().amax(1)[[0, 1, 3, 4, 5]] == 127).all()
    assert ((dequantize_weight(quantised, scale) - weight).abs() <= scale[:, None] * 0.5001).all()


def test_conv_weight_keeps_its_shape():
    quantised, scale = quantize_weight(torch.randn(4, 3, 2, 2))
    assert quantised.shape == (4, 3, 2, 2) and dequantize_weight(quantised, scale).shape == (4, 3, 2, 2)


def test_tiny_channel_does_not_overflow():
    quantised, scale = quantize_weight(torch.full((1, 4), 1e-44))
    assert scale[0] == 1 and not quantised.any()


def test_weight_errors():
    with pytest.raises(ValueError, match="output channel 1 of the weight has a NaN"):
        quantize_weight(torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(TypeError, match="not torch.int8"):
        quantize_weight(torch.zeros(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"not \(2,\)"):
        quantize_weight(torch.zeros(2))


@given(st.floats(2.0**-33, 2.0**14, exclude_max=True))
def test_requant_params_are_within_2_to_minus_15(multiplier):
    if multiplier >= 32767.5 / 2:  # rounds to a multiplier that would need shift 0
        return
    mult, shift = requant_params(multiplier)
    assert MULT_MIN <= mult <= MULT_MAX and 1 <= shift <= 47
    assert abs(mult * 2.0**-shift - multiplier) <= multiplier * 2.0**-15


def test_requant_params_edges():
    assert requant_params(0.0) == (0, 1)
    assert requant_params(1.0) == (16384, 14)
    assert requant_params(2.0**-33) == (16384, 47)
    assert requant_params(0.999999) == (16384, 14)  # rounds up to the next power of two
    for bad in (2.0**-34, 2.0**14, 1e9):
        with pytest.raises(ValueError, match="must be in .* check the scales"):
            requant_params(bad)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite and >= 0"):
            requant_params(bad)
    with pytest.raises(ValueError, match="has 1..20"):
        requant_params(2.0**-10, max_shift=20)


def test_requant_array_equals_single():
    multipliers = np.array([[0.0, 1e-3], [0.7, 123.4]])
    mult, shift = requant_array(multipliers)
    assert mult.dtype == np.int32 and mult.shape == (2, 2)
    singles = [requant_params(float(value)) for value in multipliers.flat]
    assert list(zip(mult.flat, shift.flat, strict=True)) == singles


@settings(deadline=None)
@given(st.integers(-(2**31), 2**31 - 1), st.floats(1e-9, 1000.0))
def test_requantize_is_near_the_real_product(value, multiplier):
    mult, shift = requant_params(multiplier)
    result = int(requantize(np.array([value]), mult, shift, bits=48)[0])
    assert result == (value * mult + (1 << (shift - 1))) >> shift
    assert abs(result - value * multiplier) <= 0.5 + abs(value * multiplier) * 2.0**-15 + 1e-9


def test_requantize_saturates():
    assert requantize(np.array([10**6, -(10**6)]), 16384, 14).tolist() == [127, -128]
