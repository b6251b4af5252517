"""gathered_heads: attention whose queries, keys and values are chosen rows: windows of an image, rolled or not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compiler.graph import Attention, Graph, Node, ScaledDotProduct, View
from compiler.layout import Layout, LayoutError
from compiler.passes.rows import row_gather

__all__ = ["common_bias", "gathered_heads"]


def common_bias(bias: Tensor) -> Tensor:
    """A bias (batch, heads, rows, keys) with one entry for all batch entries or heads where they are equal."""
    for dim in (0, 1):
        first = bias.narrow(dim, 0, 1)
        if bool((bias == first).all()):
            bias = first
    return bias.clone()


def gathered_heads(graph: Graph, node: ScaledDotProduct) -> list[Node]:
    """Copies of rows, an `Attention` on them and a view of its result. If the operands are not heads of rows, each head becomes a
    batch entry. Nothing if the mask does not allow that."""
    return _of_rows(graph, node) or _one_by_one(graph, node)


def _one_by_one(graph: Graph, node: ScaledDotProduct) -> list[Node]:
    *lead, rows, width = node.shape
    count, keys = math.prod(lead), graph.nodes[node.inputs[1]].shape[-2]
    mask = node.inputs[3:]
    if mask and graph.nodes[mask[0]].shape != (count, 1, keys):
        return []
    made: list[Node] = []
    for role, name in zip("qkv", node.inputs[:3], strict=True):
        x = graph.nodes[name]
        layout = Layout.contiguous(x.shape).reshape((count, *x.shape[-2:]))
        made.append(View(
            name=f"{node.name}.each.{role}", inputs=(name,), shape=layout.shape, layout=layout, source=node.source,
            origin=node.origin,
        ))  # fmt: skip
    shape = (count, rows, width)
    whole = Attention(
        name=node.name, inputs=(*(view.name for view in made), *mask), shape=shape, source=node.source, origin=node.origin,
        heads=1, scale=node.scale, bias=None if node.bias is None else common_bias(node.bias.reshape(count, 1, rows, keys)),
    )  # fmt: skip
    layout = Layout.contiguous(shape).reshape(tuple(node.shape))
    view = View(
        name=f"{node.name}.heads", inputs=(whole.name,), shape=node.shape, source=node.source, layout=layout, origin=node.origin
    )
    return [*made, whole, view]


def _of_rows(graph: Graph, node: ScaledDotProduct) -> list[Node]:
    found = [_rows_of_heads(graph, name) for name in node.inputs[:3]]
    operands = [item for item in found if item is not None]
    if len(operands) < 3:
        return []
    *lead, rows, width = node.shape
    (q, q_rows, q_start), (k, k_rows, k_start), (v, v_rows, v_start) = operands
    heads, groups = q.shape[-1] // width, k.shape[-1] // width
    count = q_rows.shape[0]
    if heads * width != q.shape[-1] or groups * width != k.shape[-1] or k.shape[-1] != v.shape[-1] or heads % groups:
        return []
    if count % heads or k_rows.shape[0] != count:
        return []
    head = torch.arange(count) % heads
    if not bool((q_start == head * width).all()) or not all(
        bool((start == head // (heads // groups) * width).all()) for start in (k_start, v_start)
    ):
        return []
    batch, names, made = count // heads, [], []
    for role, tensor, places in (("q", q, q_rows), ("k", k, k_rows), ("v", v, v_rows)):
        places = places.reshape(batch, heads, -1)
        if not bool((places == places[:, :1]).all()):
            return []
        chosen = places[:, 0]
        if tensor.shape == (*chosen.shape, tensor.shape[-1]) and bool((chosen.flatten() == torch.arange(chosen.numel())).all()):
            names.append(tensor.name)
            continue
        made.append(row_gather(f"{node.name}.rows.{role}", tensor, chosen.flatten(), tuple(chosen.shape), node))
        names.append(made[-1].name)
    mask = node.inputs[3:]
    if mask and graph.nodes[mask[0]].shape != (batch, 1, k_rows.shape[1]):
        return []
    try:
        split = Layout.contiguous((batch, rows, heads, width)).permute((0, 2, 1, 3)).reshape(tuple(node.shape))
    except LayoutError:
        return []
    whole = Attention(
        name=node.name, inputs=(*names, *mask), shape=(batch, rows, heads * width), source=node.source, origin=node.origin,
        heads=heads, kv_heads=None if groups == heads else groups, scale=node.scale,
        bias=None if node.bias is None else common_bias(node.bias.reshape(batch, heads, rows, -1)),
    )  # fmt: skip
    view = View(
        name=f"{node.name}.heads", inputs=(whole.name,), shape=node.shape, source=node.source, layout=split, origin=node.origin
    )
    return [*made, whole, view]


def _rows_of_heads(graph: Graph, name: str) -> tuple[Node, Tensor, Tensor] | None:
    """Of an operand (..., rows, width): the tensor that it shows, which of its rows (heads, rows), and the first channel of
    each head; None if a head is no range of channels."""
    node = graph.nodes[name]
    width = node.shape[-1]
    views = []
    while isinstance(node, View):
        views.append(node)
        node = graph.nodes[node.inputs[0]]
    ids = torch.arange(math.prod(node.shape)).reshape(node.shape)
    for view in reversed(views):
        ids = view.layout.apply(ids)
    ids = ids.reshape(-1, graph.nodes[name].shape[-2], width)
    first, channels = ids[..., 0], node.shape[-1]
    starts = first % channels
    runs = bool((ids == first[..., None] + torch.arange(width)).all()) and bool((starts + width <= channels).all())
    if not runs or not bool((starts == starts[:, :1]).all()):
        return None
    return node, first // channels, starts[:, 0]
