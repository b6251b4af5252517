"""Import of operators on images: convolutions, poolings and normalisations by channel.

In torch an image is (batch, channels, height, width), in the graph rows of channels, (batch, pixels, channels), like any other
tensor. Every operator here is imported between two `View`s that turn one into the other; the passes cancel them. Average
poolings are depth-wise convolutions with constant weights, a batch normalisation goes into the convolution before it or
becomes a Linear with a diagonal weight, and a convolution that sees one pixel is a Linear. A line (batch, channels, length) is an
image of one line.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from algo.nm import NM
from compiler.frontend import IMPORTS, _Importer, _imports
from compiler.graph import Activation, Add, Constant, Convolution, Function, LayerNorm, Linear, MaxPool, Node, View
from compiler.layout import Layout

__all__ = ["DIAGONAL", "affine", "as_image", "as_rows", "by_channel", "convolve", "image_size", "pair", "pixel_rows"]

aten = torch.ops.aten
Pair = tuple[int, int]
DIAGONAL = NM("1:32")
"""Pattern of a product with a factor for each channel."""


def pair(value: Any) -> Pair:
    """(vertical, horizontal) of an argument that may be one number; a line has only the second."""
    items = [value] if isinstance(value, int) else list(value)
    return (int(items[0]), int(items[-1]))


def _line(value: Any, other: int) -> Pair:
    """The same for an operator on lines."""
    return (other, value if isinstance(value, int) else int(value[0]))


def image_size(shape: tuple[int, ...]) -> Pair:
    """(height, width) of a tensor (batch, channels, height, width) or (batch, channels, length)."""
    return (shape[2], shape[3]) if len(shape) == 4 else (1, shape[2])


def as_rows(importer: _Importer, node: fx.Node, x: Node) -> Node:
    """An image (batch, channels, height, width) or line (batch, channels, length) as (batch, pixels, channels)."""
    batch, channels, *size = x.shape
    order = (0, *range(2, 2 + len(size)), 1)
    layout = Layout.contiguous(x.shape).permute(order).reshape((batch, prod(size), channels))
    return importer.view(node, x, layout, f"{node.name}.rows")


def as_image(importer: _Importer, node: fx.Node, rows: Node, shape: tuple[int, ...]) -> Node:
    """The inverse of `as_rows`."""
    batch, channels, *size = shape
    layout = Layout.contiguous((batch, *size, channels)).permute((0, len(size) + 1, *range(1, len(size) + 1)))
    return importer.view(node, rows, layout, f"{node.name}.image")


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple((value if isinstance(value, Tensor) else value[0]).shape)


def convolve(
    importer: _Importer, node: fx.Node, rows: Node, weight: Tensor, bias: Tensor | None, *, size: Pair, out_size: Pair,
    stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1), groups: int = 1, path: str = "", name: str = "",
    pattern: Any = None,
) -> Node:  # fmt: skip
    """A convolution of (batch, pixels, channels)."""
    fields: dict[str, Any] = {
        "name": name or path or node.name, "source": path or importer.path(node), "weight": weight, "bias": bias,
        "pattern": pattern, "shape": (rows.shape[0], prod(out_size), weight.shape[0]),
    }  # fmt: skip
    if weight.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0) and groups == 1 and size == out_size:
        return importer.make(Linear, node, (rows.name,), **{**fields, "weight": weight[:, :, 0, 0]})
    return importer.make(
        Convolution, node, (rows.name,), size=size, out_size=out_size, stride=stride, padding=padding, dilation=dilation,
        groups=groups, **fields,
    )  # fmt: skip


def _convolved(importer: _Importer, node: fx.Node, x: Node, weight: Tensor, bias: Tensor | None, **fields: Any) -> Node:
    """A convolution of an image; the value's image."""
    shape = _shape(node)
    rows = as_rows(importer, node, x)
    made = convolve(importer, node, rows, weight, bias, size=image_size(x.shape), out_size=image_size(shape), **fields)
    return as_image(importer, node, made, shape)


