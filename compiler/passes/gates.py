"""expand_gates: the product of two activations as sums and functions of one element, which the accelerator has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from compiler.graph import Activation, Add, Aten, Constant, Function, Graph, Input, Node

__all__ = ["expand_gates"]

SQUARE = Function("quarter_square", lambda x: x * x / 4)
MINUS_SQUARE = Function("minus_quarter_square", lambda x: -(x * x) / 4)
NEGATIVE = Function("negative", lambda x: -x)


def expand_gates(graph: Graph) -> Graph:
    """``a * b`` of equal shapes becomes ``(a + b)^2 / 4 - (a - b)^2 / 4``."""
    nodes: list[Node] = []
    for node in graph.nodes.values():
        nodes += _quarter_squares(node) if _is_gate(node, graph) else [node]
    return graph.rewrite(nodes)


def _is_gate(node: Node, graph: Graph) -> bool:
    if not isinstance(node, Aten) or node.target is not torch.ops.aten.mul.Tensor or len(set(node.inputs)) != 2:
        return False
    operands = [graph.nodes[name] for name in node.inputs]
    return all(
        item.shape == node.shape
        and not isinstance(item, Constant)
        and not (isinstance(item, Input) and not item.dtype.is_floating_point)
        for item in operands
    )


def _quarter_squares(node: Node) -> list[Node]:
    a, b = node.inputs
    common: dict[str, Any] = {"shape": node.shape, "source": node.source, "origin": node.origin}

    def name(part: str) -> str:
        return f"{node.name}.{part}"

    return [
        Add(name=name("sum"), inputs=(a, b), **common),
        Activation(name=name("plus"), inputs=(name("sum"),), function=SQUARE, **common),
        Activation(name=name("negative"), inputs=(b,), function=NEGATIVE, **common),
        Add(name=name("difference"), inputs=(a, name("negative")), **common),
        Activation(name=name("minus"), inputs=(name("difference"),), function=MINUS_SQUARE, **common),
        replace(Add(name=node.name, inputs=(name("plus"), name("minus")), **common)),
    ]
