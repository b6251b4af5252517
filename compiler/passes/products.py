"""match_products: products of two activations that belong to no attention."""

from __future__ import annotations

import math
from typing import Any

from compiler.graph import Add, Graph, Input, MatMul, Node, Product, View
from compiler.layout import Layout
from compiler.passes.views import sink_views

__all__ = ["match_products"]


def match_products(graph: Graph) -> Graph:
    """``a @ b`` becomes a `Product` of a and of b with rows and columns changed; one that is added to an input, such as a new row
    to a cache, stays a `MatMul`, whose result has the input's scale."""
    users = graph.users()
    nodes: list[Node] = []
    for node in graph.nodes.values():
        nodes += _product(graph, node) if isinstance(node, MatMul) and not _joins_input(graph, node, users[node.name]) else [node]
    return sink_views(graph.rewrite(nodes))


def _joins_input(graph: Graph, node: MatMul, users: list[Node]) -> bool:
    x, y = (graph.nodes[name] for name in node.inputs)
    plain = len(node.shape) == len(x.shape) == len(y.shape) == 3 and x is not y
    plain &= not any(isinstance(item, View) for item in (x, y))
    alone = len(users) == 1 and isinstance(users[0], Add) and node.name not in graph.outputs
    return plain and alone and any(isinstance(graph.nodes[name], Input) for name in users[0].inputs)


def _product(graph: Graph, node: MatMul) -> list[Node]:
    a, b = (graph.nodes[name] for name in node.inputs)
    *lead, rows, columns = node.shape
    batch, inner = math.prod(lead), a.shape[-1]
    common: dict[str, Any] = {"source": node.source, "origin": node.origin}
    x = Layout.contiguous(a.shape).reshape((batch, rows, inner))
    y = Layout.contiguous(b.shape).reshape((batch, inner, columns)).permute((0, 2, 1))
    made = (batch, rows, columns)
    back = Layout.contiguous(made).reshape(node.shape)
    return [
        View(name=f"{node.name}.x", inputs=(a.name,), shape=x.shape, layout=x, **common),
        View(name=f"{node.name}.y", inputs=(b.name,), shape=y.shape, layout=y, **common),
        Product(name=f"{node.name}.product", inputs=(f"{node.name}.x", f"{node.name}.y"), shape=made, **common),
        View(name=node.name, inputs=(f"{node.name}.product",), shape=node.shape, layout=back, **common),
    ]
