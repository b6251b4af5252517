"""fold_functions: arithmetic on the elements of one tensor becomes one `Function`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.graph import Activation, Add, Aten, Constant, Function, Graph, Input, Node, Scale

__all__ = ["POINTWISE", "fold_functions"]

aten = torch.ops.aten

POINTWISE = frozenset(
    {
        *(
            aten.mul.Tensor,
            aten.mul.Scalar,
            aten.add.Tensor,
            aten.add.Scalar,
            aten.sub.Tensor,
            aten.sub.Scalar,
        ),
        *(aten.rsub.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar, aten.neg.default),
        *(aten.exp.default, aten.abs.default, aten.clamp.default, aten.clamp_min.default),
        *(aten.clamp_max.default, aten.square.default, aten.sqrt.default, aten.reciprocal.default),
        *(aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar),
        *(aten.sin.default, aten.cos.default, aten.log1p.default, aten.maximum.default, aten.minimum.default),
    }
)
"""Operators that work element by element on float tensors."""


@dataclass(frozen=True, eq=False)
class _Expression:
    """A node as a function of one tensor, its root."""

    root: str
    apply: Callable[[Tensor], Tensor]
    steps: tuple[str, ...]


def fold_functions(graph: Graph) -> Graph:
    """Replace what depends on one tensor alone, element by element, by an `Activation`."""
    found: dict[str, _Expression] = {}
    for node in graph.nodes.values():
        expression = _expression(node, graph.nodes, found)
        if expression is not None:
            found[node.name] = expression
    nodes = []
    for node in graph.nodes.values():
        expression = found.get(node.name)
        if expression is not None and _worthwhile(node, expression):
            name = "_".join(expression.steps[-3:])
            node = Activation(
                name=node.name, inputs=(expression.root,), shape=node.shape, source=node.source, origin=node.origin,
                function=Function(name, expression.apply),
            )  # fmt: skip
        nodes.append(node)
    return graph.rewrite(nodes)


def _worthwhile(node: Node, expression: _Expression) -> bool:
    """One supported operator by itself stays what it is."""
    return isinstance(node, Aten) or (len(expression.steps) > 1 and not isinstance(node, Scale))


def _expression(
    node: Node, nodes: Mapping[str, Node], found: Mapping[str, _Expression]
) -> _Expression | None:
    if not _is_pointwise(node):
        return None
    data = [name for name in node.inputs if not _is_number(nodes[name])]
    roots = {found[name].root if name in found else name for name in data}
    if len(roots) > 1 and len(set(data)) == 1:
        roots = set(data)
    if len(roots) != 1:
        return None
    root = roots.pop()
    shape, origin = node.shape, nodes[root]
    if origin.shape != shape or (isinstance(origin, Input) and not origin.dtype.is_floating_point):
        return None
    steps = [step for name in dict.fromkeys(data) if name in found for step in found[name].steps]
    label = (
        node.function.name
        if isinstance(node, Activation)
        else node.operator.split(".")[-2 if "." in node.operator else -1]
    )
    return _Expression(root, _compose(node, nodes, found), (*steps, label.lower()))


def _is_pointwise(node: Node) -> bool:
    return isinstance(node, Activation | Scale | Add) or (isinstance(node, Aten) and node.target in POINTWISE)


def _is_number(node: Node) -> bool:
    return isinstance(node, Constant) and node.value.numel() == 1


def _compose(
    node: Node, nodes: Mapping[str, Node], found: Mapping[str, _Expression]
) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        operands = []
        for name in node.inputs:
            origin = nodes[name]
            if isinstance(origin, Constant):
                operands.append(origin.value)
            else:
                operands.append(found[name].apply(x) if name in found else x)
        return node.evaluate(*operands)

    return apply
