"""broadcast_products: both operands of a product get its shape, so that channel and pixel attention are products like others."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch

from compiler.graph import Activation, Add, Aten, Constant, Graph, Linear, Node, Scale, View
from compiler.layout import Layout
from compiler.passes.elementwise import is_mask

__all__ = ["broadcast_products"]


def broadcast_products(graph: Graph) -> Graph:
    """``x * y`` of images (batch, channels, height, width), of lines and of rows becomes one of rows (batch, rows, channels):
    rows of an operand with fewer pixels are repeated, one channel becomes all by a Linear of ones."""
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        for made in _broadcast(node, nodes) or [node]:
            nodes[made.name] = made
    return graph.rewrite(nodes.values())


def _broadcast(node: Node, nodes: dict[str, Node]) -> list[Node] | None:
    """The nodes that stand for a product, the last one under its name; None if there is nothing to repeat."""
    if not isinstance(node, Aten) or node.target is not torch.ops.aten.mul.Tensor or len(set(node.inputs)) != 2:
        return None
    operands = [nodes[name] for name in node.inputs]
    if any(isinstance(x, Constant) or is_mask(x, nodes) for x in operands):
        return None
    if len(node.shape) not in (3, 4) or any(len(x.shape) != len(node.shape) or x.shape[0] != node.shape[0] for x in operands):
        return None
    whole = next((x for x in operands if x.shape == node.shape), operands[0])
    order = _order(whole, len(node.shape), nodes)
    if order == tuple(range(3)) and all(x.shape == node.shape for x in operands):
        return None
    made: list[Node] = []
    names = [_repeated(node, x, order, made) for x in operands]
    rows = _row_shape(node.shape, order)
    product = replace(node, name=f"{node.name}.rows", inputs=tuple(names), shape=rows)
    sizes = [node.shape[d] for d in order]
    layout = Layout.contiguous(tuple(sizes)).permute(tuple(order.index(d) for d in range(len(order))))
    return [*made, product, _view(node, product, layout, node.name)]


def _order(x: Node, rank: int, nodes: dict[str, Node]) -> tuple[int, ...]:
    """The dimensions of a product with the channels last."""
    while isinstance(x, Activation | Scale | Add):
        x = nodes[x.inputs[0]]
    channels_last = isinstance(x, View) and x.layout.dims[-1] == (((x.shape[-1], 1),) if x.shape[-1] > 1 else ())
    if rank == 3:
        channels_last = channels_last or not (isinstance(x, View) and x.layout.dims[1] == ((x.shape[1], 1),))
    return tuple(range(rank)) if channels_last else (0, *range(2, rank), 1)


def _row_shape(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], prod(shape[d] for d in order[1:-1]), shape[order[-1]])


def _repeated(node: Node, x: Node, order: tuple[int, ...], made: list[Node]) -> str:
    """An operand as rows of channels of the product's shape; adds the nodes that make it."""
    sizes = tuple(x.shape[d] for d in order)
    layout = Layout.contiguous(x.shape).permute(order).reshape(_row_shape(x.shape, order))
    name = f"{node.name}.{x.name}"
    rows: Node = _view(node, x, layout, f"{name}.rows")
    made.append(rows)
    channels = node.shape[order[-1]]
    if sizes[-1] == 1 < channels:
        rows = Linear(
            name=f"{name}.channels", inputs=(rows.name,), shape=(*rows.shape[:2], channels), source=node.source,
            origin=node.origin, weight=torch.ones(channels, 1), bias=None,
        )  # fmt: skip
        made.append(rows)
        sizes = (*sizes[:-1], channels)
    repeated = Layout.contiguous(sizes)
    for place, dim in enumerate(order):
        if sizes[place] != node.shape[dim]:
            repeated = repeated.expand(place, node.shape[dim])
    if repeated.shape != sizes:
        rows = _view(node, rows, repeated.reshape(_row_shape(node.shape, order)), f"{name}.repeated")
        made.append(rows)
    return rows.name


def _view(node: Node, x: Node, layout: Layout, name: str) -> View:
    fields: dict[str, Any] = {"source": node.source, "origin": node.origin}
    return View(name=name, inputs=(x.name,), shape=layout.shape, layout=layout, **fields)
