"""Pruning at once by calibration data: Wanda and SparseGPT, layer by layer in the order of execution.

Layers that take the same input (queries, keys and values, say) are one stage. The batches run once for each stage, through
the stages before it as they are after pruning, and no further than the stage itself.

Ref: Wanda, M. Sun et al., arXiv 2306.11695: |weight| times the norm of its input over all tokens. SparseGPT, E. Frantar and
D. Alistarh, arXiv 2301.00774: the weights of a group that cost least to remove, by the inverse Hessian of the layer's squared
error; the weights to the right make up for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algo.layers import sparse_layers
from algo.mask import magnitude_mask
from algo.modes import evaluating
from algo.nm import NM

__all__ = ["Calibration", "prune_calibrated", "run_batch"]

Calibration: TypeAlias = Iterable[Any]
"""Batches, each what the model takes: a tensor, a tuple of arguments or a dict of them."""

_DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, added to it (SparseGPT's ``percdamp``)."""


class _Enough(Exception):  # noqa: N818  (control flow, never seen outside)
    """Every layer of the stage has seen its input."""


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@torch.no_grad()
def prune_calibrated(
    model: nn.Module, patterns: Mapping[str, NM], *, method: Literal["wanda", "sparsegpt"], calibration: Calibration
) -> None:
    """Zero weights of the named layers, in place; the model is in its own mode (training or not) afterwards.

    Raises
    ------
    ValueError
        No batch, a layer that no batch reaches, or a layer whose weights cannot be followed (torch's attention modules, whose
        input projection has no input of its own).
    """
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration has no batches")
    layers = {name: layer for name, layer in sparse_layers(model) if name in patterns}
    for name, layer in layers.items():
        if isinstance(layer, nn.MultiheadAttention):
            raise ValueError(f"layer {name!r} is a torch.nn.MultiheadAttention: its projections are computed inside and cannot "
                             f"be calibrated; prune it by another method, or leave it out ({{{name!r}: 'dense', ...}})")
    with evaluating(model):
        stages, repeated = _stages(model, layers, batches[0])
        for stage in stages:
            these = {name: layers[name] for name in stage}
            statistics = _gather(model, these, batches, repeated=repeated, gram=method == "sparsegpt")
            for name in stage:
                _prune_layer(layers[name], patterns[name], statistics[name], method)


