"""match_scores and match_heads: attention written out becomes `ScaledDotProduct`, then `Attention`."""

from __future__ import annotations

from dataclasses import replace

from compiler.graph import (
    Add,
    Attention,
    Constant,
    Graph,
    Input,
    KeyMask,
    Linear,
    MatMul,
    Node,
    Scale,
    ScaledDotProduct,
    Softmax,
    View,
)
from compiler.layout import Layout, LayoutError

__all__ = ["match_heads", "match_scores"]


def match_scores(graph: Graph) -> Graph:
    """``softmax(q @ kT [* scale] [+ mask]) @ v`` becomes one node."""
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
    if not isinstance(softmax, Softmax):
        return None
    scores, masks, scale = graph.nodes[softmax.inputs[0]], [], 1.0
    while not isinstance(scores, MatMul):
        if isinstance(scores, Scale) and not masks:
            scale *= scores.factor
        elif isinstance(scores, Scale):
            return None  # a scaled sum of scores and mask
        elif isinstance(scores, Add):
            mask = [name for name in scores.inputs if name not in data]
            if len(mask) != 1 or masks:
                return None
            masks = mask
        else:
            return None
        place = next(name for name in scores.inputs if name not in masks)
        scores = graph.nodes[place]
    if masks:
        scale = _scale_below(graph, softmax, masks[0])
    q, kt = scores.inputs
    layout = Layout.contiguous(graph.nodes[kt].shape)
    rank = len(layout.dims)
    layout = layout.permute((*range(rank - 2), rank - 1, rank - 2))
    k = View(name=f"{product.name}.k", inputs=(kt,), shape=layout.shape, source=product.source, layout=layout)
    whole = ScaledDotProduct(
        name=product.name, inputs=(q, k.name, product.inputs[1], *masks), shape=product.shape, source=product.source, scale=scale
    )
    return [k, whole]


def _scale_below(graph: Graph, softmax: Softmax, mask: str) -> float:
    """Product of the scales between the scores and the product q kT."""
    node, scale = graph.nodes[softmax.inputs[0]], 1.0
    while not isinstance(node, MatMul):
        scale *= node.factor if isinstance(node, Scale) else 1.0
        node = graph.nodes[next(name for name in node.inputs if name != mask)]
    return scale


def _data_nodes(graph: Graph) -> set[str]:
    """Names of what depends on a Linear, a norm or float data of more than two dimensions: no mask."""
    found: set[str] = set()
    for node in graph.nodes.values():
        if isinstance(node, Linear | MatMul | Softmax) or found.intersection(node.inputs):
            found.add(node.name)
    return found


def match_heads(graph: Graph) -> Graph:
    """ScaledDotProduct of head splits of (B, S, C) tensors becomes `Attention` and a head split of its result."""
    nodes: list[Node] = []
    split: dict[str, str] = {}  # attention -> the view of it that has the value of the ScaledDotProduct
    for node in graph.nodes.values():
        found = _heads(graph, node) if isinstance(node, ScaledDotProduct) else None
        node = replace(node, inputs=tuple(split.get(name, name) for name in node.inputs))
        nodes.extend(found or [node])
        if found is not None:
            split[node.name] = found[1].name
    return graph.rewrite(nodes, outputs=tuple(split.get(name, name) for name in graph.outputs))


def _heads(graph: Graph, node: ScaledDotProduct) -> tuple[Attention, View] | None:
    bases, layouts = zip(*(_unsplit(graph, name) for name in node.inputs[:3]), strict=True)
    q, k, v = (graph.nodes[name] for name in bases)
    *lead, rows, width = node.shape
    channels = q.shape[-1]
    if not (q.shape == k.shape == v.shape) or channels % width or len(q.shape) not in (2, 3) or q.shape[-2] != rows:
        return None
    heads, batch = channels // width, q.shape[0] if len(q.shape) == 3 else 1
    split = Layout.contiguous((batch, rows, heads, width)).permute((0, 2, 1, 3))
    try:
        if any(layout != split.reshape((*lead, rows, width)) for layout in layouts):
            return None
    except LayoutError:
        return None
    mask = node.inputs[3:]
    if mask and not (isinstance(graph.nodes[mask[0]], KeyMask) and graph.nodes[mask[0]].shape == (batch, 1, rows)):
        return None
    whole = Attention(
        name=node.name, inputs=(*bases, *mask), shape=q.shape, source=node.source, heads=heads, scale=node.scale
    )
    layout = split.reshape(tuple(node.shape))
    return whole, View(name=f"{node.name}.heads", inputs=(whole.name,), shape=node.shape, source=node.source, layout=layout)


def _unsplit(graph: Graph, name: str) -> tuple[str, Layout]:
    """The tensor that a view shows, and how; the tensor itself if it is no view."""
    node = graph.nodes[name]
    if isinstance(node, View):
        return node.inputs[0], node.layout
    return name, Layout.contiguous(node.shape)
