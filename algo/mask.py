"""Magnitude masks: which N weights of each group of M stay.

Groups lie along the dimension that a matrix multiplication sums over:

- Linear weight ``(O, I)``: along ``I``;
- Conv1d and Conv2d weights ``(O, I, k)`` and ``(O, I, kh, kw)``: along the input channels (of one group of a grouped
  convolution), in NHWC order, that is along the last dimension of ``(O, kh, kw, I)``.

A dimension that is not a multiple of M ends in a shorter remainder group; see `NM.kept` for what it keeps.

Ref: A. Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, arXiv
2102.04010; the grouping is that of the authors' ``Sparse_NHWC``, except that groups never straddle two
pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algo.nm import NM

__all__ = ["from_rows", "group_minimum", "magnitude_mask", "magnitude_threshold", "rows"]

PIECE = 1 << 20
"""Weights whose mask is computed at a time on the CPU."""


def rows(weight: Tensor) -> Tensor:
    """View a weight as a matrix whose rows are grouped along the last dimension.

    Linear ``(O, I)`` stays; ``(O, I, k)`` becomes ``(O, k, I)``, ``(O, I, kh, kw)`` becomes ``(O, kh * kw, I)``: channels
    last.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"a weight must be a torch.Tensor, not {type(weight).__name__}")
    if weight.ndim == 2:
        return weight
    if weight.ndim in (3, 4):
        return weight.flatten(2).transpose(1, 2)
    raise ValueError(
        "a weight must be (out, in), (out, in, width) or (out, in, height, width) to have N:M groups, "
        f"not {tuple(weight.shape)}"
    )


def from_rows(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Undo `rows`: give ``matrix`` the weight's own ``shape`` back."""
    if len(shape) == 2:
        return matrix
    return matrix.transpose(1, 2).reshape(shape)


@torch.no_grad()
def magnitude_mask(weight: Tensor, pattern: NM) -> Tensor:
    """Mark the ``N`` largest absolute values of each group of ``M``.

    Parameters
    ----------
    weight
        ``(O, I)``, ``(O, I, k)`` or ``(O, I, kh, kw)``, floating point, without NaN. Any score will do: what counts is its
        magnitude.
    pattern
        The N:M pattern.

    Returns
    -------
    Tensor
        bool, contiguous, the weight's shape; True = keep. Of equal magnitudes the lower index stays, so the
        mask is a function of the values alone, whatever the machine and the number of threads.
    """
    matrix = rows(weight)
    if pattern.is_dense:
        return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    width = matrix.shape[-1]
    full = width - width % pattern.m
    parts = [_group_mask(matrix[..., :full], pattern.m, pattern.n)] if full else []
    if full < width:
        tail = width - full
        parts.append(_group_mask(matrix[..., full:], tail, pattern.kept(tail)))
    mask = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return from_rows(mask, weight.shape).contiguous()


@torch.no_grad()
def magnitude_threshold(weight: Tensor, mask: Tensor, pattern: NM) -> Tensor:
    """The largest magnitude that ``mask`` prunes in the group of each weight, of the weight's shape; 0 where none is."""
    return -group_minimum(-weight.abs().masked_fill(mask, 0), pattern)


@torch.no_grad()
def group_minimum(values: Tensor, pattern: NM) -> Tensor:
    """The smallest value in the group of each element, of the same shape."""
    matrix = rows(values)
    width = matrix.shape[-1]
    full = width - width % pattern.m
    parts = [matrix[..., start:stop].unflatten(-1, (-1, size)) for start, stop, size in (
        (0, full, pattern.m), (full, width, width - full)) if start < stop]
    least = [part.amin(-1, keepdim=True).expand(part.shape).flatten(-2) for part in parts]
    return from_rows(torch.cat(least, dim=-1), values.shape)


def _group_mask(matrix: Tensor, m: int, n: int) -> Tensor:
    """Mask of ``matrix`` (..., k * m) that keeps ``n`` of each ``m``."""
    if n == m:
        return torch.ones(matrix.shape, dtype=torch.bool, device=matrix.device)
    groups = matrix.reshape(-1, m)
    # On the CPU piece by piece, so that the work stays in the cache: 1.3x at M = 4, 1.9x at M = 16.
    size = len(groups) if groups.is_cuda else max(1, PIECE // m)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=groups.device)
    for start in range(0, len(groups), size):
        _keep_by_pairs(groups[start : start + size], n, mask[start : start + size])
    return mask.view(matrix.shape)


def _keep_by_pairs(groups: Tensor, n: int, mask: Tensor) -> None:
    """Keep an element when fewer than ``n`` others of its group beat it.

    Works on columns, so that each comparison runs over contiguous memory: faster than a sort up to M = 32.
    """
    columns = torch.abs(groups.t(), out=groups.new_empty(groups.shape[::-1]))
    beaten = torch.zeros(columns.shape, dtype=torch.int8, device=groups.device)
    for low in range(len(columns) - 1):
        # One comparison serves both of a pair; equal: the lower index wins.
        wins = torch.ge(columns[low], columns[low + 1 :]).view(torch.int8)
        beaten[low + 1 :] += wins
        beaten[low] += len(wins) - wins.sum(0, dtype=torch.int8)
    torch.lt(beaten.t(), n, out=mask)
