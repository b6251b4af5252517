"""Import of operators on images: convolutions, poolings and normalisations by channel.

In torch an image is (batch, channels, height, width), in the graph rows of channels, (batch, pixels, channels), like any other
tensor. Every operator here is imported between two `View`s that turn one into the other; the passes cancel them. Average
poolings are depth-wise convolutions with constant weights, a batch normalisation goes into the convolution before it or
becomes a depth-wise one of a single position, and a convolution that sees one pixel is a Linear.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from compiler.frontend import _Importer, _imports
from compiler.graph import Constant, Convolution, Linear, MaxPool, Node, View
from compiler.layout import Layout

__all__: list[str] = []

aten = torch.ops.aten
Pair = tuple[int, int]


def _pair(value: Any) -> Pair:
    items = [value] if isinstance(value, int) else list(value)
    return (int(items[0]), int(items[-1]))


def _rows(importer: _Importer, node: fx.Node, x: Node) -> Node:
    """An image (batch, channels, height, width) as (batch, pixels, channels)."""
    batch, channels, high, wide = x.shape
    layout = Layout.contiguous(x.shape).permute((0, 2, 3, 1)).reshape((batch, high * wide, channels))
    return importer.view(node, x, layout, f"{node.name}.rows")


def _image(importer: _Importer, node: fx.Node, rows: Node, shape: tuple[int, ...]) -> Node:
    """The inverse of `_rows`."""
    batch, channels, high, wide = shape
    layout = Layout.contiguous((batch, high, wide, channels)).permute((0, 3, 1, 2))
    return importer.view(node, rows, layout, f"{node.name}.image")


def _convolve(
    importer: _Importer, node: fx.Node, x: Node, weight: Tensor, bias: Tensor | None, *,
    stride: Pair, padding: Pair, dilation: Pair = (1, 1), groups: int = 1, path: str = "", pattern: Any = None,
) -> Node:  # fmt: skip
    """A convolution of an image; the value's image."""
    shape = tuple(node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else node.meta["val"][0].shape)
    rows, name = _rows(importer, node, x), path or node.name
    fields: dict[str, Any] = {
        "name": name, "source": path or importer.path(node), "weight": weight, "bias": bias, "pattern": pattern,
        "shape": (shape[0], shape[2] * shape[3], shape[1]),
    }  # fmt: skip
    if weight.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0) and groups == 1:
        made = importer.make(Linear, node, (rows.name,), **{**fields, "weight": weight[:, :, 0, 0]})
    else:
        made = importer.make(
            Convolution, node, (rows.name,), size=tuple(x.shape[2:]), out_size=shape[2:], stride=stride, padding=padding,
            dilation=dilation, groups=groups, **fields,
        )  # fmt: skip
    return _image(importer, node, made, shape)


