"""Base-2 exponential: the integer model against floating point, everywhere."""

import numpy as np

from hw.exp2 import EXP_BASE, EXP_SLOPE, exp2_mantissa, softmax_exp


def test_mantissa():
    f = np.arange(256)
    mantissa = exp2_mantissa(f)
    assert EXP_BASE[0] == mantissa[0] == 255 * 256
    assert len(EXP_BASE) == len(EXP_SLOPE) == 8
    assert (np.diff(mantissa) <= 0).all()
    assert np.abs(mantissa - 65280 * 2 ** (-f / 256)).max() < 52


def test_probability():
    d = np.arange(65536)
    p = softmax_exp(d, 0)
    i = d >> 8
    literal = np.where(i >= 9, 0, (exp2_mantissa(d & 255) + (1 << (7 + i % 16))) >> (8 + i % 16))
    assert (p == literal).all()
    assert p[0] == 255 and (np.diff(p) <= 0).all()
    assert np.abs(p - 255 * 2 ** (-d / 256)).max() < 0.64


def test_masked():
    assert softmax_exp([0, 5, -1], [-32768, 7, 7]).tolist() == [0, 252, 0]
