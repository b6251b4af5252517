"""Symmetric int8 quantisation: weights per output channel, requantisation constants. Activations: `algo.observers`.

A real value is ``scale * q`` with ``q`` an integer in [-127, 127] (weights) or [-(2^(bits-1) - 1), 2^(bits-1)
- 1] (activations). Zero is always exactly zero, so that quantising keeps an N:M pattern.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "MULT_MAX",
    "MULT_MIN",
    "dequantize_weight",
    "quantize_weight",
    "requant_array",
    "requant_params",
    "requantize",
]

MULT_MIN = 1 << 14
MULT_MAX = (1 << 15) - 1
MAX_SHIFT = 47


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight to int8 with one scale per output channel.

    Parameters
    ----------
    weight
        ``(O, ...)`` floating point, finite: output channels first, as in Linear and Conv2d.

    Returns
    -------
    tuple[Tensor, Tensor]
        int8 of the same shape, in [-127, 127], and the float32 scales ``(O,)`` = absmax / 127; an all-zero
        channel has scale 1. Zeros stay zeros.

    Raises
    ------
    TypeError
        Not a floating-point tensor.
    ValueError
        No output dimension, or a NaN or an infinity (the message names the channel).
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"quantize_weight takes a floating-point tensor, not {kind}")
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(
            f"quantize_weight takes a non-empty (out, in, ...) weight, not {tuple(weight.shape)}"
        )
    flat = weight.detach().float().flatten(1)
    absmax = flat.abs().amax(1)
    if not bool(torch.isfinite(absmax).all()):
        channel = int((~torch.isfinite(absmax)).nonzero()[0])
        raise ValueError(f"cannot quantise: output channel {channel} of the weight has a NaN or an infinity")
    # A channel so small that absmax / 127 underflows is as good as zero.
    scale = absmax / 127.0
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    quantised = torch.round(flat / scale[:, None]).clamp_(-127, 127).to(torch.int8)
    return quantised.reshape(weight.shape), scale


def dequantize_weight(quantised: Tensor, scale: Tensor) -> Tensor:
    """Give back the float32 weight ``quantised * scale`` of an int8 weight (O, ...) and its scales (O,)."""
    return quantised.float() * scale.reshape(-1, *[1] * (quantised.ndim - 1))


def requant_params(real_multiplier: float, *, max_shift: int = MAX_SHIFT) -> tuple[int, int]:
    """Write a real multiplier as ``mult * 2^-shift``, for ``y = (v * mult + (1 << (shift - 1))) >> shift``.

    Parameters
    ----------
    real_multiplier
        Finite and >= 0. For a matmul: input scale * weight scale / output scale.
    max_shift
        Largest shift the hardware has.

    Returns
    -------
    tuple[int, int]
        ``mult`` in [16384, 32767] and ``shift`` in 1..max_shift, relative error at most 2^-15; ``(0, 1)`` for
        0.

    Raises
    ------
    ValueError
        Negative, not finite, too large (>= 16384) or too small for ``max_shift``.
    """
    mult, shift = requant_array(np.array([real_multiplier], dtype=np.float64), max_shift=max_shift)
    return int(mult[0]), int(shift[0])


def requant_array(
    multipliers: NDArray[np.floating], *, max_shift: int = MAX_SHIFT
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Do `requant_params` for an array: int32 ``mult`` and ``shift`` of the same shape."""
    real = np.asarray(multipliers, dtype=np.float64)
    _check_multipliers(real)
    fraction, exponent = np.frexp(real)  # real = fraction * 2^exponent, fraction in [0.5, 1)
    mult = np.rint(fraction * (MULT_MAX + 1)).astype(np.int32)
    # Rounding up to 32768 would need a 16th bit: the largest mult is as near as half of it with one shift
    # less.
    carried = mult > MULT_MAX
    mult = np.where(carried, MULT_MIN, mult).astype(np.int32)
    shift = (15 - exponent - carried).astype(np.int32)
    zero = real == 0
    mult, shift = np.where(zero, 0, mult).astype(np.int32), np.where(zero, 1, shift).astype(np.int32)
    bad = (shift < 1) | (shift > max_shift)
    if bad.any():
        value, needed = float(real[bad].flat[0]), int(shift[bad].flat[0])
        raise ValueError(
            f"a requantisation multiplier must be in [2^-{max_shift - 14}, 2^14) or 0, not {value!r} (it "
            f"needs shift {needed}, the hardware has 1..{max_shift}): check the scales of the layer's input "
            "and output"
        )
    return mult, shift


def _check_multipliers(real: NDArray[np.float64]) -> None:
    if not np.isfinite(real).all() or (real < 0).any():
        value = float(real[~np.isfinite(real) | (real < 0)].flat[0])
        raise ValueError(f"a requantisation multiplier must be finite and >= 0, not {value!r}")


def requantize(
    values: NDArray[np.integer],
    mult: int | NDArray[np.integer],
    shift: int | NDArray[np.integer],
    *,
    bits: int = 8,
) -> NDArray[np.int64]:
    """Apply ``(v * mult + (1 << (shift - 1))) >> shift`` and saturate to signed ``bits`` bits: int64 out.

    Rounds half towards plus infinity, as the hardware does. ``values`` must fit int32.
    """
    wide = np.asarray(values, dtype=np.int64)
    shift = np.asarray(shift, dtype=np.int64)
    result = (wide * np.asarray(mult, dtype=np.int64) + (np.int64(1) << (shift - 1))) >> shift
    limit = 1 << (bits - 1)
    clipped: NDArray[np.int64] = np.clip(result, -limit, limit - 1)
    return clipped
