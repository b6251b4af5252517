"""move_fills: constants joined with data go into a constant that is added to both.

``cat(class token, patches) + positions``: the token has values of its own, often far smaller or larger than the patches', and one
8-bit scale would serve both. ``cat(0, patches) + (positions + cat(class token, 0))`` keeps it in the constant's 16 bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
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
        filled = [x for x in (nodes[name] for name in node.inputs) if isinstance(x, Rearrange) and x.fill is not None]
        joined, constant = [x for x in filled if x.parts], [x for x in filled if not x.parts]
        if joined and constant:
            nodes[constant[0].name] = replace(constant[0], fill=_fill(constant[0]) + _fill(joined[0]))
            nodes[joined[0].name] = replace(joined[0], fill=None)
    return graph.rewrite(nodes.values())


def _fill(node: Rearrange) -> Tensor:
    """The fill, 0 where a part writes."""
    fill = torch.zeros(1) if node.fill is None else node.fill.clone()
    for part in node.parts:
        fill[part.to, part.at : part.at + part.width] = 0
    return fill
