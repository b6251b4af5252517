"""match_scores and match_heads: attention written out becomes `ScaledDotProduct`, then `Attention`."""

from __future__ import annotations

from dataclasses import replace

import torch

from compiler.graph import (
    Add,
    Attention,
    Graph,
    Linear,
    MatMul,
    Node,
    Scale,
    ScaledDotProduct,
    Softmax,
    View,
)
from compiler.layout import Layout, LayoutError
from compiler.passes.views import sink_views
from compiler.passes.windows import common_bias, gathered_heads

__all__ = ["match_heads", "match_scores"]


def match_scores(graph: Graph) -> Graph:
    """``softmax(q @ kT [* scale] [+ mask]) @ v`` becomes one node."""
    graph = sink_views(graph)  # those between a product and its softmax
    nodes: list[Node] = []
    data = _data_nodes(graph)
    for node in graph.nodes.values():
        if isinstance(node, MatMul):
            nodes.extend(_match(graph, node, data) or [node])
        else:
            nodes.append(node)
    return graph.rewrite(nodes)


def _match(graph: Graph, product: MatMul, data: set[str]) -> list[Node] | None:
    """The nodes that replace the outer product of an attention."""
    softmax = graph.nodes[product.inputs[0]]
    found = _scores(graph, softmax.inputs[0], data) if isinstance(softmax, Softmax) else None
    if found is None:
        return None
    scores, scale, masks = found
    if graph.nodes[scores.inputs[0]].shape[-1] != product.shape[-1]:
        return None  # values of other widths than keys: products like any others
    made: list[Node] = []
    while len(masks) > 1:
        shapes = [graph.nodes[name].shape if name in graph.nodes else made[-1].shape for name in masks[:2]]
        both = Add(
            name=f"{product.name}.mask{len(masks)}", inputs=tuple(masks[:2]), source=product.source, origin=product.origin,
            shape=tuple(torch.broadcast_shapes(*shapes)),
        )  # fmt: skip
        made.append(both)
        masks = [both.name, *masks[2:]]
    q, kt = scores.inputs
    layout = Layout.contiguous(graph.nodes[kt].shape)
    rank = len(layout.dims)
    layout = layout.permute((*range(rank - 2), rank - 1, rank - 2))
    k = View(
        name=f"{product.name}.k", inputs=(kt,), shape=layout.shape, source=product.source, origin=product.origin, layout=layout
    )
    inputs = (q, k.name, product.inputs[1], *masks)
    whole = ScaledDotProduct(
        name=product.name, inputs=inputs, shape=product.shape, source=product.source, scale=scale, origin=product.origin
    )
    return [*made, k, whole]


def _scores(graph: Graph, name: str, data: set[str]) -> tuple[MatMul, float, list[str]] | None:
    """The product q kT below a softmax, its scale, and what is added to it; None if there is more."""
    node, scale, masks = graph.nodes[name], 1.0, []
    while not isinstance(node, MatMul):
        if isinstance(node, Scale):
            scale *= node.factor
        elif isinstance(node, Add) and scale == 1:
            masks += [operand for operand in node.inputs if operand not in data]
        else:
            return None
        below = [operand for operand in node.inputs if operand in data]
        if len(below) != 1:
            return None
        node = graph.nodes[below[0]]
    return node, scale, masks


def _data_nodes(graph: Graph) -> set[str]:
    """Names of what a product, Linear or softmax went into: no mask."""
    found: set[str] = set()
    for node in graph.nodes.values():
        if isinstance(node, Linear | MatMul | Softmax) or found.intersection(node.inputs):
            found.add(node.name)
    return found


def match_heads(graph: Graph) -> Graph:
    """ScaledDotProduct of head splits of (B, S, C) tensors becomes `Attention` and a split of its result.

    One at a time, so that the next one sees a (B, S, C) tensor where it reads the result of the one before.
    """
    for name, node in list(graph.nodes.items()):
        node = graph.nodes.get(name, node)
        if not isinstance(node, ScaledDotProduct):
            continue
        whole = _heads(graph, node)
        made = gathered_heads(graph, node) if whole is None else list(whole)
        if made:
            nodes, outputs = _replaced(graph, node.name, made)
            graph = sink_views(graph.rewrite(nodes, outputs=outputs))
    return graph


def _replaced(graph: Graph, name: str, made: list[Node]) -> tuple[list[Node], tuple[str, ...]]:
    """The graph's nodes and outputs with others in place of one: the last wherever it was read."""
    renamed = {name: made[-1].name}
    nodes: list[Node] = []
    for node in graph.nodes.values():
        inputs = tuple(renamed.get(item, item) for item in node.inputs)
        nodes += made if node.name == name else [replace(node, inputs=inputs)]
    return nodes, tuple(renamed.get(name, name) for name in graph.outputs)


def _heads(graph: Graph, node: ScaledDotProduct) -> tuple[Attention, View] | None:
    bases, layouts = zip(*(_unsplit(graph, name) for name in node.inputs[:3]), strict=True)
    q, k, v = (graph.nodes[name] for name in bases)
    *lead, rows, width = node.shape
    channels, keys, kv_channels = q.shape[-1], graph.nodes[node.inputs[1]].shape[-2], k.shape[-1]
    batch = q.shape[0] if len(q.shape) == 3 else 1
    for tensor, length, size in ((q, rows, channels), (k, keys, kv_channels), (v, keys, kv_channels)):
        if tensor.shape != ((batch, length, size) if len(q.shape) == 3 else (length, size)):
            return None
    if channels % width or kv_channels % width or channels % kv_channels:
        return None
    heads, groups = channels // width, kv_channels // width
    split, split_keys = (
        Layout.contiguous((batch, length, count, width)).permute((0, 2, 1, 3))
        for length, count in ((rows, heads), (keys, groups))
    )
    split_keys = split_keys.repeat(1, heads // groups) if groups < heads else split_keys
    try:
        wanted = [split.reshape((*lead, rows, width)), *[split_keys.reshape((*lead, keys, width))] * 2]
    except LayoutError:
        return None
    mask = node.inputs[3:]
    if list(layouts) != wanted or (mask and graph.nodes[mask[0]].shape != (batch, 1, keys)):
        return None
    whole = Attention(
        name=node.name,
        inputs=(*bases, *mask),
        shape=q.shape,
        source=node.source,
        origin=node.origin,
        heads=heads,
        kv_heads=None if groups == heads else groups,
        scale=node.scale,
        bias=None if node.bias is None else common_bias(node.bias.reshape(batch, heads, rows, keys)),
    )
    layout = split.reshape(tuple(node.shape))
    return whole, View(
        name=f"{node.name}.heads", inputs=(whole.name,), shape=node.shape, source=node.source, layout=layout, origin=node.origin
    )


def _unsplit(graph: Graph, name: str) -> tuple[str, Layout]:
    """The tensor that a view shows, and how; the tensor itself if it is no view."""
    node = graph.nodes[name]
    if isinstance(node, View):
        return node.inputs[0], node.layout
    return name, Layout.contiguous(node.shape)
