"""Import of operators that make larger images: transposed convolutions and bilinear interpolation by whole factors.

Every s-th pixel of such a result is an ordinary convolution of the input with every s-th weight: a *phase*. The phases are
computed one by one and interleaved as rows are moved. Nearest neighbours and pixel shuffles are moves alone.
"""

from __future__ import annotations

from itertools import product
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, fx

from compiler.frontend import _Importer, _imports
from compiler.graph import Constant, Move, Node, Operand
from compiler.image_imports import as_rows, convolve, image_size, pair
from compiler.layout import Layout

__all__: list[str] = []

aten = torch.ops.aten
Pair = tuple[int, int]


def _interleaved(
    importer: _Importer, node: fx.Node, phases: list[Node], factor: Pair, small: Pair, shape: tuple[int, ...]
) -> Node:
    """Phases (batch, pixels of ``small``, channels), line by line of the factor, as an image of ``shape`` cut off at the end."""
    batch, _, channels = phases[0].shape
    rows = prod(factor) * prod(small)
    if len(phases) == 1:
        joined = phases[0]
    else:
        joined = importer.make(
            Move, node, tuple(phase.name for phase in phases), name=f"{node.name}.phases", shape=(batch, rows, channels),
            target=aten.cat.default, args=([Operand(i) for i in range(len(phases))], 1), kwargs={},
        )  # fmt: skip
    layout = Layout.contiguous((batch, *factor, *small, channels)).permute((0, 5, 3, 1, 4, 2))
    whole = (batch, channels, small[0] * factor[0], small[1] * factor[1])
    image = importer.view(node, joined, layout.reshape(whole), f"{node.name}.image")
    for dim, length in zip((2, 3), image_size(shape), strict=True):
        if image.shape[dim] != length:
            image = importer.make(
                Move, node, (image.name,), name=f"{node.name}.cut{dim}", target=aten.slice.Tensor, kwargs={},
                args=(Operand(0), dim, 0, length), shape=(*image.shape[:dim], length, *image.shape[dim + 1 :]),
            )  # fmt: skip
    return importer.view(node, image, Layout.contiguous(image.shape).reshape(shape), f"{node.name}.result")


# -- transposed convolutions ---------------------------------------------------------------------------------


def _taps(phase: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[list[int], int, int]:
    """Weights of a phase in the order of the pixels that they see, the distance of those pixels, and that of the first from
    the phase's own: output pixel ``stride * j + phase`` sees pixel ``j + (phase + padding - k * dilation) / stride``
    with weight k."""
    taps = [k for k in range(kernel) if (phase + padding - k * dilation) % stride == 0][::-1]
    first = (phase + padding - taps[0] * dilation) // stride if taps else 0
    return taps, dilation // gcd(stride, dilation), first


@_imports(aten.conv_transpose2d.input, aten.conv_transpose1d.default)
def _conv_transpose(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, weight, bias, groups = a["input"], a["weight"], a["bias"], a["groups"]
    if isinstance(x, Constant) or not isinstance(weight, Constant) or not isinstance(bias, Constant | None):
        return None
    flat, shape = len(x.shape) == 3, tuple(node.meta["val"].shape)
    if len(x.shape) not in (3, 4):
        return None
    stride, padding, dilation = (
        (other, pair(a[name])[1]) if flat else pair(a[name]) for name, other in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    kernel = _turned(weight.value[:, :, None] if flat else weight.value, groups)
    out, value = image_size(shape), None if bias is None else bias.value
    small: Pair = (-(-out[0] // stride[0]), -(-out[1] // stride[1]))
    rows, path, phases = as_rows(importer, node, x), importer.path(node), []
    for phase in product(range(stride[0]), range(stride[1])):
        found = [_taps(phase[i], kernel.shape[2 + i], stride[i], padding[i], dilation[i]) for i in range(2)]
        (down, step_y, top), (across, step_x, left) = found
        part = kernel[:, :, down][:, :, :, across] if down and across else torch.zeros(*kernel.shape[:2], 1, 1)
        phases.append(convolve(
            importer, node, rows, part, value, size=image_size(x.shape), out_size=small, padding=(-top, -left),
            dilation=(step_y, step_x), groups=groups, path=path,
        ))  # fmt: skip
    return _interleaved(importer, node, phases, stride, small, shape)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight (in, out / groups, ...) as (out, in / groups, ...)."""
    parts = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return parts.flatten(0, 1)


# -- bilinear interpolation ----------------------------------------------------------------------------------


@_imports(aten.upsample_bilinear2d.vec, aten.upsample_linear1d.vec)
def _bilinear(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, shape = a["input"], tuple(node.meta["val"].shape)
    if isinstance(x, Constant) or a["align_corners"] or len(x.shape) not in (3, 4):
        return None
    size, out = image_size(x.shape), image_size(shape)
    factor = (out[0] // size[0], out[1] // size[1])
    given = a["scale_factors"]
    exact = given is None or all(float(scale) == n / m for scale, n, m in zip(given, shape[2:], x.shape[2:], strict=True))
    if (factor[0] * size[0], factor[1] * size[1]) != out or min(factor) < 1 or not exact:
        return None
    padded = _with_edges(importer, node, as_rows(importer, node, x), size)
    phases = [
        _blended(importer, node, padded, size, [(i + 0.5) / s - 0.5 for i, s in zip(phase, factor, strict=True)])
        for phase in product(range(factor[0]), range(factor[1]))
    ]
    return _interleaved(importer, node, phases, factor, size, shape)


def _with_edges(importer: _Importer, node: fx.Node, rows: Node, size: Pair) -> Node:
    """An image (batch, pixels, channels) with its outermost pixels once more around it."""
    batch, pixels, channels = rows.shape
    index = torch.arange(batch * pixels, dtype=torch.float64).reshape(batch, 1, *size)
    around = torch.nn.functional.pad(index, (1, 1, 1, 1), mode="replicate").long().flatten()
    shape = (batch, (size[0] + 2) * (size[1] + 2), channels)
    return importer.make(
        Move, node, (rows.name,), name=f"{node.name}.edges", shape=shape, target=_chosen, args=(Operand(0), around, shape),
        kwargs={},
    )  # fmt: skip


def _chosen(x: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(-1, x.shape[-1])[rows].reshape(shape)


def _blended(importer: _Importer, node: fx.Node, padded: Node, size: Pair, at: list[float]) -> Node:
    """Pixels between those of an image with edges, at a distance ``at`` (vertical, horizontal) in (-1/2, 1/2) from each."""
    lines = [torch.tensor([-d, 1 + d]) if d < 0 else torch.tensor([1 - d, d]) for d in at]
    weight = torch.outer(*lines).expand(padded.shape[-1], 1, 2, 2).clone()
    skip = [0 if d < 0 else 1 for d in at]
    return convolve(
        importer, node, padded, weight, None, size=(size[0] + 2, size[1] + 2), out_size=size, padding=(-skip[0], -skip[1]),
        groups=padded.shape[-1], name=f"{node.name}.blend",
    )  # fmt: skip
