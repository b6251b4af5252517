"""broadcast_operands: both operands of a product or a sum get its shape, so that channel and pixel attention are like others."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch

from compiler.graph import Activation, Add, Aten, Constant, Graph, Linear, MatMul, Move, Node, Scale, View
from compiler.layout import Layout
from compiler.passes.elementwise import is_mask

__all__ = ["broadcast_operands"]


def broadcast_operands(graph: Graph) -> Graph:
    """``x * y`` and ``x + y`` of images (batch, channels, height, width), of lines and of rows become one of rows (batch, rows,
    channels): rows of an operand with fewer batch entries or pixels are repeated, one channel becomes all by a Linear of ones."""
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        for made in _broadcast(node, nodes) or [node]:
            nodes[made.name] = made
    return graph.rewrite(nodes.values())


def _broadcast(node: Node, nodes: dict[str, Node]) -> list[Node] | None:
    """The nodes that stand for a product or a sum, the last one under its name; None if there is nothing to repeat."""
    product = isinstance(node, Aten) and node.target is torch.ops.aten.mul.Tensor
    if not (product or isinstance(node, Add)) or len(set(node.inputs)) != 2:
        return None
    operands = [nodes[name] for name in node.inputs]
    data = [x for x in operands if not isinstance(x, Constant)]
    if not data or any(is_mask(x, nodes) for x in data) or not 2 <= len(node.shape) <= 4:
        return None
    equal = all(x.shape == node.shape for x in data)
    if equal and len(data) == 1:
        return None
    if not product and (equal or any(_is_scores(x, nodes) for x in operands)):
        return None
    made: list[Node] = []
    shape = node.shape if len(node.shape) > 2 else (1, *node.shape)
    operands = [_of_rank(node, x, len(shape), made) for x in operands]
    whole = min(operands, key=lambda x: (isinstance(x, Constant), x.shape != shape))
    order = _order(whole, len(shape), {**nodes, **{item.name: item for item in made}})
    if order == tuple(range(3)) and equal:
        return None
    names = [_repeated(node, x, shape, order, made) for x in operands]
    done = replace(node, name=f"{node.name}.rows", inputs=tuple(names), shape=_row_shape(shape, order))
    sizes = [shape[d] for d in order]
    layout = Layout.contiguous(tuple(sizes)).permute(tuple(order.index(d) for d in range(len(order))))
    return [*made, done, _view(node, done, layout.reshape(node.shape), node.name)]


def _is_scores(x: Node, nodes: dict[str, Node]) -> bool:
    """Whether a value is a product of activations, as it is or scaled: what is added to it is a mask or a bias of attention."""
    while isinstance(x, Scale | Add | View):
        x = nodes[x.inputs[0]]
    return isinstance(x, MatMul)


def _of_rank(node: Node, x: Node, rank: int, made: list[Node]) -> Node:
    """An operand with ones before its dimensions; adds the node that makes it."""
    if len(x.shape) == rank or isinstance(x, Constant):
        return x
    layout = Layout.contiguous(x.shape).reshape((1,) * (rank - len(x.shape)) + x.shape)
    made.append(_view(node, x, layout, f"{node.name}.{x.name}.ranked"))
    return made[-1]


def _order(x: Node, rank: int, nodes: dict[str, Node]) -> tuple[int, ...]:
    """The dimensions of a result with the channels last."""
    while (isinstance(x, Activation | Scale | Add | Move) or _is_range(x, nodes)) and len(nodes[x.inputs[0]].shape) == rank:
        x = nodes[x.inputs[0]]
    channels_last = isinstance(x, View) and x.layout.dims[-1] == (((x.shape[-1], 1),) if x.shape[-1] > 1 else ())
    if rank == 4 and x.shape[1] > x.shape[-1] == 1:
        channels_last = False
    if rank == 3:
        channels_last = channels_last or not (isinstance(x, View) and x.layout.dims[1] == ((x.shape[1], 1),))
    return tuple(range(rank)) if channels_last else (0, *range(2, rank), 1)


def _is_range(x: Node, nodes: dict[str, Node]) -> bool:
    """Whether a view takes ranges of dimensions, perhaps with steps, and leaves each in its place."""
    if not isinstance(x, View):
        return False
    base = Layout.contiguous(nodes[x.inputs[0]].shape).dims
    pairs = zip(x.layout.dims, base, strict=False)
    return len(x.layout.dims) == len(base) and all(
        not mine or (len(mine) == len(theirs) == 1 and mine[0][1] % theirs[0][1] == 0 and mine[0][0] <= theirs[0][0])
        for mine, theirs in pairs
    )


def _row_shape(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], prod(shape[d] for d in order[1:-1]), shape[order[-1]])


def _repeated(node: Node, x: Node, shape: tuple[int, ...], order: tuple[int, ...], made: list[Node]) -> str:
    """An operand as rows of channels of the result's shape; adds the nodes that make it."""
    if isinstance(x, Constant):
        value = x.value.expand(shape).permute(order).reshape(_row_shape(shape, order))
        made.append(replace(x, name=f"{node.name}.{x.name}.rows", shape=tuple(value.shape), value=value))
        return made[-1].name
    sizes = tuple(x.shape[d] for d in order)
    layout = Layout.contiguous(x.shape).permute(order).reshape(_row_shape(x.shape, order))
    name = f"{node.name}.{x.name}"
    rows: Node = _view(node, x, layout, f"{name}.rows")
    made.append(rows)
    channels = shape[order[-1]]
    if sizes[-1] == 1 < channels:
        rows = Linear(
            name=f"{name}.channels", inputs=(rows.name,), shape=(*rows.shape[:2], channels), source=node.source,
            origin=node.origin, weight=torch.ones(channels, 1), bias=None,
        )  # fmt: skip
        made.append(rows)
        sizes = (*sizes[:-1], channels)
    repeated = Layout.contiguous(sizes)
    for place, dim in enumerate(order):
        if sizes[place] != shape[dim]:
            repeated = repeated.expand(place, shape[dim])
    if repeated.shape != sizes:
        rows = _view(node, rows, repeated.reshape(_row_shape(shape, order)), f"{name}.repeated")
        made.append(rows)
    return rows.name


def _view(node: Node, x: Node, layout: Layout, name: str) -> View:
    fields: dict[str, Any] = {"source": node.source, "origin": node.origin}
    return View(name=name, inputs=(x.name,), shape=layout.shape, layout=layout, **fields)
