"""sink_views and drop_views: reshapes and transposes move towards the end until they cancel."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from compiler.graph import Activation, Add, Fixed, Graph, LayerNorm, Linear, Mul, Node, Scale, Softmax, View
from compiler.layout import Layout, LayoutError

__all__ = ["drop_views", "regrouped", "sink_views"]


def sink_views(graph: Graph) -> Graph:
    """``op(view(x))`` becomes ``view(op(x))`` where op works on rows or elements; two views become one."""
    nodes: dict[str, Node] = {}
    now: dict[str, str] = {}  # name in the given graph -> name of the same value in the new one
    for original in graph.nodes.values():
        node = replace(original, inputs=tuple(now.get(name, name) for name in original.inputs))
        view = _lifted_view(node, nodes)
        if view is not None:
            inner, node = _swapped(node, view, nodes)
            nodes[inner.name] = inner
        if isinstance(node, View):
            node = _merged(node, nodes)
            base = nodes[node.inputs[0]]
            node = base if node.layout == Layout.contiguous(base.shape) else node
        nodes[node.name] = node
        now[original.name] = node.name
    return graph.rewrite(nodes.values(), outputs=tuple(now.get(name, name) for name in graph.outputs))


def drop_views(graph: Graph) -> Graph:
    """Sink the views again, now that head splits meet merges; reshaping an output is left to the host."""
    graph = sink_views(graph)
    renamed: dict[str, str] = {}  # as outputs alone: other operators read the view
    for name in graph.outputs:
        node = graph.nodes[name]
        if isinstance(node, View) and node.layout.is_contiguous() and prod(node.shape) == prod(graph.nodes[node.inputs[0]].shape):
            renamed[name] = node.inputs[0]
    return graph.rewrite(graph.nodes.values(), outputs=tuple(renamed.get(name, name) for name in graph.outputs))


def _lifted_view(node: Node, nodes: dict[str, Node]) -> View | None:
    """The view that all operands of a node share, if the node lets it pass."""
    if not isinstance(node, Linear | LayerNorm | Activation | Scale | Softmax | Add | Mul):
        return None
    views = [nodes[name] for name in node.inputs if not isinstance(nodes[name], Fixed)]
    if not views:
        return None
    first = views[0]
    if not isinstance(first, View):
        return None
    for other in views[1:]:
        same = isinstance(other, View) and other.layout == first.layout
        if not same or nodes[other.inputs[0]].shape != nodes[first.inputs[0]].shape:
            return None
    base = nodes[first.inputs[0]]
    if prod(base.shape) != prod(first.shape):
        return None  # a slice: the operator would do more work than before
    if len(views) < len(node.inputs) and any(stride == 0 for dim in first.layout.dims for _, stride in dim):
        return None  # a constant of the view's shape is none of the base's
    if (
        isinstance(node, Linear | LayerNorm | Softmax)
        and regrouped(first.layout, base.shape[-1], base.shape[-1]) is None
    ):
        return None
    return first


def _swapped(node: Node, view: View, nodes: dict[str, Node]) -> tuple[Node, View]:
    """``op(x)`` under the name of the node, and the view of it that has the node's value."""
    base = nodes[view.inputs[0]]
    layout, shape = view.layout, base.shape
    if isinstance(node, Linear):
        shape = (*base.shape[:-1], node.shape[-1])
        regroup = regrouped(layout, base.shape[-1], node.shape[-1])
        layout = layout if regroup is None else regroup
    inner = replace(node, inputs=tuple(_below(name, view, nodes) for name in node.inputs), shape=shape)
    outer = View(
        name=f"{node.name}.view", inputs=(node.name,), shape=node.shape, source=node.source, layout=layout, origin=view.origin
    )
    return inner, outer


def _below(name: str, view: View, nodes: dict[str, Node]) -> str:
    """What a view shows; of a constant, one of the base's shape that the view would show as it is."""
    node = nodes[name]
    if not isinstance(node, Fixed):
        return node.inputs[0]
    shape = nodes[view.inputs[0]].shape
    moved = replace(node, name=f"{name}.below", shape=shape, value=view.layout.inverse(node.value, shape))
    while moved.name in nodes:
        moved = replace(moved, name=f"{moved.name}.2")
    nodes[moved.name] = moved
    return moved.name


def _merged(view: View, nodes: dict[str, Node]) -> View:
    """A view of a view as one, where a layout can express it."""
    while isinstance(base := nodes[view.inputs[0]], View):
        try:
            both = tuple(dict.fromkeys((*view.origin, *base.origin)))
            view = replace(view, inputs=base.inputs, layout=view.layout.compose(base.layout), origin=both)
        except LayoutError:
            return view
    return view


def regrouped(layout: Layout, channels: int, new: int) -> Layout | None:
    """A layout that moves whole rows of ``channels``, for rows of ``new`` channels; None if it does not."""
    *rows, last = layout.dims
    if last != (((channels, 1),) if channels > 1 else ()):
        return None
    strides = [stride for dim in rows for _, stride in dim]
    if layout.offset % channels or any(stride % channels for stride in strides):
        return None
    dims = tuple(tuple((size, stride // channels * new) for size, stride in dim) for dim in rows)
    return Layout((*dims, ((new, 1),) if new > 1 else ()), layout.offset // channels * new)
