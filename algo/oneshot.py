"""Pruning at once by calibration data: Wanda and SparseGPT, layer by layer in the order of execution.

Layers that take the same input (queries, keys and values, say) are one stage. The batches run once for each stage, through
the stages before it as they are after pruning, and no further than the stage itself.

Ref: Wanda, M. Sun et al., arXiv 2306.11695: |weight| times the norm of its input over all tokens. SparseGPT, E. Frantar and
D. Alistarh, arXiv 2301.00774: the weights of a group that cost least to remove, by the inverse Hessian of the layer's squared
error; the weights to the right make up for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from algo.layers import sparse_layers, weight_names
from algo.mask import magnitude_mask
from algo.modes import evaluating, plain_attention
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


@dataclass(frozen=True, eq=False)
class _Part:
    """A weight, or rows of it, that meets one input: a layer's, or queries, keys or values of torch's attention."""

    layer: nn.Module
    weight: Tensor
    pattern: NM


@torch.no_grad()
def prune_calibrated(
    model: nn.Module, patterns: Mapping[str, NM], *, method: Literal["wanda", "sparsegpt"], calibration: Calibration
) -> None:
    """Zero weights of the named layers, in place; the model is in its own mode (training or not) afterwards.

    Raises
    ------
    ValueError
        No batch, or a layer that no batch reaches.
    """
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration has no batches")
    parts: dict[str, _Part] = {}
    for name, layer in sparse_layers(model):
        if name in patterns:
            weights = [getattr(layer, weight).detach() for weight in weight_names(layer)]
            if isinstance(layer, nn.MultiheadAttention):
                weights = weights if len(weights) == 3 else list(weights[0].chunk(3))
            parts |= {f"{name}.{'qkv'[i]}" if len(weights) > 1 else name: _Part(layer, weight, patterns[name])
                      for i, weight in enumerate(weights)}
    with evaluating(model), plain_attention():
        stages, repeated = _stages(model, parts, batches[0])
        for stage in stages:
            these = {name: parts[name] for name in stage}
            statistics = _gather(model, these, batches, repeated=repeated, gram=method == "sparsegpt")
            for name in stage:
                _prune_part(parts[name], statistics[name], method)


def _stages(model: nn.Module, parts: Mapping[str, _Part], batch: Any) -> tuple[list[list[str]], set[str]]:
    """Parts by order of execution, those that take the same tensor one after another together; and those that run again."""
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

    with _watched(model, parts, note):
        run_batch(model, batch)
    missed = [name for name in parts if name not in seen]
    if missed:
        raise ValueError(f"the calibration data never reach layer {missed[0]!r}: leave it out of the pattern")
    return stages, repeated


@contextmanager
def _watched(model: nn.Module, parts: Mapping[str, _Part], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``note(name, input)`` whenever a part's weight is used."""
    # Torch's attention multiplies with weights of its parts without calling them: there the products are watched.
    inside = {id(module) for attention in model.modules() if isinstance(attention, nn.MultiheadAttention)
              for module in (attention, attention.out_proj)}
    products = {name: part.weight for name, part in parts.items() if id(part.layer) in inside}
    handles = [part.layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
               for name, part in parts.items() if name not in products]
    try:
        with _Products(products, note) if products else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Products(TorchDispatchMode):
    """Watch matrix products for weights, by their addresses; one product may use the rows of several."""

    def __init__(self, weights: Mapping[str, Tensor], note: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.weights, self.note = weights, note

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            x, transposed = args[-2:]
            first = transposed.data_ptr()
            last = first + transposed.shape[-1] * x.shape[-1] * x.element_size()
            for name, weight in self.weights.items():
                if first <= weight.data_ptr() < last and weight.shape[1] == x.shape[-1]:
                    self.note(name, x)
        return func(*args, **(kwargs or {}))


def _gather(
    model: nn.Module, stage: Mapping[str, _Part], batches: Sequence[Any], *, repeated: set[str], gram: bool
) -> dict[str, Tensor]:
    """Sum over all tokens of x xᵀ ``(groups, K, K)``, or of its diagonal ``(groups, K)``, for each part; float64 sums of
    float32 products."""
    sums: dict[str, Tensor] = {}
    left: set[str] = set()

    def note(name: str, x: Tensor) -> None:
        columns = _columns(stage[name].layer, x)
        found = columns.transpose(1, 2) @ columns if gram else columns.square().sum(1)
        sums[name] = sums[name] + found if name in sums else found.double()
        left.discard(name)
        # a pass with a layer that runs several times is followed to its end
        if not left and not repeated & stage.keys():
            raise _Enough

    with _watched(model, stage, note):
        for batch in batches:
            left = set(stage)
            try:
                run_batch(model, batch)
            except _Enough:
                pass
    return sums


def _columns(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as ``(groups, tokens, K)``, K in the order of `_matrix`."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1]).float()
    around = [pad for pad in reversed(_padding(layer)) for _ in range(2)]
    x = F.pad(x.float(), around, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if x.ndim == 3:  # a picture of height 1
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    patches = F.unfold(x, kernel, dilation=dilation, stride=stride)  # (B, I * kh * kw, L)
    batch, _, places = patches.shape
    groups, inner = layer.groups, x.shape[1] // layer.groups
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


def _matrix(weight: Tensor, groups: int) -> Tensor:
    """The weight as ``(groups, O / groups, pixels, I / groups)``, a copy."""
    weight = weight.float()
    weight = weight[:, None] if weight.ndim == 2 else weight.flatten(2).transpose(1, 2)
    return weight.reshape(groups, -1, *weight.shape[1:]).clone()


def _prune_part(part: _Part, statistics: Tensor, method: str) -> None:
    weight, pattern = part.weight, part.pattern
    matrix = _matrix(weight, getattr(part.layer, "groups", 1))
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
