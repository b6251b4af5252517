"""Mixed precision: which tensors are kept in 16 bits, by name or by how much the result feels their rounding.

What is multiplied has 8 bits in the lanes, and so has what comes out of a table; sums and norms are stored in 8 or 16 bits, and
a residual is read in either. So a tensor can have 16 bits if no function made it; it gains where something adds it, or where it
is a result. If products read it as well, a copy in 8 bits is made for them: one operator more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice

import torch
from torch import Tensor

from compiler.graph import CompileError, Convolution, Graph, Input, Linear, Node, Pointwise
from compiler.scales import Grids, stored_name

__all__ = ["candidates", "check_patterns", "matching", "most_sensitive"]

SHARE = 0.02
"""A tensor whose rounding makes this part of the noise of the result gets 16 bits."""
BATCHES = 2
"""Calibration batches on which noise is measured."""


def candidates(graph: Graph) -> tuple[str, ...]:
    """Tensors of a fused graph that 16 bits can make more precise."""
    users, outputs = graph.users(), {stored_name(graph, name) for name in graph.outputs}
    gains = {node.name: node.name in outputs or _is_added(node.name, users[node.name]) for node in graph.nodes.values()}
    return tuple(node.name for node in graph.nodes.values() if gains[node.name] and _can_be_wide(node))


def _can_be_wide(node: Node) -> bool:
    if isinstance(node, Input):
        return node.dtype == torch.float32
    return isinstance(node, Linear | Convolution | Pointwise) and node.post.function is None


def _is_added(name: str, users: Sequence[Node]) -> bool:
    """Whether an operator reads the tensor other than to multiply it."""
    return any(
        name in user.inputs[1:] if isinstance(user, Linear | Convolution) else isinstance(user, Pointwise) for user in users
    )


def matching(graph: Graph, patterns: str | Sequence[str]) -> frozenset[str]:
    """The candidates whose name or module path a glob matches."""
    globs = _globs(patterns)
    return frozenset(name for name in candidates(graph) if any(_matches(graph.nodes[name], glob) for glob in globs))


def check_patterns(graphs: Iterable[Graph], patterns: str | Sequence[str]) -> None:
    """Refuse a glob that gives no tensor of any graph 16 bits.

    Raises
    ------
    CompileError
        Says what the glob names, if anything, and what could have 16 bits.
    """
    globs = [] if patterns == "auto" else _globs(patterns)
    if not globs:
        return
    found = [(graph.nodes[name], graph) for graph in graphs for name in candidates(graph)]
    for glob in globs:
        if any(_matches(node, glob) for node, _ in found):
            continue
        names = list(dict.fromkeys(node.source or node.name for node, _ in found))
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"
        raise CompileError(
            f"bits16: {glob!r} names no tensor that 16 bits make more precise: what a function makes or only products read has "
            f"8. Those that can have 16: {shown}"
        )


def _globs(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(node: Node, glob: str) -> bool:
    return fnmatchcase(node.name, glob) or fnmatchcase(node.source, glob)


def most_sensitive(graph: Graph, batches: Iterable[object], grids: Grids) -> frozenset[str]:
    """The candidates that are worth 16 bits.

    Each is rounded to its 8-bit grid alone, in a network that is else in float; those that make at least `SHARE` of the noise
    that all 8-bit tensors make together, at the results, are chosen.

    Parameters
    ----------
    grids
        Of the network with as few 16-bit tensors as possible.
    """
    narrow = {name for name, tensor in grids.tensors.items() if tensor.dtype == "int8" and name in graph.nodes}
    tried = [name for name in candidates(graph) if name in narrow]
    noise = dict.fromkeys(tried, 0.0)
    total = 0.0
    for batch in islice(batches, BATCHES):
        inputs = graph.bind(batch)
        exact = _run(graph, inputs, lambda node, value: value)

        def measured(names: set[str], inputs: Mapping[str, Tensor] = inputs, exact: list[Tensor] = exact) -> float:
            rounded = _run(graph, inputs, lambda node, value: _rounded(value, grids, node.name) if node.name in names else value)
            return sum(float((got - wanted).square().sum()) for got, wanted in zip(rounded, exact, strict=True))

        total += measured(narrow)
        for name in tried:
            noise[name] += measured({name})
    return frozenset(name for name in tried if noise[name] > SHARE * total)


@torch.no_grad()
def _run(graph: Graph, inputs: Mapping[str, Tensor], change: Callable[[Node, Tensor], Tensor]) -> list[Tensor]:
    """The results when every value is changed as soon as it is there."""
    values: dict[str, Tensor] = {}
    for node in graph.nodes.values():
        value = inputs[node.name] if isinstance(node, Input) else node.evaluate(*(values[name] for name in node.inputs))
        values[node.name] = change(node, value) if value.is_floating_point() else value
    return [values[name] for name in graph.outputs]


def _rounded(value: Tensor, grids: Grids, name: str) -> Tensor:
    """A value on the 8-bit grid of its tensor."""
    scale, offset = grids.tensors[name].scale, grids.offsets.get(name)
    zero = 0.0 if offset is None else torch.from_numpy(offset).float()
    return ((value - zero) / scale).round().clamp(-128, 127) * scale + zero
