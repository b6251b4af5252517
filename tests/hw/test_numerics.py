"""Integer primitives against Python integers of any size."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hw.numerics import requantise, residual_add, residual_multiplier, round_shift, saturate, table_lookup, wrap32

int32 = st.integers(-2**31, 2**31 - 1)


@given(st.integers(-2**47, 2**47), st.integers(1, 63))
def test_round_shift(value, shift):
    assert int(round_shift(value, shift)) == (value + (1 << (shift - 1))) >> shift


@given(st.integers(-2**40, 2**40))
def test_wrap_and_saturate(value):
    assert int(wrap32(value)) == (value + 2**31) % 2**32 - 2**31
    assert int(saturate(value, 8)) == max(-128, min(127, value))


@given(int32, int32, st.integers(-2**15, 2**15 - 1), st.integers(1, 63))
def test_requantise(acc, bias, mult, shift):
    v = (acc + bias + 2**31) % 2**32 - 2**31
    expected = max(-2**15, min(2**15 - 1, (v * mult + (1 << (shift - 1))) >> shift))
    assert int(requantise(acc, bias, mult, shift)) == expected


@given(st.integers(-2**15, 2**15 - 1), st.integers(-2**15, 2**15 - 1), st.integers(0, 2**15 - 1), st.integers(1, 63))
def test_residual_add(value, residual, mult, shift):
    scaled = (residual * mult + (1 << (shift - 1))) >> shift
    assert int(residual_add(value, residual, mult, shift)) == max(-2**15, min(2**15 - 1, value + scaled))


@given(st.integers(-2**15, 2**15 - 1), st.integers(-2**15, 2**15 - 1), st.sampled_from([8, 16]))
def test_residual_multiplier(residual, mult, bits):
    residual >>= 16 - bits
    assert int(residual_multiplier(residual, mult, bits)) == residual * mult // 2**bits
    assert abs(int(residual_multiplier(residual, mult, bits))) <= 2**14


def test_table_lookup():
    table = np.arange(-128, 128)
    assert table_lookup([-300, -128, 0, 127, 300], table).tolist() == [-128, -128, 0, 127, 127]
