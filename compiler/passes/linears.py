"""fold_biases, split_linears, fold_scales: rewrites of the weights of Linear layers."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from compiler.graph import Add, Attention, Constant, Graph, Linear, Mul, Node, Scale, View
from compiler.layout import Layout

__all__ = ["fold_biases", "fold_scales", "split_linears"]


def fold_biases(graph: Graph) -> Graph:
    """``Linear(x) + c`` and ``Linear(x) * c`` with a constant vector c become one Linear."""
    users = graph.users()
    renamed: dict[str, str] = {}
    nodes = dict(graph.nodes)
    for node in graph.nodes.values():
        if not isinstance(node, Add | Mul):
            continue
        for x, c in (node.inputs, node.inputs[::-1]):
            linear, constant = nodes[renamed.get(x, x)], nodes[c]
            single = len(users[x]) == 1 and x not in graph.outputs
            if (
                single
                and isinstance(linear, Linear)
                and isinstance(constant, Constant)
                and constant.shape == node.shape[-1:]
            ):
                nodes[linear.name] = _joined(linear, constant.value, multiply=isinstance(node, Mul))
                renamed[node.name] = linear.name
                break
    return graph.rewrite((node for node in nodes.values() if node.name not in renamed), renamed=renamed)


def _joined(linear: Linear, value: Tensor, *, multiply: bool) -> Linear:
    if not multiply:
        return replace(linear, bias=value if linear.bias is None else linear.bias + value)
    return replace(linear, weight=linear.weight * value[:, None], bias=None if linear.bias is None else linear.bias * value)


def split_linears(graph: Graph) -> Graph:
    """A Linear read only as ranges of channels (packed q, k, v) becomes a Linear for each range."""
    users = graph.users()
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        if isinstance(node, View) and isinstance(linear := graph.nodes[node.inputs[0]], Linear):
            ranges = [_channels(user, linear) for user in users[linear.name]]
            if (
                linear.name not in graph.outputs
                and None not in ranges
                and any(r != (0, linear.shape[-1]) for r in ranges)
            ):
                part = _part(linear, *_channels(node, linear))  # type: ignore[misc]
                nodes.setdefault(part.name, part)
                node = replace(
                    node, inputs=(part.name,), layout=_cut(node.layout, linear.shape[-1], part.shape[-1])
                )
        nodes[node.name] = node
    return graph.rewrite(nodes.values())


def _channels(user: Node, linear: Linear) -> tuple[int, int] | None:
    """Range of channels that a view of a Linear shows; None if it is no range."""
    if not isinstance(user, View):
        return None
    width = linear.shape[-1]
    inner = sorted((stride, size) for dim in user.layout.dims for size, stride in dim if 0 < stride < width)
    reach = 1
    for stride, size in inner:
        if stride != reach:
            return None
        reach *= size
    if any(stride % width for dim in user.layout.dims for _, stride in dim if stride >= width):
        return None
    start = user.layout.offset % width
    return (start, start + reach) if start + reach <= width else None


def _part(linear: Linear, start: int, stop: int) -> Linear:
    if (start, stop) == (0, linear.shape[-1]):
        return linear
    suffix = f"[{start}:{stop}]"
    return replace(
        linear,
        name=linear.name + suffix,
        source=linear.source + suffix,
        shape=(*linear.shape[:-1], stop - start),
        weight=linear.weight[start:stop],
        bias=None if linear.bias is None else linear.bias[start:stop],
    )


def _cut(layout: Layout, width: int, new: int) -> Layout:
    """The layout over rows of ``width`` channels, for rows that hold only the ``new`` channels it shows."""
    dims = tuple(
        tuple((size, stride if stride < width else stride // width * new) for size, stride in dim)
        for dim in layout.dims
    )
    return Layout(dims, layout.offset // width * new)


def fold_scales(graph: Graph) -> Graph:
    """A scale of q or k goes into the attention, one after a Linear into its weight."""
    nodes = dict(graph.nodes)
    for node in graph.nodes.values():
        if isinstance(node, Attention):
            nodes[node.name] = _absorb(nodes, node)
    graph = graph.rewrite(nodes.values())
    users, nodes = graph.users(), dict(graph.nodes)
    renamed: dict[str, str] = {}
    for node in graph.nodes.values():
        if not isinstance(node, Scale):
            continue
        origin = nodes[renamed.get(node.inputs[0], node.inputs[0])]
        if (
            isinstance(origin, Linear)
            and len(users[node.inputs[0]]) == 1
            and node.inputs[0] not in graph.outputs
        ):
            nodes[origin.name] = replace(
                origin, weight=origin.weight * node.factor, bias=_times(origin.bias, node.factor)
            )
            renamed[node.name] = origin.name
    return graph.rewrite((node for node in nodes.values() if node.name not in renamed), renamed=renamed)


def _absorb(nodes: dict[str, Node], attention: Attention) -> Attention:
    """Attention with the scales of its q and k in its own; it can only have a positive one."""
    operands, scale = list(attention.inputs), attention.scale
    for i in range(2):
        while isinstance(origin := nodes[operands[i]], Scale) and origin.factor > 0:
            scale *= origin.factor
            operands[i] = origin.inputs[0]
    return replace(attention, inputs=tuple(operands), scale=scale)


def _times(bias: Tensor | None, factor: float) -> Tensor | None:
    return None if bias is None else bias * factor
