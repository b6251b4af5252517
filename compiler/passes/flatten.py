"""flatten_images: a Linear layer of a whole image, or of all rows of a sequence, becomes a convolution whose kernel is as large."""

from __future__ import annotations

from dataclasses import replace

from compiler.graph import Convolution, Graph, Input, Linear, Node, View
from compiler.layout import Layout

__all__ = ["flatten_images"]


def flatten_images(graph: Graph) -> Graph:
    """``Linear(flatten(x))`` with x (batch, rows, channels), in either order, becomes a convolution of one output pixel. Its
    weights stay N:M where rows follow each other; where channels do, groups would be of several kernel positions, and a pattern
    is given up."""
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        if isinstance(node, Linear) and node.post.is_empty and isinstance(view := nodes[node.inputs[0]], View):
            found = _flattened(view, nodes[view.inputs[0]])
            if found is not None:
                made = _convolution(node, view.inputs[0], nodes[view.inputs[0]].shape, channels_first=found)
                nodes[made.name] = made
                layout = Layout.contiguous(made.shape).reshape(node.shape)
                node = View(name=node.name, inputs=(made.name,), shape=node.shape, source=node.source, layout=layout,
                            origin=view.origin)  # fmt: skip
        nodes[node.name] = node
    return graph.rewrite(nodes.values())


def _flattened(view: View, x: Node) -> bool | None:
    """Whether the channels vary slowest in a view (batch, rows * channels) of x (batch, rows, channels); None if it is no such
    view."""
    if len(x.shape) != 3 or x.shape[1] == 1 or isinstance(x, Input):
        return None
    batch, rows, channels = x.shape
    flat = {(batch, rows * channels), (batch, 1, rows * channels)}
    if view.shape not in flat:
        return None
    whole = Layout.contiguous(x.shape)
    for first, order in ((True, (0, 2, 1)), (False, (0, 1, 2))):
        if view.layout == whole.permute(order).reshape(view.shape):
            return first
    return None


def _convolution(node: Linear, x: str, shape: tuple[int, ...], *, channels_first: bool) -> Convolution:
    batch, rows, channels = shape
    size = (len(node.weight), channels, 1, rows) if channels_first else (len(node.weight), 1, rows, channels)
    weight = node.weight.reshape(size)
    if not channels_first:
        weight = weight.permute(0, 3, 1, 2)
    kept = node.pattern is not None and not channels_first and channels % node.pattern.m == 0
    return Convolution(
        name=f"{node.name}.whole", inputs=(x,), shape=(batch, 1, len(weight)), source=node.source, origin=node.origin,
        weight=weight, bias=node.bias, pattern=node.pattern if kept else None, size=(1, rows), out_size=(1, 1), stride=(1, 1),
        padding=(0, 0), dilation=(1, 1),
    )  # fmt: skip
