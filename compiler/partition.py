"""The partition: which exported operators run on the accelerator, and which on the host.

Everything that can be imported starts on the accelerator. Then, until nothing changes: the operators of one place
that need nothing of each other through the other place are a *stage*; each accelerator stage is imported and goes
through the passes; the operators that `compiler.legality` blames, and those that are not worth the way, go to the
host. Host stages have even numbers, accelerator stages odd ones, and run in this order.

Mask arithmetic is on both sides: an accelerator stage takes the module's own mask (`frontend.mask_operands`), not
what became of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from compiler.exported import Exported, dtype_name, is_getitem, module_path, source_line
from compiler.frontend import FUNCTIONS, IMPORTS, MOVES, VIEWS, import_part, mask_operands
from compiler.graph import (
    Attention,
    CompileError,
    Constant,
    Convolution,
    Graph,
    Input,
    Linear,
    Pointwise,
    Problem,
    Product,
    Softmax,
    Transpose,
)
from compiler.legality import problem
from compiler.passes import optimise
from compiler.passes.functions import POINTWISE
from compiler.passes.norms import NORM_PARTS
from compiler.passes.rotations import ROTATION_PARTS
from compiler.passes.wide_norms import split_norms
from hw.arch import Arch

__all__ = ["HostStage", "Partition", "Segment", "check_arch", "describe_host", "fitted", "partition"]

aten = torch.ops.aten

PRODUCTS = frozenset({
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.baddbmm.default,
    aten.scaled_dot_product_attention.default, aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default,
    aten.conv1d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
})  # fmt: skip
"""Operators for which the accelerator exists."""

SINGULAR = frozenset({
    aten.log.default, aten.log2.default, aten.log10.default, aten.logit.default, aten.reciprocal.default, aten.rsqrt.default,
    aten.div.Tensor,
})  # fmt: skip
"""Operators that are infinite at zero, the last one in its second operand."""

ARITHMETIC = POINTWISE | frozenset(FUNCTIONS)
"""Operators that compute each element by itself."""

NEAR_ZERO = "a logarithm or a quotient on the host needs it: rounding could make it zero"
BEFORE_PRODUCT = "before the first product: cheaper than moving its operands"
FOR_HOST = "a rearrangement that only the host reads"
NO_PRODUCT = "no product with it: cheaper than moving its operands"
MASK = "mask arithmetic"

_REASONS: dict[str, str] = {
    "embedding": "a look-up, no arithmetic",
    "gather": "a look-up, no arithmetic",
    "index": "a look-up, no arithmetic",
    "index_select": "a look-up, no arithmetic",
    "argmax": "a choice, no arithmetic",
    "topk": "a choice, no arithmetic",
    "sort": "a choice, no arithmetic",
    "conv2d": "convolutions are not lowered here",
    "mean": "no instruction reduces over rows",
    "mul": "no instruction multiplies two activations, or an activation by a constant tensor",
    "sub": "no instruction takes two activations from each other",
    "pow": "part of a sum of squares that is no norm",
}


@dataclass(frozen=True, eq=False)
class HostStage:
    """Operators of the host, in execution order."""

    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """Operators of the accelerator, in execution order.

    Members
    -------
    graph
        They, after all passes.
    inputs
        The exported node behind each input of the graph.
    outputs
        The exported nodes that others read, with the graph's output for each; it may have another shape.
    """

    nodes: tuple[fx.Node, ...]
    graph: Graph
    inputs: Mapping[str, fx.Node]
    outputs: tuple[tuple[fx.Node, str], ...]


@dataclass(frozen=True, eq=False)
class Partition:
    """Stages in execution order, and why each host operator is one (by name)."""

    exported: Exported
    stages: tuple[HostStage | Segment, ...]
    reasons: Mapping[str, str]

    @property
    def host(self) -> tuple[fx.Node, ...]:
        """All operators of the host."""
        return tuple(node for stage in self.stages if isinstance(stage, HostStage) for node in stage.nodes)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(stage for stage in self.stages if isinstance(stage, Segment))


def partition(exported: Exported, arch: Arch) -> Partition:
    """Divide an exported module between accelerator and host.

    Raises
    ------
    CompileError
        What no place can mend: a weight that breaks its pattern, a result that does not depend on an input.
    """
    work = _Partitioner(exported, arch)
    while work.improve():
        pass
    return work.result()


def fitted(graph: Graph, arch: Arch) -> Graph:
    """An optimised graph with its norms divided where they are wider than an architecture's row unit.

    Raises
    ------
    CompileError
        As `check_arch`.
    """
    graph = split_norms(graph, arch.row_depth)
    check_arch(graph, arch)
    return graph


def check_arch(graph: Graph, arch: Arch) -> None:
    """Refuse operators of an optimised graph that an architecture has no room for.

    Raises
    ------
    CompileError
        With the operators to blame.
    """
    found = list(_arch_problems(graph, arch))
    if found:
        raise CompileError("\n  ".join(["cannot compile:", *(item.text for item in found)]), found)


def _arch_problems(graph: Graph, arch: Arch) -> Iterable[Problem]:
    for node in graph.nodes.values():
        depth = min(arch.row_depth, arch.lane_depth)
        if isinstance(node, Softmax) and node.shape[-1] > depth:
            yield problem(graph, node, f"a softmax over {node.shape[-1]} columns does not fit the {depth} of {arch.name}")
        norm = node.post.norm if isinstance(node, Linear | Convolution | Pointwise) else None
        if norm is not None and norm.width > arch.row_depth:
            yield problem(graph, node, _wide_norm(norm.width, arch))
        if isinstance(node, Attention | Product | Softmax | Transpose) and not arch.attention:
            yield problem(
                graph, node, f"{node.operator.lower()} needs as many rows as lanes, {arch.name} has {arch.rows} and {arch.lanes}"
            )


class _Partitioner:
    def __init__(self, exported: Exported, arch: Arch) -> None:
        self.exported = exported
        self.arch = arch
        self.order = [node for node in exported.operators if exported.constant(node) is None]
        self.masks = {node: mask_operands(exported, node) for node in self.order}
        self.inlined = frozenset(
            mask for masks in self.masks.values() for mask in masks if _is_mask_arithmetic(exported, mask)
        )
        self.host: dict[fx.Node, str] = {}
        for node in self.order:
            known = [*self.masks[node], *(item for item in node.all_input_nodes if exported.constant(item) is not None)]
            reason = _never(node, known, arch)
            if reason is not None:
                self.host[node] = reason
        for mask in self.inlined:
            self.host.update((node, MASK) for node in _cone(exported, mask) if node not in self.host)
        self.segments: dict[int, Segment] = {}
        self.legal: dict[tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]], Segment] = {}  # by operators and results

    # -- which operators there are ---------------------------------------------------------------------------

    def place(self, node: fx.Node) -> str | None:
        """Why a node is on the host; None if it is not."""
        while is_getitem(node):
            node = cast(fx.Node, node.args[0])
        return self.host.get(node)

    def needs(self, node: fx.Node) -> list[fx.Node]:
        """The operators whose results a node reads where it runs."""
        own = set(self.masks[node]) & self.inlined if self.place(node) is None else set()
        return [
            item for item in node.all_input_nodes
            if item.op == "call_function" and item not in own and self.exported.constant(item) is None
        ]  # fmt: skip

    def live(self) -> set[fx.Node]:
        """Operators that the results depend on."""
        todo = [node for node in self.exported.outputs if node.op == "call_function" and self.exported.constant(node) is None]
        found = set(todo)
        while todo:
            new = [item for item in self.needs(todo.pop()) if item not in found]
            found.update(new)
            todo += new
        return found

    def stages(self) -> dict[int, list[fx.Node]]:
        """Live operators by stage."""
        level: dict[fx.Node, int] = {}
        stages: dict[int, list[fx.Node]] = {}
        self.live_now = live = self.live()
        for node in self.order:
            if node in live:
                odd = int(self.place(node) is None)
                least = max((level[item] for item in self.needs(node)), default=odd)
                level[node] = least + ((least + odd) % 2)
        for node in reversed(level):  # a view goes where it is read, so that whole tensors go between stages
            read = [level[user] for user in node.users if user in level]
            if node.target in VIEWS and self.place(node) is None and read and node not in self.exported.outputs:
                later = min(read)
                level[node] = later if later % 2 else level[node]
        for node in level:
            stages.setdefault(level[node], []).append(node)
        return stages

    # -- one round -------------------------------------------------------------------------------------------

    def improve(self) -> bool:
        """Send to the host what the accelerator cannot or should not do; whether there was any."""
        stages = self.stages()
        found: dict[fx.Node, str] = {}
        for number, nodes in stages.items():
            if number % 2:
                found |= self.not_worthwhile(nodes) | self.singular(nodes)
            else:
                found |= self.near_zero(nodes)
        if not found:
            self.segments = {}
            for number, nodes in stages.items():
                if number % 2:
                    found |= self.illegal(number, nodes, stages)
        for node, reason in found.items():
            while is_getitem(node):
                node = cast(fx.Node, node.args[0])
            self.host[node] = reason
        return bool(found)

    def not_worthwhile(self, nodes: list[fx.Node]) -> dict[fx.Node, str]:
        """Sums and functions before the first product of a stage, and what has no product with it."""
        inside = set(nodes)
        found: dict[fx.Node, str] = {}
        group = {node: node for node in nodes}

        def root(node: fx.Node) -> fx.Node:
            while group[node] is not node:
                group[node] = node = group[group[node]]
            return node

        for node in reversed(nodes):
            users = [user for user in node.users if user in self.live_now]
            if node.target in MOVES and users and all(self.place(user) is not None or user in found for user in users):
                found[node] = FOR_HOST
        for node in nodes:
            below = [item for item in self.needs(node) if item in inside]
            part_of_norm = any(user.target in NORM_PARTS for user in node.users)
            if node.target in POINTWISE and not part_of_norm and all(item in found for item in below):
                found[node] = BEFORE_PRODUCT
            for item in below:
                group[root(item)] = root(node)
        if found:
            return found
        useful = {root(node) for node in nodes if node.target in PRODUCTS}
        return {node: NO_PRODUCT for node in nodes if root(node) not in useful}

    def near_zero(self, nodes: list[fx.Node]) -> dict[fx.Node, str]:
        """Functions on the accelerator that lead straight to what is infinite at zero on the host."""
        found: dict[fx.Node, str] = {}
        todo = [cast(Any, node.args)[node.target is aten.div.Tensor] for node in nodes if node.target in SINGULAR]
        seen: set[Any] = set()
        while todo:
            node = todo.pop()
            if node in seen or not isinstance(node, fx.Node) or not (node.target in ARITHMETIC | MOVES or is_getitem(node)):
                continue
            seen.add(node)
            if node.target not in MOVES and not is_getitem(node) and node in self.live_now and self.place(node) is None:
                found[node] = NEAR_ZERO
            todo += node.all_input_nodes
        return found

    def singular(self, nodes: list[fx.Node]) -> dict[fx.Node, str]:
        """Logarithms and quotients of what an operator rounded and others moved: no one table holds both functions."""
        inside = set(nodes)
        found: dict[fx.Node, str] = {}
        for node in nodes:
            if node.target not in SINGULAR:
                continue
            x: Any = node.args[node.target is aten.div.Tensor]
            moved = False
            while isinstance(x, fx.Node) and x in inside and x.target in MOVES:
                x, moved = x.all_input_nodes[0], True
            if moved and isinstance(x, fx.Node) and x in inside and x.target in ARITHMETIC:
                found[node] = NEAR_ZERO
        return found

    def illegal(self, number: int, nodes: list[fx.Node], stages: Mapping[int, list[fx.Node]]) -> dict[fx.Node, str]:
        """What the passes blame when they go over a stage; if nothing, the stage is one of `segments`."""
        inside = set(nodes)
        read = {item for other, members in stages.items() if other != number for node in members for item in self.needs(node)}
        outputs = [node for node in nodes if node in read or node in self.exported.outputs]
        known = self.legal.get((tuple(nodes), tuple(outputs)))
        if known is not None:  # as in an earlier round
            self.segments[number] = known
            return {}
        by_name = {node.name: node for node in self.order}
        try:
            graph, inputs = import_part(self.exported, nodes, outputs, self.inlined)
            empty = [
                node for node, name in zip(outputs, graph.outputs, strict=True)
                if isinstance(graph.nodes[name], Input | Constant)
            ]  # fmt: skip
            if empty:
                return {node: NO_PRODUCT for node in empty}
            graph = fitted(optimise(graph), self.arch)
        except CompileError as error:
            blamed = {
                node: item.reason or _no_instruction(node)
                for item in error.problems
                for node in map(by_name.get, item.origin)
                if node in inside and self.place(node) is None
            }
            # a mask that masks no attention: whoever takes it
            blamed = blamed or {node: MASK for node in nodes if self.place(node) is None and set(self.masks[node]) & self.inlined}
            if not blamed:
                raise
            cheap = {node: reason for node, reason in blamed.items() if node.target not in PRODUCTS}
            return cheap or blamed  # perhaps the product is only in bad company
        pairs = tuple(zip(outputs, graph.outputs, strict=True))
        graph = _used(graph)
        kept = {node.name for node in graph.inputs}
        taken = {name: node for name, node in inputs.items() if name in kept}
        self.segments[number] = self.legal[tuple(nodes), tuple(outputs)] = Segment(tuple(nodes), graph, taken, pairs)
        return {}

    def result(self) -> Partition:
        stages = self.stages()
        self._check_inputs(stages)
        parts = [
            self.segments[number] if number % 2 else HostStage(tuple(nodes)) for number, nodes in sorted(stages.items())
        ]
        reasons = {node.name: str(self.place(node)) for part in parts if isinstance(part, HostStage) for node in part.nodes}
        return Partition(self.exported, tuple(parts), reasons)

    def _check_inputs(self, stages: Mapping[int, list[fx.Node]]) -> None:
        used = {item for nodes in stages.values() for node in nodes for item in node.all_input_nodes}
        used |= {node for segment in self.segments.values() for node in segment.inputs.values()}
        unused = [node for node in self.exported.inputs if node not in used and node not in self.exported.outputs]
        if unused:
            names = ", ".join(f"{node.name!r} {tuple(node.meta['val'].shape)}" for node in unused)
            raise CompileError(f"the result does not depend on input {names}: leave it out of example_inputs")


def _used(graph: Graph) -> Graph:
    """Without inputs that nobody reads any more (masks that mask nothing)."""
    users = graph.users()
    nodes = {name: node for name, node in graph.nodes.items() if not isinstance(node, Input) or users[name]}
    return replace(graph, nodes=nodes)


def _never(node: fx.Node, aside: list[fx.Node], arch: Arch) -> str | None:
    """Why an operator cannot run on the accelerator, whatever is around it; None if that is open. ``aside``: operands that are
    masks or constants."""
    value = node.meta["val"]
    if is_getitem(node):
        return None
    target: Any = node.target
    if target not in IMPORTS and target not in POINTWISE | NORM_PARTS | ROTATION_PARTS and target not in MOVES:
        return _no_instruction(node)
    results = [value] if isinstance(value, Tensor) else list(value)
    indices = list(node.args[2:3]) if target is aten.index_select.default else []
    operands = [item.meta["val"] for item in node.all_input_nodes if item not in aside and item not in indices]
    for tensor in (*results, *operands):
        if isinstance(tensor, Tensor) and tensor.dtype not in (torch.float32, torch.complex64):
            return f"works on {dtype_name(tensor.dtype)}: the accelerator takes float32"
    return None


def _wide_norm(columns: int, arch: Arch) -> str:
    return f"a norm over {columns} columns does not fit row_depth {arch.row_depth} of {arch.name}, nor do equal parts of them"


def _no_instruction(node: fx.Node) -> str:
    """The reason for an operator that the accelerator does not have."""
    target: Any = node.target
    name = target._schema.name.removeprefix("aten::") if hasattr(target, "_schema") else str(target)
    return _REASONS.get(name, "no instruction does it")


def _cone(exported: Exported, node: fx.Node) -> set[fx.Node]:
    """Operators and inputs that a value is computed from, and its own."""
    found, todo = {node}, [node]
    while todo:
        new = [item for item in todo.pop().all_input_nodes if item not in found and exported.constant(item) is None]
        found.update(new)
        todo += new
    return found


def _is_mask_arithmetic(exported: Exported, node: fx.Node) -> bool:
    """Whether a value comes from masks and constants alone."""
    if exported.constant(node) is not None:
        return False
    cone = _cone(exported, node)
    inputs = [item.meta["val"] for item in cone if item.op != "call_function"]
    return not any(item.target in PRODUCTS for item in cone) and all(
        isinstance(value, Tensor) and value.ndim == 2 for value in inputs
    )


def describe_host(node: fx.Node, reason: str) -> str:
    """One line about an operator of the host: module path, source line, operator, shapes, reason."""
    shapes = ", ".join(
        str(tuple(item.meta["val"].shape)) for item in node.all_input_nodes if isinstance(item.meta.get("val"), Tensor)
    )
    value = node.meta["val"]
    result = tuple(value.shape) if isinstance(value, Tensor) else "several"
    line = source_line(node)
    where = f"{module_path(node) or 'the module'}{f' ({line})' if line else ''}"
    return f"{where}: {node.target} {node.name!r} ({shapes}) -> {result}: {reason}"
