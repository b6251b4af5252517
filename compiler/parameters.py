"""Integer parameters of one operator: weights with bias and requantisation, norms, multipliers, biases of scores."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algo.quantize import MULT_MAX, quantize_weight, requant_array
from compiler import ops
from compiler.graph import CompileError, Linear, Norm

__all__ = ["LOG2E_256", "Offset", "finest_for_norm", "multiplier", "norm_parameters", "score_bias", "weight_and_requant"]

MAX_SHIFT = 63
LARGEST = MULT_MAX / 2
"""Largest multiplier there is. With a larger one everything but 0 would saturate: 1 is 16383 with this one, of 32767."""
SMALLEST = 2.0**-48
"""A smaller multiplier makes 0 of any 32-bit value."""
LINEAR = 6.0
"""A norm is linear to 1.4 % if the root of ``eps`` is so many times the largest magnitude."""
LOG2E_256 = 256 / np.log(2)
"""Scores are in units of 2^-8 in the log2 domain."""
Offset = NDArray[np.float64] | float
"""Real values that 0 stands for: one for each channel, or one for all."""


def multiplier(value: float, what: str) -> tuple[int, int]:
    """mult and shift of a multiplier, as `_multipliers` has them."""
    mult, shift = _multipliers(np.array([value]), what)
    return int(mult[0]), int(shift[0])


def _multipliers(values: NDArray[np.float64], what: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """mult and shift of each multiplier: 0 below `SMALLEST`, and no more than `LARGEST`.

    Beyond both are tensors next to nothing beside others: a branch that begins with zero weights, channels that never fire.
    """
    within = np.where(values < SMALLEST, np.where(values < 0, values, 0.0), np.minimum(values, LARGEST))
    try:
        return requant_array(within, max_shift=MAX_SHIFT)
    except ValueError as error:
        raise CompileError(f"{what}: {error}") from error


def weight_and_requant(
    node: Linear,
    *,
    in_scale: float,
    out_scale: float,
    in_offset: Offset,
    mean: NDArray[np.float64],
    added: Offset,
) -> tuple[NDArray[np.int8], ops.Requant]:
    """int8 weight, and bias and requantisation from ``in_scale`` and weight to ``out_scale``.

    The bias also takes up what costs nothing there: ``in_offset`` (in,), the value at 0 of the input's
    channels; ``added`` (out,), what the residual and the output grid want added; and what rounding the weight
    does to the ``mean`` of the input, (in,) or, where outputs see different inputs, (out, in).
    """
    what = node.source or node.name
    try:
        quantised, scales = quantize_weight(node.weight)
    except ValueError as error:
        raise CompileError(f"{what}: {error}") from error
    bias = np.zeros(len(scales)) if node.bias is None else node.bias.detach().double().numpy()
    if not np.isfinite(bias).all():
        raise CompileError(f"{what}: the bias has a NaN or an infinity")
    weight, real = quantised.numpy(), scales.double().numpy()
    bias = (
        bias
        + _sums(node.weight.detach().double().numpy(), mean)
        - _sums(weight * real[:, None], mean - in_offset)
        + added
    )
    # The bias needs room in the int32 sum, next to the products; a channel without weights takes its scale
    # from the bias.
    least = np.abs(bias) / in_scale / (1 << 30)
    real = np.where((weight == 0).all(1), np.maximum(least, out_scale / in_scale * 2.0**-12), real)
    coarse = least > real
    if coarse.any():
        real = np.maximum(real, least)
        again = np.rint(node.weight.detach().double().numpy() / real[:, None]).clip(-127, 127).astype(np.int8)
        weight = np.where(coarse[:, None], again, weight)
    mult, shift = _multipliers(in_scale * real / out_scale, what)
    requant = ops.Requant(
        bias=np.rint(bias / (in_scale * real)).astype(np.int32),
        mult=mult.astype(np.int16),
        shift=shift.astype(np.uint8),
    )
    return np.ascontiguousarray(weight), requant


def _sums(weight: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    return weight @ mean if mean.ndim == 1 else (weight * mean).sum(1)


def norm_parameters(norm: Norm, *, in_scale: float, out_scale: float, offset: Offset = 0.0) -> ops.LayerNorm:
    """Integer parameters of a norm, from a grid of ``in_scale`` to one of ``out_scale`` with ``offset`` at 0.

    ``z`` has 10 fraction bits, so ``gamma / out_scale * 2^-10 = g * 2^-shift``: as large a shift as keeps g
    in 16 bits and beta in 31.
    """
    exact = norm.eps * norm.width**2 / in_scale**2
    eps = round(min(exact, (1 << 32) - 1))
    gamma = norm.gamma.detach().double().numpy() / out_scale / 1024 * (np.sqrt(eps / exact) if exact > 1 << 32 else 1.0)
    beta = (norm.beta.detach().double().numpy() - offset) / out_scale
    shift = np.minimum(_room(gamma, (1 << 15) - 1), _room(beta, (1 << 30) - 1)).clip(1, 30)
    return ops.LayerNorm(
        gamma=np.rint(gamma * 2.0**shift).clip(-(1 << 15), (1 << 15) - 1).astype(np.int16),
        beta=np.rint(beta * 2.0**shift).clip(-(1 << 30), 1 << 30).astype(np.int32),
        shift=shift.astype(np.uint8),
        eps=eps,
        rms=norm.rms,
        groups=norm.groups,
    )


def finest_for_norm(norm: Norm, peak: float) -> float:
    """Smallest scale of a norm's operand whose largest magnitude is ``peak``: ``eps`` fits 32 bits, else values that it keeps
    small would be blown up to a variance of 1; or they are so small beside it that the norm is linear: gamma makes up for it."""
    return float(norm.width * min(np.sqrt(norm.eps), LINEAR * peak) / 2.0**16)


def _room(values: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """Largest power of two that each value can be multiplied with within a limit."""
    magnitude = np.maximum(np.abs(values), 1e-30)
    return np.floor(np.log2(limit / magnitude)).astype(np.int64)


def score_bias(bias: Tensor) -> ops.ScoreBias:
    """Integers for a float bias of scores (-inf: masked): 8 bits if it only masks, else 16 bits in steps of 2 (2^-7 in the
    log2 domain), clipped at +-177."""
    masked = bias.isneginf()
    finite = torch.where(masked, torch.tensor(0.0), bias).double()
    if not bool(finite.any()):
        return ops.ScoreBias(torch.where(masked, -128, 0).to(torch.int8).numpy(), (1 << 15) - 1, 1)
    steps = torch.round(finite * LOG2E_256 / 2).clamp_(-32767, 32767)
    return ops.ScoreBias(torch.where(masked, -32768.0, steps).to(torch.int16).numpy(), 1 << 14, 13)
