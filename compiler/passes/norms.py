"""match_norms: a root mean square norm written out becomes one `LayerNorm` node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from compiler.graph import Add, Aten, Constant, Graph, LayerNorm, Node, Norm, Operand

__all__ = ["NORM_PARTS", "VARIANCES", "match_norms"]

aten = torch.ops.aten

VARIANCES = frozenset({aten.var.dim, aten.var.correction, aten.var_mean.dim, aten.var_mean.correction})

NORM_PARTS = VARIANCES | {aten.mean.dim, aten.rsqrt.default}
"""Operators that only ever run on the accelerator as parts of a norm."""

_SUMS = (aten.add.Tensor, aten.add.Scalar)

Nodes = Mapping[str, Node]


def match_norms(graph: Graph) -> Graph:
    """``x * rsqrt(mean(x^2) + eps)`` becomes an RMSNorm; constant vectors that a norm is multiplied with, or that are added,
    become parts of it."""
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        nodes[node.name] = _normalised(node, nodes) or _scaled(node, nodes) or _shifted(node, nodes) or node
    return graph.rewrite(nodes.values())


def _normalised(node: Node, nodes: Nodes) -> Node | None:
    """``x * rsqrt(mean(x^2) + eps)`` without a weight."""
    if not _is(node, aten.mul.Tensor) or len(node.inputs) != 2:
        return None
    for x, factor in (node.inputs, node.inputs[::-1]):
        eps = _eps(nodes[factor], x, nodes)
        if eps is not None and nodes[x].shape == node.shape:
            channels = node.shape[-1]
            norm = Norm(torch.ones(channels), torch.zeros(channels), eps, rms=True)
            return LayerNorm(name=node.name, inputs=(x,), shape=node.shape, source=node.source, origin=node.origin, norm=norm)
    return None


def _scaled(node: Node, nodes: Nodes) -> Node | None:
    """A norm times a constant vector."""
    if not _is(node, aten.mul.Tensor) or len(node.inputs) != 2:
        return None
    for x, weight in (node.inputs, node.inputs[::-1]):
        norm, constant = nodes[x], nodes[weight]
        if isinstance(norm, LayerNorm) and norm.shape == node.shape and _is_vector(constant, node):
            factors = constant.value.reshape(-1)  # type: ignore[attr-defined]
            parts = replace(norm.norm, gamma=norm.norm.gamma * factors, beta=norm.norm.beta * factors)
            return replace(norm, name=node.name, source=node.source, origin=(*norm.origin, *node.origin), norm=parts)
    return None


def _shifted(node: Node, nodes: Nodes) -> Node | None:
    """A norm and a constant vector."""
    if not isinstance(node, Add) or len(node.inputs) != 2:
        return None
    for x, bias in (node.inputs, node.inputs[::-1]):
        norm, constant = nodes[x], nodes[bias]
        if isinstance(norm, LayerNorm) and norm.shape == node.shape and _is_vector(constant, node):
            parts = replace(norm.norm, beta=norm.norm.beta + constant.value.reshape(-1))  # type: ignore[attr-defined]
            return replace(norm, name=node.name, source=node.source, origin=(*norm.origin, *node.origin), norm=parts)
    return None


def _is(node: Node, target: Any) -> bool:
    return isinstance(node, Aten) and node.target is target


def _is_vector(node: Node, like: Node) -> bool:
    return isinstance(node, Constant) and node.value.numel() == like.shape[-1] == node.shape[-1]


def _eps(node: Node, x: str, nodes: Nodes) -> float | None:
    """eps of ``rsqrt(mean(x^2) + eps)``; None if the node is something else."""
    if _is(node, aten.reciprocal.default) and _is(nodes[node.inputs[0]], aten.sqrt.default):
        node = nodes[node.inputs[0]]
    elif not _is(node, aten.rsqrt.default):
        return None
    total = nodes[node.inputs[0]]
    if not isinstance(total, Add) and (not isinstance(total, Aten) or total.target not in _SUMS or total.kwargs):
        return None
    eps = next((item for item in total.args if isinstance(item, int | float)), None) if isinstance(total, Aten) else None
    constants = [c.value for name in total.inputs if isinstance(c := nodes[name], Constant) and c.value.numel() == 1]
    if eps is None and constants:
        eps = float(constants[0])
    others = [nodes[name] for name in total.inputs if not isinstance(nodes[name], Constant)]
    if eps is None or len(others) != 1:
        return None
    (mean,) = others
    rank = len(nodes[x].shape)
    if not isinstance(mean, Aten) or mean.target is not aten.mean.dim or len(mean.args) != 3 or not mean.args[2]:
        return None
    if [dim % rank for dim in mean.args[1]] != [rank - 1]:
        return None
    square = nodes[mean.inputs[0]]
    powered = _is(square, aten.pow.Tensor_Scalar) and square.args == (Operand(0), 2)  # type: ignore[attr-defined]
    same = _is(square, aten.mul.Tensor) and set(square.inputs) == {x}
    return eps if (powered or same or _is(square, aten.square.default)) and square.inputs[0] == x else None
