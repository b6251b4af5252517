"""Import of normalisations over more than the last dimension: by groups of channels, by channel and sample, over several, written
out in means.

Each becomes a `LayerNorm` of rows that hold what is normalised together: of an image, pixels and channels change places, and the
rows of a group's channels are joined; one group takes the pixels as they lie. `compiler.passes.rows` makes copies of rows and
transposes of it. A factor and a summand for each channel come behind it.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from compiler.frontend import IMPORTS, _Importer, _imports
from compiler.graph import Constant, Convolution, LayerNorm, Linear, Node, Norm, View
from compiler.image_imports import DIAGONAL, affine, as_image, by_channel, pixel_rows
from compiler.layout import Layout
from compiler.passes.norms import VARIANCES

__all__: list[str] = []

aten = torch.ops.aten


def _values(*items: Node | None) -> tuple[Tensor | None, ...] | None:
    """Values of constants, None for those that are left out; None if one is no constant."""
    if not all(isinstance(item, Constant | None) for item in items):
        return None
    return tuple(None if item is None else item.value.detach().float() for item in items)  # type: ignore[attr-defined]


def _normalised(
    importer: _Importer, node: fx.Node, rows: Node, eps: float, gamma: Tensor | None = None, beta: Tensor | None = None, *,
    rms: bool = False,
) -> Node:  # fmt: skip
    """Each row of (..., columns); gamma and beta (columns,)."""
    columns = rows.shape[-1]
    norm = Norm(torch.ones(columns) if gamma is None else gamma, torch.zeros(columns) if beta is None else beta, eps, rms)
    name = f"{importer.path(node) or node.name}.rows"
    return importer.make(LayerNorm, node, (rows.name,), name=name, shape=rows.shape, norm=norm)


def _together(importer: _Importer, node: fx.Node, x: Node, eps: float, gamma: Tensor | None, beta: Tensor | None) -> Node:
    """All of each batch entry of an image (batch, channels, ...); gamma and beta like one entry."""
    rows = pixel_rows(importer, node, x)
    batch, pixels, channels = rows.shape
    flat = importer.view(node, rows, Layout.contiguous(rows.shape).reshape((batch, 1, pixels * channels)), f"{node.name}.flat")
    gamma, beta = (None if value is None else value.reshape(channels, pixels).t().flatten() for value in (gamma, beta))
    made = _normalised(importer, node, flat, eps, gamma, beta)
    back = importer.view(node, made, Layout.contiguous(made.shape).reshape(rows.shape), f"{node.name}.pixels")
    return as_image(importer, node, back, x.shape)


def _grouped(
    importer: _Importer, node: fx.Node, x: Node, groups: int, eps: float, gamma: Tensor | None, beta: Tensor | None
) -> Node:
    """Groups of channels of (batch, channels, ...); gamma and beta (channels,)."""
    batch, channels, *size = x.shape
    if groups == 1 and size:
        ones = [1] * len(size)
        whole = [None if v is None else v.reshape(-1, *ones).expand(x.shape[1:]) for v in (gamma, beta)]
        return _together(importer, node, x, eps, *whole)
    if size and 1 < groups < channels and (ordered := _in_turns(importer, node, x, groups)) is not None:
        return _of_turns(importer, node, x, ordered, groups, eps, gamma, beta)
    shape = (batch, groups, channels // groups * prod(size))
    rows = importer.view(node, x, Layout.contiguous(x.shape).reshape(shape), f"{node.name}.groups")
    made = _normalised(importer, node, rows, eps)
    image = importer.view(node, made, Layout.contiguous(shape).reshape(x.shape), f"{node.name}.channels")
    if gamma is None and beta is None:
        return image
    scale = torch.ones(channels) if gamma is None else gamma
    return (by_channel if size else affine)(importer, node, image, scale.double(), None if beta is None else beta.double())


def _turns(channels: int, groups: int) -> Tensor:
    """The order of channels in which the groups take turns: the first channel of each, then the second of each."""
    return torch.arange(channels).reshape(groups, -1).t().flatten()


def _in_turns(importer: _Importer, node: fx.Node, x: Node, groups: int) -> Node | None:
    """The pixels (batch, pixels, channels) of an image that a product has just made, with the channels in `_turns`: copies are of
    all groups then, not of one channel of one. None if nothing makes them so for free."""
    made = pixel_rows(importer, node, x)
    image = node.args[0]
    alone = isinstance(image, fx.Node) and len(image.users) == 1
    if not alone or not isinstance(made, Linear | Convolution) or not made.post.is_empty:
        return None
    if isinstance(made, Convolution) and made.groups > 1:
        return None
    order = _turns(made.shape[-1], groups)
    bias = None if made.bias is None else made.bias[order]
    origin = (*made.origin, node.name)
    return importer.add(replace(made, name=f"{made.name}.turns", weight=made.weight[order], bias=bias, origin=origin))


def _of_turns(
    importer: _Importer, node: fx.Node, x: Node, rows: Node, groups: int, eps: float, gamma: Tensor | None,
    beta: Tensor | None,
) -> Node:  # fmt: skip
    """`_grouped` of pixels whose channels are in `_turns`; the product behind it brings them back."""
    batch, pixels, channels = rows.shape
    taken = Layout.contiguous((batch, pixels, channels // groups, groups)).permute((0, 3, 2, 1))
    flat = importer.view(node, rows, taken.reshape((batch, groups, channels // groups * pixels)), f"{node.name}.groups")
    made = _normalised(importer, node, flat, eps)
    given = Layout.contiguous((batch, groups, channels // groups, pixels)).permute((0, 3, 2, 1)).reshape(rows.shape)
    back = importer.view(node, made, given, f"{node.name}.channels")
    weight = torch.zeros(channels, channels)
    weight[_turns(channels, groups), torch.arange(channels)] = 1.0
    weight = weight if gamma is None else weight * gamma[:, None]
    scaled = importer.make(
        Linear, node, (back.name,), name=importer.path(node) or node.name, shape=rows.shape, weight=weight, bias=beta,
        pattern=DIAGONAL,
    )  # fmt: skip
    return as_image(importer, node, scaled, x.shape)


@_imports(aten.group_norm.default)
def _group_norm(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, found = a["input"], _values(a["weight"], a["bias"])
    if isinstance(x, Constant) or found is None:
        return None
    return _grouped(importer, node, x, a["num_groups"], float(a["eps"]), *found)


@_imports(aten.instance_norm.default)
def _instance_norm(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    x, found = a["input"], _values(a["weight"], a["bias"], a["running_mean"], a["running_var"])
    if isinstance(x, Constant) or found is None or len(x.shape) < 3:
        return None
    gamma, beta, mean, variance = found
    if a["use_input_stats"]:
        return _grouped(importer, node, x, x.shape[1], float(a["eps"]), gamma, beta)
    if mean is None or variance is None:
        return None
    scale = (variance.double() + a["eps"]).rsqrt() * (1.0 if gamma is None else gamma.double())
    return by_channel(importer, node, x, scale, (0.0 if beta is None else beta.double()) - mean.double() * scale)


_plain = {
    target: IMPORTS[target]
    for target in (aten.layer_norm.default, aten.rms_norm.default, aten.div.Tensor, aten.mul.Tensor)
}  # fmt: skip


@_imports(aten.layer_norm.default, aten.rms_norm.default)
def _over_several(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    """Over all dimensions but the first ones."""
    x, rms, count = a["input"], node.target is aten.rms_norm.default, len(a["normalized_shape"])
    found = _values(a["weight"], None if rms else a["bias"])
    if count == 1 or isinstance(x, Constant) or found is None:
        return _plain[node.target](importer, node, a)  # type: ignore[index]
    eps = torch.finfo(torch.float32).eps if a["eps"] is None else float(a["eps"])
    if not rms and len(x.shape) == count + 1 and isinstance(x, View) and len(x.shape) in (3, 4):
        return _together(importer, node, x, eps, *found)
    lead = x.shape[:-count]
    rows = importer.view(node, x, Layout.contiguous(x.shape).reshape((*lead, prod(x.shape[-count:]))), f"{node.name}.flat")
    made = _normalised(importer, node, rows, eps, *(None if v is None else v.flatten() for v in found), rms=rms)
    return importer.view(node, made, Layout.contiguous(made.shape).reshape(x.shape))


# -- written out ---------------------------------------------------------------------------------------------


@_imports(aten.div.Tensor, aten.mul.Tensor)
def _written_out(importer: _Importer, node: fx.Node, a: dict[str, Any]) -> Any:
    """``(x - mean(x)) / sqrt(variance(x) + eps)`` over the last dimensions, the channels or the pixels."""
    found = _normalisation(importer, node)
    x = None if found is None else importer.value(found[0])
    if found is not None and isinstance(x, Node) and not isinstance(x, Constant):
        made = _over(importer, node, x, *found[1:])
        if made is not None:
            return made
    return _plain[node.target](importer, node, a)  # type: ignore[index]


def _over(importer: _Importer, node: fx.Node, x: Node, dims: tuple[int, ...], eps: float) -> Node | None:
    rank = len(x.shape)
    if dims == tuple(range(rank - len(dims), rank)) and len(dims) < rank:
        if rank == 4 and len(dims) == 2:
            return _grouped(importer, node, x, x.shape[1], eps, None, None)
        if len(dims) == 1:
            return importer.make(LayerNorm, node, (x.name,), norm=_unit(x.shape[-1], eps))
        return _together(importer, node, x, eps, None, None) if len(dims) == rank - 1 else None
    if dims == (1,) and rank in (3, 4):
        rows = pixel_rows(importer, node, x)
        return as_image(importer, node, _normalised(importer, node, rows, eps), x.shape)
    return None


def _unit(columns: int, eps: float) -> Norm:
    return Norm(torch.ones(columns), torch.zeros(columns), eps)


def _normalisation(importer: _Importer, node: fx.Node) -> tuple[fx.Node, tuple[int, ...], float] | None:
    """What is normalised, over which dimensions, and eps; None if a quotient or product is none."""
    pairs = [node.args[:2]] if node.target is aten.div.Tensor else [node.args[:2], node.args[1::-1]]
    for centred, factor in pairs:
        if not isinstance(centred, fx.Node) or not isinstance(factor, fx.Node) or centred.target is not aten.sub.Tensor:
            continue
        x, mean = centred.args[:2]
        if not isinstance(x, fx.Node) or node.meta["val"].shape != x.meta["val"].shape or centred.kwargs:
            continue
        found = _deviation(importer, factor, x, inverse=node.target is aten.mul.Tensor)
        if found is not None and _statistic(mean, x) == ("mean", found[0]):
            return x, *found
    return None


def _deviation(importer: _Importer, node: fx.Node, x: fx.Node, *, inverse: bool) -> tuple[tuple[int, ...], float] | None:
    """Dimensions and eps of ``sqrt(variance(x) + eps)``, or its inverse."""
    total: Any = node
    roots = {(False, aten.sqrt.default), (True, aten.rsqrt.default)}
    power = node.target is aten.pow.Tensor_Scalar and node.args[1] == (-0.5 if inverse else 0.5)
    if inverse and node.target is aten.reciprocal.default:
        node = node.all_input_nodes[0]
        inverse = False
    if not power and (inverse, node.target) not in roots:
        return None
    total = node.args[0]
    if not isinstance(total, fx.Node) or total.target not in (aten.add.Tensor, aten.add.Scalar) or total.kwargs:
        return None
    variance, given = total.args[:2]
    found, eps = _statistic(variance, x), _constant(importer, given)
    return (found[1], eps) if found is not None and found[0] == "variance" and eps is not None else None


def _constant(importer: _Importer, value: Any) -> float | None:
    """The number that an argument is, or a constant of one element."""
    if isinstance(value, fx.Node):
        found = importer.exported.constant(value)
        value = found[0] if found is not None else None
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def _statistic(node: Any, x: fx.Node) -> tuple[str, tuple[int, ...]] | None:
    """Which one of x a value is, and over which dimensions, all of which it keeps."""
    if not isinstance(node, fx.Node):
        return None
    rank = x.meta["val"].ndim
    if node.target is operator.getitem:
        source, which = node.args
        both = isinstance(source, fx.Node) and source.target in VARIANCES and _biased(source) and source.args[0] is x
        return (("variance", "mean")[int(which)], _dims(source.args[1], rank)) if both else None  # type: ignore
    if node.target in VARIANCES and _biased(node) and node.args[0] is x:
        return "variance", _dims(node.args[1], rank)
    if node.target is not aten.mean.dim or len(node.args) < 3 or not node.args[2]:
        return None
    dims, of = _dims(node.args[1], rank), node.args[0]
    if of is x:
        return "mean", dims
    squared = _squared(of)
    centred = squared is not None and squared.target is aten.sub.Tensor and squared.args[0] is x and not squared.kwargs
    return ("variance", dims) if centred and _statistic(squared.args[1], x) == ("mean", dims) else None  # type: ignore[union-attr]


def _squared(node: Any) -> fx.Node | None:
    """x of ``x * x`` or ``x ** 2``."""
    if not isinstance(node, fx.Node):
        return None
    power = node.target is aten.pow.Tensor_Scalar and node.args[1] == 2
    twice = node.target is aten.mul.Tensor and node.args[0] is node.args[1]
    return node.all_input_nodes[0] if power or twice or node.target is aten.square.default else None


def _dims(given: Any, rank: int) -> tuple[int, ...]:
    return tuple(sorted(dim % rank for dim in (range(rank) if given is None else given)))


def _biased(node: fx.Node) -> bool:
    """Whether a variance divides by the number of values, and keeps its dimensions."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {"correction": 1, "keepdim": False, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return not given.get("unbiased", given["correction"]) and bool(given["keepdim"])