@_imports(aten.conv2d.default, aten.convolution.default, aten.conv2d.padding, aten.conv1d.default, aten.conv1d.padding)
def _conv(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if isinstance(x, Constant) or not isinstance(weight, Constant) or not isinstance(bias, Constant | None):
        return None
    if len(x.shape) not in (3, 4) or len(weight.shape) != len(x.shape) or a.get("transposed"):
        return None
    numbers = pair if len(x.shape) == 4 else lambda value: _line(value, 1)
    kernel = weight.value if len(x.shape) == 4 else weight.value[:, :, None]
    stride, dilation = numbers(a["stride"]), numbers(a["dilation"])
    if isinstance(a["padding"], str):  # torch puts the odd pixel behind
        before = [d * (k - 1) // 2 if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel.shape[2:], strict=True)]
        padding = (before[0], before[1])
    else:
        padding = pair(a["padding"]) if len(x.shape) == 4 else _line(a["padding"], 0)
    path, pattern = importer.pattern(weight)
    return _convolved(
        importer, node, x, kernel, None if bias is None else bias.value, stride=stride, padding=padding, dilation=dilation,
        groups=a["groups"], path=path, pattern=pattern,
    )  # fmt: skip


# -- a factor and a summand for each channel -----------------------------------------------------------------


def affine(importer: _Importer, node: fx.Node, x: Node, scale: Tensor, shift: Tensor | None) -> Node:
    """``x * scale + shift``, (channels,) each, of (..., channels) rows: in the product or norm before it, or a product."""
    before = importer.nodes.get(x.name)
    if isinstance(before, LayerNorm) and before.norm.width == len(scale):
        gamma, beta = before.norm.gamma * scale, before.norm.beta * scale + (0.0 if shift is None else shift)
        norm = replace(before.norm, gamma=gamma.float(), beta=beta.float())
        return importer.add(replace(before, name=f"{before.name}.scaled", origin=(*before.origin, node.name), norm=norm))
    if isinstance(before, Convolution | Linear) and before.post.is_empty:
        old = torch.zeros(len(scale)) if before.bias is None else before.bias
        bias = None if before.bias is None and shift is None else (old * scale + (0.0 if shift is None else shift)).float()
        folded = replace(
            before, name=f"{before.name}.norm", origin=(*before.origin, node.name), bias=bias,
            weight=(before.weight * scale.reshape(-1, *[1] * (before.weight.ndim - 1))).float(),
        )  # fmt: skip
        return importer.add(folded)
    return importer.make(
        Linear, node, (x.name,), name=importer.path(node) or node.name, shape=x.shape, weight=scale.float().diag(),
        bias=None if shift is None else shift.float(), pattern=DIAGONAL if len(scale) > 1 else None,
    )  # fmt: skip


def by_channel(importer: _Importer, node: fx.Node, x: Node, scale: Tensor, shift: Tensor | None) -> Node:
    """`affine` of an image or line (batch, channels, ...)."""
    return as_image(importer, node, affine(importer, node, pixel_rows(importer, node, x), scale, shift), x.shape)


def pixel_rows(importer: _Importer, node: fx.Node, x: Node) -> Node:
    """`as_rows`, or the rows that an image is made of."""
    rows = as_rows(importer, node, x)
    if isinstance(x, View) and (below := importer.nodes[x.inputs[0]]).shape == rows.shape and _turns_back(x, rows):
        return below
    return rows


def _turns_back(image: View, rows: Node) -> bool:
    """Whether a view as rows undoes a view as an image."""
    return isinstance(rows, View) and rows.layout.compose(image.layout) == Layout.contiguous(rows.shape)


@_imports(aten._native_batch_norm_legit_no_training.default)
def _batch_norm(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x = a["input"]
    constants = [a[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if isinstance(x, Constant) or len(x.shape) not in (2, 3, 4) or not all(isinstance(c, Constant | None) for c in constants):
        return None
    gamma, beta, mean, variance = (None if item is None else item.value.double() for item in constants)
    if mean is None or variance is None:
        return None
    scale = (variance + a["eps"]).rsqrt() * (1.0 if gamma is None else gamma)
    shift = (0.0 if beta is None else beta) - mean * scale
    return [(affine if len(x.shape) == 2 else by_channel)(importer, node, x, scale, shift)]


def _by_vector(importer: _Importer, node: fx.Node, x: Any, constant: Any, change: Any) -> Any:
    """An image (batch, channels, ...) and a constant with a value for each channel: ``change`` gives factor and summand. Vectors
    of rows of channels are for `compiler.passes.linears.fold_vectors`."""
    if not isinstance(x, Node) or isinstance(x, Constant) or not isinstance(constant, Constant) or len(x.shape) < 3:
        return None
    value = constant.value
    sizes = (1,) * (len(x.shape) - value.ndim) + tuple(value.shape)
    if value.numel() < 2 or not value.is_floating_point() or len(sizes) != len(x.shape):
        return None
    if not sizes[1] == x.shape[1] == value.numel():
        return None
    scale, shift = change(value.reshape(-1).double())
    return by_channel(importer, node, x, scale, shift)


_plain = {target: IMPORTS[target] for target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)}


@_imports(aten.add.Tensor)
def _add(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    made = None
    for x, c in ((a["self"], a["other"]), (a["other"], a["self"])) if a["alpha"] == 1 else ():
        made = made or _by_vector(importer, node, x, c, lambda value: (torch.ones_like(value), value))
    return made or _plain[aten.add.Tensor](importer, node, a)


@_imports(aten.sub.Tensor)
def _sub(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    made = None
    if a["alpha"] == 1:
        made = _by_vector(importer, node, a["self"], a["other"], lambda value: (torch.ones_like(value), -value))
    return made or _plain[aten.sub.Tensor](importer, node, a)


@_imports(aten.mul.Tensor)
def _mul(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    made = None
    for x, c in ((a["self"], a["other"]), (a["other"], a["self"])):
        made = made or _by_vector(importer, node, x, c, lambda value: (value, None))
    return made or _plain[aten.mul.Tensor](importer, node, a)


@_imports(aten.div.Tensor)
def _div(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    made = _by_vector(importer, node, a["self"], a["other"], lambda value: (1 / value, None))
    return made or _plain[aten.div.Tensor](importer, node, a)


@_imports(aten.prelu.default)
def _prelu(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, weight = a["self"], a["weight"]
    if isinstance(x, Constant) or not isinstance(weight, Constant):
        return None
    slope = weight.value
    if slope.numel() == 1:
        number = float(slope)
        function = Function("prelu", lambda value: torch.where(value >= 0, value, number * value))
        return importer.make(Activation, node, (x.name,), function=function)
    positive, negative = (
        importer.make(Activation, node, (x.name,), name=f"{node.name}.{name}", function=Function(name, function))
        for name, function in (("relu", torch.relu), ("below", lambda value: value.clamp(max=0)))
    )
    scaled = (affine if len(x.shape) == 2 else by_channel)(importer, node, negative, slope, None)
    return importer.make(Add, node, (scaled.name, positive.name))


# -- poolings ------------------------------------------------------------------------------------------------


def _averaged(importer: _Importer, node: fx.Node, rows: Node, *, kernel: Pair, **fields: Any) -> Node:
    weight = torch.full((rows.shape[-1], 1, *kernel), 1 / prod(kernel))
    return convolve(importer, node, rows, weight, None, groups=rows.shape[-1], name=f"{node.name}.average", **fields)


def _average(importer: _Importer, node: fx.Node, x: Node, kernel: Pair, stride: Pair, padding: Pair) -> Node:
    shape = _shape(node)
    if kernel == stride == (1, 1) and padding == (0, 0):
        return x
    rows = _averaged(
        importer, node, as_rows(importer, node, x), kernel=kernel, stride=stride, padding=padding, size=image_size(x.shape),
        out_size=image_size(shape),
    )  # fmt: skip
    return as_image(importer, node, rows, shape)


@_imports(aten.avg_pool2d.default, aten.avg_pool1d.default)
def _avg_pool(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x = a["self"]
    if isinstance(x, Constant) or len(x.shape) not in (3, 4) or a.get("divisor_override"):
        return None
    flat = node.target is aten.avg_pool1d.default
    kernel = _line(a["kernel_size"], 1) if flat else pair(a["kernel_size"])
    given = a["stride"] or a["kernel_size"]
    stride, padding = (_line(given, 1), _line(a["padding"], 0)) if flat else (pair(given), pair(a["padding"]))
    size, out = image_size(x.shape), image_size(_shape(node))
    reach = [(out[i] - 1) * stride[i] + kernel[i] for i in range(2)]
    if any(reach[i] > size[i] + 2 * padding[i] for i in range(2)):  # ceil_mode: a part of a window counts less
        return None
    if padding != (0, 0) and not a["count_include_pad"]:
        return None
    return _average(importer, node, x, kernel, stride, padding)


@_imports(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default)
def _adaptive_avg_pool(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x = a["self"]
    kernel = _adaptive_kernel(x, _shape(node))
    return None if kernel is None else _average(importer, node, x, kernel, kernel, (0, 0))


def _adaptive_kernel(x: Node, shape: tuple[int, ...]) -> Pair | None:
    """The kernel of an adaptive pooling whose windows are all alike."""
    if isinstance(x, Constant) or len(x.shape) not in (3, 4):
        return None
    sizes = list(zip(image_size(x.shape), image_size(shape), strict=True))
    return None if any(n % m for n, m in sizes) else pair([n // m for n, m in sizes])


def _largest(
    importer: _Importer, node: fx.Node, x: Node, shape: tuple[int, ...], *, kernel: Pair, stride: Pair, padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Node:  # fmt: skip
    made = importer.make(
        MaxPool, node, (as_rows(importer, node, x).name,), name=importer.path(node) or node.name, size=image_size(x.shape),
        out_size=image_size(shape), kernel=kernel, stride=stride, padding=padding, dilation=dilation,
        shape=(shape[0], prod(image_size(shape)), shape[1]),
    )  # fmt: skip
    return as_image(importer, node, made, shape)


@_imports(
    aten.max_pool2d.default, aten.max_pool2d_with_indices.default, aten.max_pool1d.default,
    aten.max_pool1d_with_indices.default,
)  # fmt: skip
def _max_pool(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, several = a["self"], not isinstance(node.meta["val"], Tensor)
    if isinstance(x, Constant) or len(x.shape) not in (3, 4):
        return None
    given = (a["kernel_size"], a["stride"] or a["kernel_size"], a["padding"], a["dilation"])
    flat = node.target in (aten.max_pool1d.default, aten.max_pool1d_with_indices.default)
    if flat != (len(x.shape) == 3):
        return None
    kernel, stride, padding, dilation = (
        (_line(value, other) for value, other in zip(given, (1, 1, 0, 1), strict=True)) if flat else map(pair, given)
    )
    image = _largest(importer, node, x, _shape(node), kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    return [image] if several else image


@_imports(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool1d.default)
def _adaptive_max_pool(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    kernel = _adaptive_kernel(a["self"], _shape(node))
    return None if kernel is None else [_largest(importer, node, a["self"], _shape(node), kernel=kernel, stride=kernel)]


@_imports(aten.amax.default)
def _amax(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x = a["self"]
    if isinstance(x, Constant) or len(x.shape) != 4 or sorted(d % 4 for d in a["dim"]) != [2, 3]:
        return None
    size = image_size(x.shape)
    image = _largest(importer, node, x, (*x.shape[:2], 1, 1), kernel=size, stride=size)
    return importer.view(node, image, Layout.contiguous(image.shape).reshape(_shape(node)))


@_imports(aten.mean.dim)
def _mean(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    """Of an image's pixels, or of tokens. Of the last dimension, only if that does not stay: else it is a part of a norm."""
    x, rank = a["self"], len(a["self"].shape)
    dims = sorted(d % rank for d in a["dim"] or range(rank))
    last = rank >= 3 and rank - 1 in dims and (rank == 4 and dims == [2, 3] or rank == 3 and dims == [2] and not a["keepdim"])
    if isinstance(x, Constant) or (rank - 1 in dims and not last):
        return None
    return _mean_of(importer, node, x, dims, 1 if last else rank - 1)


def _mean_of(importer: _Importer, node: fx.Node, x: Node, dims: list[int], channel: int) -> Node:
    """Mean over dimensions: a pooling of (batch, rows, channels)."""
    kept = [d for d in range(len(x.shape)) if d not in dims and d != channel]
    batch, channels = prod(x.shape[d] for d in kept), x.shape[channel]
    size = (x.shape[dims[0]], prod(x.shape[d] for d in dims[1:]))
    layout = Layout.contiguous(x.shape).permute((*kept, *dims, channel)).reshape((batch, size[0] * size[1], channels))
    rows = importer.make(
        Convolution, node, (importer.view(node, x, layout, f"{node.name}.rows").name,), name=f"{node.name}.average",
        shape=(batch, 1, channels), weight=torch.full((channels, 1, *size), 1 / (size[0] * size[1])), bias=None, size=size,
        out_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=channels,
    )  # fmt: skip
    return importer.view(node, rows, Layout.contiguous(rows.shape).reshape(tuple(node.meta["val"].shape)))
