"""Operators that are written in others before anything else happens: einsum, recurrent layers, gated linear units, norms over
groups of channels, and what libraries define themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
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
FEW = 4
"""Parts that are added for their mean."""
_CELLS = (aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
_RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def decompositions(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """For `ExportedProgram.run_decompositions`: einsum as products of matrices, a convolution with mixed kernels as one with
    constant weights, recurrent layers step by step, and any other operator of a library that is defined by torch's own."""
    table: dict[Any, Callable[..., Any]] = {aten.einsum.default: _einsum, aten.glu.default: _gated, aten.mean.dim: _mean_of_few}
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


def _mean_of_few(x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """A mean over one of the outer dimensions as a sum: its parts lie apart, and need not be brought together."""
    place = dim[0] % x.ndim if dim and len(dim) == 1 else x.ndim
    if place > x.ndim - 3 or x.shape[place] > FEW or dtype is not None:
        return NotImplemented
    total = reduce(torch.add, x.unbind(place)) * (1 / x.shape[place])
    return total.unsqueeze(place) if keepdim else total


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
    outputs, positions = len(weight) // kernels, weight.shape[2] * weight.shape[3]
    seen = _seen(input, tuple(weight.shape[2:]), stride, padding, dilation)
    scale = channel.reshape(batch, 1, inputs)
    if position is not None:
        scale = scale * position.reshape(batch, positions, 1)
    if groups == inputs == outputs:
        return _depthwise(seen, weight, scale, filters, kernel, kernels)
    # the positions and channels of a group side by side
    windows = torch.cat([part for group in zip(*(x.chunk(groups, 1) for x in seen), strict=True) for part in group], 1)
    scale = scale.expand(batch, positions, inputs).unflatten(2, (groups, -1)).transpose(1, 2)
    windows = windows * scale.reshape(batch, -1, 1, 1)
    rows, terms = weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None], []
    for n in range(kernels):
        term = F.conv2d(windows, rows[n * outputs : (n + 1) * outputs], groups=groups)
        own = None if kernel is None else kernel[:, n].reshape(batch, 1, 1, 1)
        factor = own if filters is None else filters if own is None else own * filters
        terms.append(term if factor is None else term * factor)
    return reduce(torch.add, terms)


def _depthwise(
    seen: list[Tensor], weight: Tensor, scale: Tensor, filters: Tensor | None, kernel: Tensor | None, kernels: int
) -> Tensor:
    """A weight for each position and channel: those of the kernels are mixed, not what comes of them."""
    batch, inputs = seen[0].shape[:2]
    rows = weight.reshape(kernels, inputs, -1).transpose(1, 2).flatten(1)  # (kernel, position * channel)
    mixed = rows.sum(0, keepdim=True) if kernel is None else F.linear(kernel, rows.t())
    mixed = mixed.reshape(-1, len(seen), inputs) * scale
    terms = [x * mixed[:, n].reshape(batch, inputs, 1, 1) for n, x in enumerate(seen)]
    made = reduce(torch.add, terms)
    return made if filters is None else made * filters


def _seen(x: Tensor, kernel: tuple[int, ...], stride: list[int], padding: list[int], dilation: list[int]) -> list[Tensor]:
    """What each position of the kernel sees: (B, C, height, width) of the result."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    spans = [
        [slice(k * dilation[i], x.shape[2 + i] - (size - 1 - k) * dilation[i], stride[i]) for k in range(size)]
        for i, size in enumerate(kernel)
    ]
    return [x[:, :, down, across] for down in spans[0] for across in spans[1]]
