"""match_elementwise and fix_constants: element-wise products, and constant tensors that data meets."""

from __future__ import annotations

from dataclasses import replace

import torch

from compiler.graph import Aten, Constant, Fixed, Graph, Input, Linear, MatMul, Mul, Node, Softmax, View

__all__ = ["fix_constants", "is_mask", "match_elementwise"]

aten = torch.ops.aten


def match_elementwise(graph: Graph) -> Graph:
    """``a * b`` of equal shapes, of a value per row (which a Linear of ones spreads over the channels), or with a constant
    tensor becomes a `Mul`, the constant second. A constant factor of probabilities goes behind their product with the values,
    or into values that are constant."""
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        made = [node]
        if isinstance(node, Aten) and node.target is aten.mul.Tensor and len(node.inputs) == 2:
            made = _product(node, nodes) or made
        elif isinstance(node, MatMul):
            made = _gated(node, nodes)
        nodes.update((item.name, item) for item in made)
    return graph.rewrite(nodes.values())


def _product(node: Node, nodes: dict[str, Node]) -> list[Node] | None:
    a, b = sorted((nodes[name] for name in node.inputs), key=lambda item: (isinstance(item, Constant), item.shape != node.shape))
    if isinstance(a, Constant) or a.shape != node.shape or is_mask(a, nodes) or is_mask(b, nodes):
        return None
    whole = Mul(name=node.name, inputs=(a.name, b.name), shape=node.shape, source=node.source, origin=node.origin)
    if b.shape == node.shape or isinstance(b, Constant):
        return [whole]
    if b.shape != (*node.shape[:-1], 1):
        return None
    spread = Linear(
        name=f"{node.name}.spread", inputs=(b.name,), shape=node.shape, source=node.source, origin=node.origin,
        weight=torch.ones(node.shape[-1], 1), bias=None,
    )  # fmt: skip
    return [spread, replace(whole, inputs=(a.name, spread.name))]


def is_mask(node: Node, nodes: dict[str, Node]) -> bool:
    """Whether a tensor is computed from integer or boolean inputs alone: mask arithmetic, which `fold_masks` understands."""
    if isinstance(node, Input):
        return not node.dtype.is_floating_point
    if not isinstance(node, Aten | View):
        return False
    made_from = [nodes[name] for name in node.inputs if not isinstance(nodes[name], Constant)]
    return bool(made_from) and all(is_mask(item, nodes) for item in made_from)


def _gated(product: MatMul, nodes: dict[str, Node]) -> list[Node]:
    """``(c * softmax) @ v`` with c constant over rows and keys."""
    weight, values = (nodes[name] for name in product.inputs)
    if not isinstance(weight, Mul):
        return [product]
    softmax, factor = (nodes[name] for name in weight.inputs)
    if not isinstance(softmax, Softmax) or not isinstance(factor, Constant) or factor.shape[-2:] != (1, 1):
        return [product]
    base = nodes[values.inputs[0]] if isinstance(values, View) else values
    if isinstance(values, View) and isinstance(base, Fixed):
        gated = values.layout.inverse(values.layout.apply(base.value) * factor.value, base.shape)
        origin = (*values.origin, *product.origin)
        rows = Fixed(name=f"{product.name}.gated", shape=base.shape, source=product.source, origin=origin, value=gated)
        view = replace(values, name=f"{rows.name}.heads", inputs=(rows.name,))
        return [rows, view, replace(product, inputs=(softmax.name, view.name))]
    inner = replace(product, name=f"{product.name}.plain", inputs=(softmax.name, values.name))
    whole = Mul(
        name=product.name, inputs=(inner.name, factor.name), shape=product.shape, source=product.source,
        origin=(*weight.origin, *product.origin),
    )  # fmt: skip
    return [inner, whole]


def fix_constants(graph: Graph) -> Graph:
    """A constant operand of a product becomes a `Fixed` of its shape, and the second operand."""
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        if isinstance(node, Mul):
            names = sorted(node.inputs, key=lambda name: isinstance(nodes[name], Constant | Fixed))
            last = nodes[names[-1]]
            if isinstance(last, Constant) and last.value.is_floating_point() and not isinstance(nodes[names[0]], Constant):
                fixed = Fixed(
                    name=f"{node.name}.constant", shape=node.shape, source=node.source, origin=node.origin,
                    value=last.value.expand(node.shape),
                )  # fmt: skip
                nodes[fixed.name] = fixed
                names[-1] = fixed.name
            node = replace(node, inputs=tuple(names))
        nodes[node.name] = node
    return graph.rewrite(nodes.values())
