"""Operators that are written in others before anything else happens: einsum, recurrent layers, gated linear units, norms over
groups of channels, and what libraries define themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.export import ExportedProgram
from torch.nn import functional as F

__all__ = ["decompositions", "mixed_convolution"]

aten = torch.ops.aten
_COMPOSITE = "CompositeImplicitAutograd"

MAX_STEPS = 128
"""Steps of recurrent layers, each a product with the state, that are written out; with more, the layers run on the host."""
_CELLS = (aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
_RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def decompositions(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """For `ExportedProgram.run_decompositions`: einsum as products of matrices, a convolution with mixed kernels as one with
    constant weights, recurrent layers step by step, and any other operator of a library that is defined by torch's own."""
    table: dict[Any, Callable[..., Any]] = {aten.einsum.default: _einsum, aten.glu.default: _gated}
    table |= {target: _composite(target) for target in _CELLS}
    if _recurrent_steps(program) <= MAX_STEPS:
        table |= get_decompositions(_RECURRENT)
    for node in program.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace == "aten":
            continue
        if target.name() == "nmforge::dynamic_conv2d":
            table[target] = mixed_convolution
        elif torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), _COMPOSITE):
            table[target] = _composite(target)
    return table


def _recurrent_steps(program: ExportedProgram) -> int:
    """Steps of all recurrent layers, in all directions."""
    steps = 0
    for node in program.graph.nodes:
        if node.target in _RECURRENT:
            *_, layers, _, _, both, batch_first = node.args
            steps += node.args[0].meta["val"].shape[int(batch_first)] * layers * (1 + int(both))
    return steps


def _gated(x: Tensor, dim: int = -1) -> Tensor:
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


def _composite(target: torch._ops.OpOverload) -> Callable[..., Any]:
    return lambda *args, **kwargs: target._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def _einsum(equation: str, operands: list[Tensor], path: list[int] | None = None) -> Any:
    # torch's own kernel; `decompose` would come back here
    return aten.einsum.default._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, equation, operands, path=path)


def mixed_convolution(
    input: Tensor, weight: Tensor, channel: Tensor, filters: Tensor | None, position: Tensor | None, kernel: Tensor | None,
    kernels: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """Omni-dimensional dynamic convolution (C. Li et al., arXiv 2209.07947, eq. 2) with weights that do not depend on data: the
    attentions of input channels and positions scale the windows, every kernel multiplies them, those of kernels and output
    channels scale the results, which are added.

    Parameters
    ----------
    input
        (B, C, H, W).
    weight
        (kernels * outputs, C / groups, kh, kw).
    channel, filters, position, kernel
        Attentions (B, C, 1, 1), (B, outputs, 1, 1), (B, kh * kw) and (B, kernels); None: all ones.
    """
    batch, inputs = input.shape[:2]
    high, wide = weight.shape[2:]
    windows = _windows(input, (high, wide), stride, padding, dilation)
    scale = channel.reshape(batch, 1, inputs)
    if position is not None:
        scale = scale * position.reshape(batch, high * wide, 1)
    else:
        scale = scale.expand(batch, high * wide, inputs)
    windows = windows * scale.reshape(batch, -1, 1, 1)
    if groups > 1:  # the channels of a group side by side
        windows = windows.unflatten(1, (high * wide, groups, -1)).transpose(1, 2).flatten(1, 3)
    rows = weight.permute(0, 2, 3, 1).flatten(1).unflatten(0, (kernels, groups, -1)).transpose(0, 1)
    made = F.conv2d(windows, rows.reshape(-1, rows.shape[-1], 1, 1), groups=groups)  # (group, kernel, output of the group)
    outputs = len(weight) // kernels
    if kernel is not None and kernels > 1:
        own = kernel.reshape(batch, 1, kernels, 1).expand(batch, groups, kernels, outputs // groups)
        made = made * own.reshape(batch, -1, 1, 1)
        parts = made.unflatten(1, (groups, kernels, -1)).unbind(2)
        made = sum(part.flatten(1, 2) for part in parts[1:]) + parts[0].flatten(1, 2)  # type: ignore[assignment]
    return made if filters is None else made * filters


def _windows(x: Tensor, kernel: tuple[int, int], stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """(B, positions * C, height, width) of the result, position by position."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    spans = [
        [slice(k * dilation[i], x.shape[2 + i] - (size - 1 - k) * dilation[i], stride[i]) for k in range(size)]
        for i, size in enumerate(kernel)
    ]
    return torch.cat([x[:, :, down, across] for down in spans[0] for across in spans[1]], 1)
