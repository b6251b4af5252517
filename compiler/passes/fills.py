"""move_fills: constants joined with data go into a constant that is added to both.

``cat(class token, patches) + positions``: the token has values of its own, often far smaller or larger than the patches', and one
8-bit scale would serve both. ``cat(0, patches) + (positions + cat(class token, 0))`` keeps it in the constant's 16 bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

from torch import Tensor

from compiler.graph import Add, Graph, Node, Rearrange

__all__ = ["move_fills"]


def move_fills(graph: Graph) -> Graph:
    """Fills of copied rows become part of the constant operand of the sum that is their only reader."""
    users = graph.users()
    nodes: dict[str, Node] = dict(graph.nodes)
    for node in graph.nodes.values():
        if not isinstance(node, Add) or any(len(users[name]) > 1 or name in graph.outputs for name in node.inputs):
            continue
        joined, constant = sorted((nodes[name] for name in node.inputs), key=_is_constant)
        if _is_constant(constant) and isinstance(joined, Rearrange) and joined.parts and joined.fill is not None:
            nodes[constant.name] = replace(constant, fill=constant.fill + _unwritten(joined, joined.fill))
            nodes[joined.name] = replace(joined, fill=None)
    return graph.rewrite(nodes.values())


def _is_constant(node: Node) -> TypeGuard[Rearrange]:
    return isinstance(node, Rearrange) and not node.parts


def _unwritten(joined: Rearrange, fill: Tensor) -> Tensor:
    """The fill, 0 where a part writes."""
    kept = fill.clone()
    for part in joined.parts:
        kept[part.to, part.at : part.at + part.width] = 0
    return kept
