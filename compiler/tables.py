"""Tables of functions: 256 int8 entries, and the grid of their input."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiler.graph import CompileError, Function

__all__ = ["activation_table", "table_input"]


def activation_table(
    function: Function, *, in_scale: float, out_scale: float, in_offset: float = 0.0, out_offset: float = 0.0
) -> NDArray[np.int8]:
    """256 entries for q = -128..127: ``round((f(q * in_scale + in_offset) - out_offset) / out_scale)``
    clipped to int8.

    Exact to half a step where it does not clip.
    """
    x = torch.arange(-128, 128, dtype=torch.float64) * in_scale + in_offset
    y = (function.apply(x) - out_offset) / out_scale
    if not bool(torch.isfinite(y).all()):
        raise CompileError(
            f"function {function.name!r} is not finite everywhere on {float(x[0]):.4g}..{float(x[-1]):.4g}"
        )
    return torch.round(y).clamp(-128, 127).to(torch.int8).numpy()


def table_input(
    function: Function, sample: Tensor, *, out_scale: float, out_offset: float, symmetric: bool
) -> tuple[float, float]:
    """Scale and offset of a table's input with the least squared error of the result on a sample."""
    flat = sample.flatten().double()
    x = torch.cat([flat[:: max(1, len(flat) // 16384)], flat.aminmax().min[None], flat.aminmax().max[None]])
    exact, low, high = function.apply(x) - out_offset, float(x.min()), float(x.max())
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    if not high > low:
        return 1.0, 0.0
    best, least = (1.0, 0.0), np.inf
    for top in np.linspace(0.3, 1.0, 29):
        for bottom in (-top,) if symmetric else np.linspace(0.1, 1.0, 13):
            first = min(low, 0.0) * abs(bottom) + max(low, 0.0)
            scale = (max(high, 0.0) * top + min(high, 0.0) - first) / 255
            offset = 0.0 if symmetric else first + 128 * scale
            table = activation_table(
                function, in_scale=scale, in_offset=offset, out_scale=out_scale, out_offset=out_offset
            )
            index = torch.round((x - offset) / scale).clamp_(-128, 127).long() + 128
            error = float((torch.from_numpy(table * out_scale)[index] - exact).square().mean())
            if error <= least:
                best, least = (scale, offset), error
    return best
