"""Integer primitives of `docs/numerics.md`, in NumPy int64: the arithmetic every unit model is made of."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "MASK_BIAS", "PARAM_DTYPE", "requantise", "residual_add", "residual_max", "residual_multiplier", "round_shift", "saturate",
    "table_lookup", "wrap32",
]

Int = NDArray[np.int64]

PARAM_DTYPE = np.dtype([("bias", "<i4"), ("mult", "<i2"), ("shift", "u1"), ("reserved", "u1")])
"""One column parameter in memory (8 bytes): requantisation (bias, mult, shift) or norm (beta, gamma, shift)."""

MASK_BIAS = -(1 << 30)
"""Bias that masks a key: the score saturates to -32768, which softmax takes as probability 0."""


def round_shift(value: ArrayLike, shift: ArrayLike) -> Int:
    """``(value + 2^(shift-1)) >> shift``: arithmetic right shift, rounding half up. shift in 1..63."""
    v, s = np.asarray(value, np.int64), np.asarray(shift, np.int64)
    # bit s-1 of the unrounded value is the rounding carry; adding it after the shift cannot overflow
    return (v >> s) + ((v >> (s - 1)) & 1)


def saturate(value: ArrayLike, bits: int) -> Int:
    """Clip to the range of a signed integer of that many bits."""
    limit = 1 << (bits - 1)
    return np.clip(np.asarray(value, np.int64), -limit, limit - 1)


def wrap32(value: ArrayLike) -> Int:
    """Two's complement int32 of any integer, as int64."""
    return np.asarray(value).astype(np.int64).astype(np.int32).astype(np.int64)


def requantise(acc: ArrayLike, bias: ArrayLike, mult: ArrayLike, shift: ArrayLike) -> Int:
    """int32 sums to int16: ``sat16(round_shift(wrap32(acc + bias) * mult, shift))``; arguments broadcast."""
    v = wrap32(np.asarray(acc, np.int64) + np.asarray(bias, np.int64))
    return saturate(round_shift(v * np.asarray(mult, np.int64), shift), 16)


def residual_add(value: ArrayLike, residual: ArrayLike, mult: int, shift: int) -> Int:
    """``sat16(value + round_shift(residual * mult, shift))``: value int16, residual int8 or int16."""
    scaled = round_shift(np.asarray(residual, np.int64) * mult, shift)
    return saturate(np.asarray(value, np.int64) + scaled, 16)


def residual_max(value: ArrayLike, residual: ArrayLike, mult: int, shift: int) -> Int:
    """``sat16(max(value, round_shift(residual * mult, shift)))``: value int16, residual int8."""
    scaled = round_shift(np.asarray(residual, np.int64) * mult, shift)
    return saturate(np.maximum(np.asarray(value, np.int64), scaled), 16)


def residual_multiplier(residual: ArrayLike, mult: ArrayLike, bits: int) -> Int:
    """``(residual * mult) >> bits``, the multiplier that makes a requantisation a product: residual int8 or int16 (`bits` 8 or
    16), mult int16; |result| <= 2^14. Its low bits are cut off: of less than 2^-7 of an int8 step, two int16 steps."""
    return (np.asarray(residual, np.int64) * np.asarray(mult, np.int64)) >> bits


def table_lookup(value: ArrayLike, table: ArrayLike) -> Int:
    """``table[sat8(value) + 128]``: 256 int8 entries, entry 0 for -128."""
    return np.asarray(table, np.int64)[saturate(value, 8) + 128]
