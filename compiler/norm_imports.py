"""Import of normalisations over more than the last dimension: by groups of channels, by channel and sample, over several dimensions.

Each becomes a `LayerNorm` of rows that hold what is normalised together: of an image, pixels and channels change places, and the
rows of a group's channels are joined; one group takes the pixels as they lie. `compiler.passes.rows` makes copies of rows and
transposes of it. A factor and a summand for each channel come behind it.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from compiler.frontend import IMPORTS, _Importer, _imports
from compiler.graph import Constant, LayerNorm, Node, Norm, View
from compiler.image_imports import affine, as_image, by_channel, pixel_rows
from compiler.layout import Layout

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
        spread = [None if value is None else value.reshape(-1, *[1] * len(size)).expand(x.shape[1:]) for value in (gamma, beta)]
        return _together(importer, node, x, eps, *spread)
    shape = (batch, groups, channels // groups * prod(size))
    rows = importer.view(node, x, Layout.contiguous(x.shape).reshape(shape), f"{node.name}.groups")
    made = _normalised(importer, node, rows, eps)
    image = importer.view(node, made, Layout.contiguous(shape).reshape(x.shape), f"{node.name}.channels")
    if gamma is None and beta is None:
        return image
    scale = torch.ones(channels) if gamma is None else gamma
    return (by_channel if size else affine)(importer, node, image, scale.double(), None if beta is None else beta.double())


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


_plain = {target: IMPORTS[target] for target in (aten.layer_norm.default, aten.rms_norm.default)}


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