@_imports(aten.conv2d.default, aten.convolution.default)
def _conv2d(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if isinstance(x, Constant) or not isinstance(weight, Constant) or not isinstance(bias, Constant | None):
        return None
    if len(x.shape) != 4 or a.get("transposed") or isinstance(a["padding"], str):
        return None
    path, pattern = importer.pattern(weight)
    return _convolve(
        importer, node, x, weight.value, None if bias is None else bias.value, stride=_pair(a["stride"]),
        padding=_pair(a["padding"]), dilation=_pair(a["dilation"]), groups=a["groups"], path=path, pattern=pattern,
    )  # fmt: skip


@_imports(aten._native_batch_norm_legit_no_training.default)
def _batch_norm(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, channels = a["input"], a["input"].shape[1]
    constants = [a[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if isinstance(x, Constant) or len(x.shape) != 4 or not all(isinstance(item, Constant | None) for item in constants):
        return None
    gamma, beta, mean, variance = (None if item is None else item.value.double() for item in constants)
    if mean is None or variance is None:
        return None
    scale = (variance + a["eps"]).rsqrt() * (1.0 if gamma is None else gamma)
    shift = (0.0 if beta is None else beta) - mean * scale
    before = importer.nodes.get(x.inputs[0]) if isinstance(x, View) else None
    if isinstance(before, Convolution | Linear) and before.post.is_empty and before.shape[-1] == channels:
        old = torch.zeros(channels) if before.bias is None else before.bias
        folded = replace(
            before, name=f"{before.name}.norm", origin=(*before.origin, node.name), bias=(old * scale + shift).float(),
            weight=(before.weight * scale.reshape(-1, *[1] * (before.weight.ndim - 1))).float(),
        )  # fmt: skip
        return [_image(importer, node, importer.add(folded), x.shape)]
    weight = scale.float().reshape(-1, 1, 1, 1)
    return [_convolve(importer, node, x, weight, shift.float(), stride=(1, 1), padding=(0, 0), groups=channels)]


def _average(importer: _Importer, node: fx.Node, x: Node, kernel: Pair, stride: Pair, padding: Pair) -> Node:
    weight = torch.full((x.shape[1], 1, *kernel), 1 / (kernel[0] * kernel[1]))
    return _convolve(importer, node, x, weight, None, stride=stride, padding=padding, groups=x.shape[1])


@_imports(aten.avg_pool2d.default)
def _avg_pool2d(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, padding = a["self"], _pair(a["padding"])
    kernel = _pair(a["kernel_size"])
    excluded = padding != (0, 0) and not a["count_include_pad"]
    if isinstance(x, Constant) or len(x.shape) != 4 or excluded or a["ceil_mode"] or a["divisor_override"]:
        return None
    return _average(importer, node, x, kernel, _pair(a["stride"]) if a["stride"] else kernel, padding)


@_imports(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool2d(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, out = a["self"], tuple(node.meta["val"].shape[2:])
    if isinstance(x, Constant) or len(x.shape) != 4 or any(n % m for n, m in zip(x.shape[2:], out, strict=True)):
        return None
    kernel = _pair([n // m for n, m in zip(x.shape[2:], out, strict=True)])
    return _average(importer, node, x, kernel, kernel, (0, 0))


@_imports(aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
def _max_pool2d(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, several = a["self"], not isinstance(node.meta["val"], Tensor)
    if isinstance(x, Constant) or len(x.shape) != 4:
        return None
    shape, kernel = tuple((node.meta["val"][0] if several else node.meta["val"]).shape), _pair(a["kernel_size"])
    made = importer.make(
        MaxPool, node, (_rows(importer, node, x).name,), name=importer.path(node) or node.name, size=tuple(x.shape[2:]),
        out_size=shape[2:], kernel=kernel, stride=_pair(a["stride"]) if a["stride"] else kernel, padding=_pair(a["padding"]),
        dilation=_pair(a["dilation"]), shape=(shape[0], shape[2] * shape[3], shape[1]),
    )  # fmt: skip
    image = _image(importer, node, made, shape)
    return [image] if several else image


@_imports(aten.mean.dim)
def _mean(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    """Of an image's pixels, or of tokens. Of the last dimension, only if that does not stay: else it is a part of a norm."""
    x, rank = a["self"], len(a["self"].shape)
    dims = sorted(d % rank for d in a["dim"] or range(rank))
    last = rank >= 3 and rank - 1 in dims and (rank == 4 and dims == [2, 3] or rank == 3 and dims == [2] and not a["keepdim"])
    if isinstance(x, Constant) or (rank - 1 in dims and not last):
        return None
    return _mean_of(importer, node, x, dims, 1 if last else rank - 1)


@_imports(aten.adaptive_avg_pool1d.default)
def _adaptive_avg_pool1d(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x = a["self"]
    if isinstance(x, Constant) or len(x.shape) != 3 or node.meta["val"].shape[2] != 1:
        return None
    return _mean_of(importer, node, x, [2], 1)


def _mean_of(importer: _Importer, node: fx.Node, x: Node, dims: list[int], channel: int) -> Node:
    """Mean over dimensions: a pooling of (batch, rows, channels)."""
    kept = [d for d in range(len(x.shape)) if d not in dims and d != channel]
    batch, channels = math.prod(x.shape[d] for d in kept), x.shape[channel]
    size = (x.shape[dims[0]], math.prod(x.shape[d] for d in dims[1:]))
    layout = Layout.contiguous(x.shape).permute((*kept, *dims, channel)).reshape((batch, size[0] * size[1], channels))
    rows = importer.make(
        Convolution, node, (importer.view(node, x, layout, f"{node.name}.rows").name,), name=f"{node.name}.average",
        shape=(batch, 1, channels), weight=torch.full((channels, 1, *size), 1 / (size[0] * size[1])), bias=None, size=size,
        out_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=channels,
    )  # fmt: skip
    return importer.view(node, rows, Layout.contiguous(rows.shape).reshape(tuple(node.meta["val"].shape)))
