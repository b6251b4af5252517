"""What a graph may hold after each pass: one table, checked between passes.

The table also says no to a user: an operator that is left over where it is not legal any more is one that
cannot be compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from compiler.graph import (
    Activation,
    Add,
    Aten,
    Attention,
    CompileError,
    Constant,
    Convolution,
    Fixed,
    Fold,
    Gather,
    Graph,
    Input,
    KeyMask,
    LayerNorm,
    Linear,
    MatMul,
    MaxPool,
    Move,
    Mul,
    Node,
    Pointwise,
    Problem,
    Product,
    Rearrange,
    Scale,
    ScaledDotProduct,
    Softmax,
    Transpose,
    Unfold,
    View,
)

__all__ = ["LEGAL", "check", "describe", "problem"]

_PLAIN = {Input, KeyMask, Linear, Convolution, MaxPool, Add, Mul, LayerNorm, Activation, Scale, Fixed, Gather}
_HOST = {Unfold, Fold}
_ATTENTION = {MatMul, Softmax, ScaledDotProduct}
_MOVING = {View, Move}
_ROWS = {Rearrange, Product, Softmax}

LEGAL: dict[str, frozenset[type[Node]]] = {
    stage: frozenset(kinds)
    for stage, kinds in {
        **dict.fromkeys(
            (
                "trace", "match_norms", "fold_biases", "match_rotations", "fold_vectors", "fold_functions", "broadcast_operands",
                "match_elementwise", "match_scores",
            ),
            {*_PLAIN, *_ATTENTION, *_MOVING, Constant, Aten} - {KeyMask},
        ),
        "fold_masks": {*_PLAIN, *_ATTENTION, *_MOVING, Constant},
        "fix_constants": {*_PLAIN, *_ATTENTION, *_MOVING, Constant},
        "place_constants": {*_PLAIN, *_ATTENTION, *_MOVING, Rearrange},
        "sink_views": {*_PLAIN, *_ATTENTION, *_MOVING, Rearrange},
        "split_linears": {*_PLAIN, *_ATTENTION, *_MOVING, Rearrange},
        "match_heads": {*_PLAIN, *_ROWS, Attention, MatMul, *_MOVING},
        "match_products": {*_PLAIN, *_ROWS, Attention, MatMul, *_MOVING},
        "drop_views": {*_PLAIN, *_ROWS, Attention, MatMul, *_MOVING},
        "flatten_images": {*_PLAIN, *_ROWS, Attention, MatMul, *_MOVING},
        "fold_gathers": {*_PLAIN, *_ROWS, Attention, MatMul, *_MOVING},
        "place_images": {*_PLAIN, *_ROWS, *_HOST, Attention, MatMul, *_MOVING},
        "hoist_rows": {*_PLAIN, *_ROWS, *_HOST, Attention, MatMul, *_MOVING},
        "arrange_rows": {*_PLAIN, *_ROWS, *_HOST, Attention, MatMul, Transpose},
        "move_fills": {*_PLAIN, *_ROWS, *_HOST, Attention, MatMul, Transpose},
        "fold_pads": {*_PLAIN, *_ROWS, *_HOST, Attention, MatMul, Transpose},
        "fold_scales": {*_PLAIN, *_ROWS, *_HOST, Attention, MatMul, Transpose} - {Scale},
        "fuse": {
            Input, KeyMask, Linear, Convolution, MaxPool, *_ROWS, *_HOST, Attention, MatMul, Transpose, Pointwise, Fixed,
        },
    }.items()
}
"""Kinds of node that are legal after each pass."""

_REASONS: dict[type[Node], str] = {
    Aten: "this operator is not supported",
    Constant: "adding or comparing with a constant tensor is not supported here",
    ScaledDotProduct: "attention needs q, k and v that are rows of channels, and a mask of the keys of each batch entry",
    View: "the accelerator moves rows and ranges of columns: this rearrangement does more",
    Move: "the accelerator moves rows and ranges of columns: this rearrangement does more",
    Scale: "scaling is supported only after a Linear layer or within attention",
}


def check(graph: Graph, *, shown: int = 5) -> None:
    """Refuse a graph that is not legal at its stage.

    Raises
    ------
    CompileError
        Names module path, operator and shapes of the first few offending nodes.
    """
    problems = next(filter(None, (list(rule(graph)) for rule in RULES)), [])
    if problems:
        more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
        texts = [problem.text for problem in problems[:shown]]
        blamed = problems if all(problem.origin for problem in problems) else []
        raise CompileError("\n  ".join([f"cannot compile (after {graph.stage}):", *texts, *more]), blamed)


def _kinds(graph: Graph) -> Iterator[Problem]:
    legal = LEGAL[graph.stage]
    illegal = [node for node in graph.nodes.values() if type(node) not in legal]
    if any(isinstance(node, Aten) for node in illegal):
        illegal = [
            node for node in illegal if isinstance(node, Aten)
        ]  # the others are most likely consequences
    for node in illegal:
        reason = _REASONS.get(type(node), f"{node.operator} is not legal here")
        origin = node.origin
        if isinstance(node, Constant):  # whoever reads it is to blame
            origin = tuple(name for user in graph.nodes.values() if node.name in user.inputs for name in user.origin)
        yield Problem(describe(graph, node, reason), origin, "" if isinstance(node, Aten) else reason)


def describe(graph: Graph, node: Node, reason: str) -> str:
    """One line about a node: module path, operator, shapes, reason."""
    operands = ", ".join(str(graph.nodes[name].shape) if name in graph.nodes else "?" for name in node.inputs)
    return (
        f"{node.source or 'the module'}: {node.operator} {node.name!r} ({operands}) -> {node.shape}: {reason}"
    )


def problem(graph: Graph, node: Node, reason: str) -> Problem:
    """`describe` as a `Problem`."""
    return Problem(describe(graph, node, reason), node.origin, reason)


def _operands_first(graph: Graph) -> Iterator[Problem]:
    known: set[str] = set()
    for name, node in graph.nodes.items():
        if node.name != name:
            yield Problem(f"node {node.name!r} is filed under {name!r}")
        for operand in node.inputs:
            if operand not in known:
                yield problem(graph, node, f"reads {operand!r}, which is not computed before it")
        known.add(name)
    for output in graph.outputs:
        if output not in known:
            yield Problem(f"output {output!r} is not computed by any node")


_EARLY = (
    "trace", "match_norms", "match_rotations", "fold_vectors", "fold_functions", "broadcast_operands", "match_elementwise",
    "match_scores", "fold_masks", "fold_biases", "fix_constants",
)  # fmt: skip
"""Stages at which constants and masks may still be broadcast."""


def _equal_shapes(graph: Graph) -> Iterator[Problem]:
    """No broadcasting of data: sums have operands of one shape (constants excepted while there are some)."""
    for node in graph.nodes.values():
        if not isinstance(node, Add | Mul) or graph.stage in _EARLY:
            continue
        if any(graph.nodes[name].shape != node.shape for name in node.inputs):
            yield problem(graph, node, "operands must have equal shapes: broadcasting is not supported")


def _masks_only_mask(graph: Graph) -> Iterator[Problem]:
    """A key mask is read by attention alone, and made from an input."""
    for node in graph.nodes.values():
        for place, name in enumerate(node.inputs):
            if isinstance(graph.nodes[name], KeyMask) and not (
                isinstance(node, Attention | ScaledDotProduct) and place == 3
            ):
                yield problem(graph, node, "a key mask can only mask attention")
        if isinstance(node, KeyMask) and not isinstance(graph.nodes[node.inputs[0]], Input):
            yield problem(graph, node, "a key mask must be an input")


def _masks_are_no_data(graph: Graph) -> Iterator[Problem]:
    """Data is float32; an input of another type is a mask."""
    if Aten in LEGAL[graph.stage]:
        return
    for node in graph.nodes.values():
        if isinstance(node, KeyMask):
            continue
        for name in node.inputs:
            operand = graph.nodes[name]
            if isinstance(operand, Input) and not operand.dtype.is_floating_point:
                dtype = str(operand.dtype).removeprefix("torch.")
                yield problem(graph, node, f"input {name!r} of {dtype} can only be a key mask: data are float32")


def _rows_of_channels(graph: Graph) -> Iterator[Problem]:
    """At the end every tensor is (rows, C) or (B, S, C), and a residual has its sum's shape."""
    if graph.stage != "fuse":
        return
    for node in graph.nodes.values():
        if not isinstance(node, Input | KeyMask | Fold) and len(node.shape) not in (2, 3):
            yield problem(graph, node, "tensors must be (rows, channels) or (batch, rows, channels)")
        if isinstance(node, Linear | Convolution | Pointwise) and (len(node.inputs) == 2) != node.post.residual:
            yield problem(graph, node, "a residual is the second operand")


def _positive_scales(graph: Graph) -> Iterator[Problem]:
    """The hardware's multipliers are not negative."""
    for node in graph.nodes.values():
        if isinstance(node, Attention | ScaledDotProduct) and not 0 < node.scale < math.inf:
            yield problem(graph, node, f"the scale of the scores must be positive, not {node.scale:.4g}")


RULES: tuple[Callable[[Graph], Iterator[Problem]], ...] = (
    _operands_first,
    _kinds,
    _equal_shapes,
    _masks_only_mask,
    _masks_are_no_data,
    _rows_of_channels,
    _positive_scales,
)
"""What must hold; the first rule that is broken is reported."""