def _stages(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> tuple[list[list[str]], set[str]]:
    """Layers by order of execution, those that take the same tensor one after another together; and those that run again."""
    stages: list[list[str]] = []
    seen: set[str] = set()
    repeated: set[str] = set()
    last: list[Tensor] = []

    def note(name: str, x: Tensor) -> None:
        if name in seen:
            repeated.add(name)
            return
        seen.add(name)
        if last and last[0] is x:
            stages[-1].append(name)
        else:
            stages.append([name])
        last[:] = [x]

    with _watched(layers, note):
        run_batch(model, batch)
    missed = [name for name in layers if name not in seen]
    if missed:
        raise ValueError(f"the calibration data never reach layer {missed[0]!r}: leave it out of the pattern")
    return stages, repeated


@contextmanager
def _watched(layers: Mapping[str, nn.Module], note: Callable[[str, Tensor], None]) -> Any:
    """Call ``note(name, input)`` whenever a layer runs."""
    handles = [layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gather(
    model: nn.Module, stage: Mapping[str, nn.Module], batches: Sequence[Any], *, repeated: set[str], gram: bool
) -> dict[str, Tensor]:
    """Sum over all tokens of x xᵀ ``(groups, K, K)``, or of its diagonal ``(groups, K)``, for each layer; float64 sums of
    float32 products. Layers of a stage take the same input and so share one sum if they read it alike."""
    sums: dict[str, Tensor] = {}
    left: set[str] = set()

    def note(name: str, x: Tensor) -> None:
        columns = _columns(stage[name], x)
        found = columns.transpose(1, 2) @ columns if gram else columns.square().sum(1)
        sums[name] = sums[name] + found if name in sums else found.double()
        left.discard(name)
        # a pass with a layer that runs several times is followed to its end
        if not left and not repeated & stage.keys():
            raise _Enough

    with _watched(stage, note):
        for batch in batches:
            left = set(stage)
            try:
                run_batch(model, batch)
            except _Enough:
                pass
    return sums


def _columns(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as ``(groups, tokens, K)``, K in the order of `_matrix`."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).float()
    conv = cast("nn.Conv1d | nn.Conv2d", layer)
    around = [pad for pad in reversed(_padding(conv)) for _ in range(2)]
    x = F.pad(x.float(), around, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    if x.ndim == 3:  # a picture of height 1
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    patches = F.unfold(x, kernel, dilation=dilation, stride=stride)  # (B, I * kh * kw, L)
    batch, _, places = patches.shape
    groups, inner = conv.groups, x.shape[1] // conv.groups
    # (B, g, I/g, pixels, L) -> (g, B, L, pixels, I/g): input channels last, as in the weight
    return patches.reshape(batch, groups, inner, -1, places).permute(1, 0, 4, 3, 2).reshape(groups, batch * places, -1)


def _padding(layer: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if isinstance(layer.padding, str):
        if any((k - 1) * d % 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)):
            raise ValueError("a convolution with padding='same' and an even kernel pads unevenly: it cannot be calibrated")
        return tuple((k - 1) * d // 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    return tuple(layer.padding)


def _matrix(layer: nn.Module) -> Tensor:
    """The weight as ``(groups, O / groups, pixels, I / groups)``, a copy."""
    weight = cast(Tensor, layer.weight).detach().float()
    weight = weight[:, None] if weight.ndim == 2 else weight.flatten(2).transpose(1, 2)
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, -1, *weight.shape[1:]).clone()


def _prune_layer(layer: nn.Module, pattern: NM, statistics: Tensor, method: str) -> None:
    matrix = _matrix(layer)
    groups, outputs, pixels, inner = matrix.shape
    if method == "wanda":
        norms = statistics.sqrt().float().reshape(groups, 1, pixels, inner)
        # per row of one pixel, as the mask groups them
        mask = magnitude_mask((matrix.abs() * norms).reshape(-1, inner), pattern).reshape(matrix.shape)
        matrix = matrix * mask
    else:
        flat = matrix.reshape(groups, outputs, pixels * inner)
        bounds = [(p * inner + start, p * inner + min(start + pattern.m, inner))
                  for p in range(pixels) for start in range(0, inner, pattern.m)]
        pruned = [_sparsegpt(part, gram, bounds, pattern) for part, gram in zip(flat, statistics, strict=True)]
        matrix = torch.stack(pruned).reshape(matrix.shape)
    weight = cast(Tensor, layer.weight)
    rows = matrix.reshape(groups * outputs, pixels, inner)
    weight.copy_(rows[:, 0] if weight.ndim == 2 else rows.transpose(1, 2).reshape(weight.shape))


def _sparsegpt(weight: Tensor, gram: Tensor, bounds: Sequence[tuple[int, int]], pattern: NM, block: int = 128) -> Tensor:
    """Prune ``(O, K)`` given ``x xᵀ``; ``bounds`` are the groups' column ranges."""
    weight, hessian = weight.clone(), gram.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    for blocks in _blocks(bounds, block):
        start, stop = blocks[0][0], blocks[-1][1]
        errors = torch.zeros_like(weight[:, start:stop])
        for low, high in blocks:
            score = (weight[:, low:high] / factor.diagonal()[low:high]).square()
            keep = magnitude_mask(score, pattern)
            for column in range(low, high):
                kept = weight[:, column] * keep[:, column - low]
                error = (weight[:, column] - kept) / factor[column, column]
                weight[:, column:stop] -= error[:, None] * factor[column, column:stop]
                weight[:, column] = kept
                errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight


def _blocks(bounds: Sequence[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Groups, about ``size`` columns together."""
    found: list[list[tuple[int, int]]] = []
    for low, high in bounds:
        if not found or high - found[-1][0][0] > size:
            found.append([])
        found[-1].append((low, high))
    return found
