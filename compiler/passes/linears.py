"""fold_biases, split_linears, fold_scales: rewrites of the weights of Linear layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from algo.nm import NM
from compiler.graph import (
    Activation,
    Add,
    Aten,
    Attention,
    Constant,
    Convolution,
    Function,
    Graph,
    LayerNorm,
    Linear,
    MatMul,
    Mul,
    Node,
    Scale,
    ScaledDotProduct,
    View,
)
from compiler.layout import Layout

__all__ = ["fold_biases", "fold_scales", "fold_vectors", "split_linears"]

DIAGONAL = NM("1:32")
"""A product with a vector is a Linear of a diagonal matrix."""


def fold_vectors(graph: Graph) -> Graph:
    """Data times a constant vector of channels goes into the Linear or the norm before it, or becomes a Linear itself."""
    users = graph.users()
    nodes: dict[str, Node] = {}
    data: set[str] = set()
    for node in graph.nodes.values():
        found = _vector(graph, node, data)
        if found is not None:
            x, vector = found
            before = nodes[x]
            alone = len(users[x]) == 1 and x not in graph.outputs
            origin = (*before.origin, *node.origin)
            if alone and isinstance(before, Linear):
                bias = None if before.bias is None else before.bias * vector
                node = replace(before, name=node.name, weight=before.weight * vector[:, None], bias=bias, origin=origin)
            elif alone and isinstance(before, LayerNorm):
                norm = replace(before.norm, gamma=before.norm.gamma * vector, beta=before.norm.beta * vector)
                node = replace(before, name=node.name, norm=norm, origin=origin)
            else:
                pattern = DIAGONAL if len(vector) >= DIAGONAL.m else None
                node = Linear(
                    name=node.name, inputs=(x,), shape=node.shape, source=node.source, origin=node.origin,
                    weight=torch.diag(vector), bias=None, pattern=pattern,
                )  # fmt: skip
        if isinstance(node, Linear | LayerNorm | MatMul | ScaledDotProduct) or data.intersection(node.inputs):
            data.add(node.name)
        nodes[node.name] = node
    return graph.rewrite(nodes.values())


def _vector(graph: Graph, node: Node, data: set[str]) -> tuple[str, Tensor] | None:
    """The data and the constant vector of channels of a product of two such."""
    if not isinstance(node, Aten) or node.target is not torch.ops.aten.mul.Tensor or len(node.inputs) != 2:
        return None
    for x, c in (node.inputs, node.inputs[::-1]):
        constant = graph.nodes[c]
        if x in data and isinstance(constant, Constant) and graph.nodes[x].shape == node.shape:
            if constant.value.numel() == node.shape[-1] == constant.shape[-1]:
                return x, constant.value.detach().float().reshape(-1)
    return None


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
    """A Linear or convolution read only as ranges of channels (packed q, k, v) becomes one for each range."""
    users = graph.users()
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        if isinstance(node, View) and (linear := _product(graph.nodes[node.inputs[0]])) is not None:
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


def _product(node: Node) -> Linear | Convolution | None:
    """A node whose output channels all see the same inputs."""
    return node if isinstance(node, Linear) or (isinstance(node, Convolution) and node.groups == 1) else None


def _channels(user: Node, linear: Node) -> tuple[int, int] | None:
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


def _part(linear: Linear | Convolution, start: int, stop: int) -> Node:
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
    left = [_as_function(node) for node in nodes.values() if node.name not in renamed]
    return graph.rewrite(left, renamed=renamed)


def _as_function(node: Node) -> Node:
    """A scale that is left over as a table."""
    if not isinstance(node, Scale):
        return node
    function = Function(f"times {node.factor:.4g}", partial(torch.mul, other=node.factor))
    return Activation(
        name=node.name, inputs=node.inputs, shape=node.shape, source=node.source, origin=node.origin, function=function
    )


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
