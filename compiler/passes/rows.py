"""place_constants, hoist_rows and arrange_rows: what is left of views and moves becomes copies of rows.

A chain of operators that only move elements is understood by running it on the numbers of the elements. Where the result's rows,
or ranges of their columns, are rows of tensors that the accelerator has, one `Rearrange` does the same: windows and rolls of
tokens, slices, joined tensors, merged neighbours, a chosen token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compiler.graph import (
    Activation,
    Add,
    Constant,
    Fixed,
    Graph,
    Input,
    LayerNorm,
    Linear,
    Move,
    Node,
    Operand,
    Part,
    Rearrange,
    Scale,
    Softmax,
    Transpose,
    Unfold,
    View,
)
from compiler.layout import Layout

__all__ = ["arrange_rows", "by_rows", "gather", "hoist_rows", "place_constants", "row_gather"]

Shape = tuple[int, ...]
MAX_PARTS = 4096
"""Parts of a result, at most: more are a rearrangement within rows."""


def place_constants(graph: Graph) -> Graph:
    """A constant that is added to data or joined with it becomes a tensor, a `Rearrange` of nothing; one that says which elements
    an operator takes becomes its argument."""
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        if isinstance(node, Move):
            node = _with_indices(graph, node)
        if isinstance(node, Move | Add):
            names = []
            for name in node.inputs:
                constant = graph.nodes[name]
                if isinstance(constant, Constant) and constant.value.is_floating_point():
                    shape = node.shape if isinstance(node, Add) else constant.shape
                    made = _constant_rows(node, constant, shape)
                    nodes[made.name] = made
                    name = made.name
                names.append(name)
            node = replace(node, inputs=tuple(names))
        nodes[node.name] = node
    return graph.rewrite(nodes.values())


def _constant_rows(node: Node, constant: Constant, shape: Shape) -> Rearrange:
    value = constant.value.detach().float().expand(shape)
    return Rearrange(
        name=f"{constant.name} for {node.name}", shape=shape, source=node.source, origin=node.origin,
        fill=value.reshape(-1, shape[-1] if shape else 1).contiguous(),
    )  # fmt: skip


def _with_indices(graph: Graph, node: Move) -> Move:
    """The operator with constant indices as arguments instead of operands."""
    kept = [i for i, name in enumerate(node.inputs) if not _is_index(graph.nodes[name])]
    if len(kept) == len(node.inputs):
        return node
    found = {i: graph.nodes[name].value for i, name in enumerate(node.inputs) if i not in kept}  # type: ignore[attr-defined]

    def bound(value: Any) -> Any:
        if isinstance(value, Operand):
            return found[value.index] if value.index in found else Operand(kept.index(value.index))
        if isinstance(value, list | tuple):
            return type(value)(bound(item) for item in value)
        return value

    return replace(
        node, inputs=tuple(node.inputs[i] for i in kept), args=bound(node.args),
        kwargs={key: bound(value) for key, value in node.kwargs.items()},
    )  # fmt: skip


def _is_index(node: Node) -> bool:
    return isinstance(node, Constant) and not node.value.is_floating_point()


# -- rows of other tensors -----------------------------------------------------------------------------------


def gather(x: Tensor, rows: Tensor, shape: Shape) -> Tensor:
    """Rows of x, counted over all dimensions but the last, as a tensor of a shape."""
    return x.reshape(-1, x.shape[-1])[rows].reshape(shape)


def row_gather(name: str, x: Node, rows: Tensor, lead: Shape, like: Node) -> Move:
    """`gather` as a node; ``lead``: shape of the result but for the last dimension."""
    shape = (*lead, x.shape[-1])
    return Move(
        name=name, inputs=(x.name,), shape=shape, source=like.source, origin=like.origin, target=gather,
        args=(Operand(0), rows, shape), kwargs={},
    )  # fmt: skip


def hoist_rows(graph: Graph) -> Graph:
    """Chosen rows of a Linear become a Linear of chosen rows where no one else reads it: queries, keys and values of windows then
    come of one copy of their input instead of three."""
    users = graph.users()
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        if isinstance(node, Move) and node.target is gather:
            x = graph.nodes[node.inputs[0]]
            alone = isinstance(x, Linear) and len(users[x.name]) == 1 and x.name not in graph.outputs
            if alone and len(x.inputs) == 1 and x.shape[-1] * 3 >= graph.nodes[x.inputs[0]].shape[-1]:
                before = graph.nodes[x.inputs[0]]
                chosen = row_gather(f"{x.name}.rows", before, node.args[1], node.shape[:-1], node)
                nodes[chosen.name] = chosen
                node = replace(x, name=node.name, inputs=(chosen.name,), shape=node.shape, origin=(*x.origin, *node.origin))
        nodes[node.name] = node
    return graph.rewrite(nodes.values())


# -- what moves, as copies of rows ---------------------------------------------------------------------------


def by_rows(shape: Shape) -> Shape:
    """A shape as (rows, channels) or (batch, rows, channels): inner dimensions joined."""
    if len(shape) < 2:
        return (1, *shape) if shape else (1, 1)
    return shape if len(shape) < 4 else (shape[0], math.prod(shape[1:-1]), shape[-1])


def arrange_rows(graph: Graph) -> Graph:
    """Operators get tensors of rank 2 or 3, and each `View` and `Move` that one of them reads becomes a `Rearrange`, or nothing;
    those that cannot stay."""
    graph = _joined_dimensions(graph)
    moving = {name for name, node in graph.nodes.items() if _moves(node)}
    if not moving:
        return graph
    numbers = _Numbers(graph.nodes)
    nodes: dict[str, Node] = {}
    known: dict[tuple[Shape, bytes], str] = {}

    def settled(name: str, shape: Shape) -> str:
        """The tensor that stands for a moved one."""
        ids = numbers.of(name)
        return name if ids is None else best(graph.nodes[name], ids, shape) or name

    def best(node: Node, ids: Tensor, shape: Shape) -> str | None:
        """Copies of rows, or if that takes many narrow ones, rows and channels changed of what takes fewer, or copies of rows of
        a tensor whose rows and channels have changed."""
        key = (shape, _digest(ids))
        if key in known:
            return known[key]
        made: Transpose | Rearrange | str | None = _arranged(node, ids, shape, numbers)
        if _narrow(made) and shape[-1] > 1:
            turned = ids.reshape((1,) * (3 - len(shape)) + shape).transpose(1, 2).contiguous()
            base = _arranged(replace(node, name=f"{node.name}.turned"), turned, tuple(turned.shape), numbers)
            if base is not None and not _narrow(base):
                kept = base if isinstance(base, str) else nodes.setdefault(base.name, base).name
                made = Transpose(
                    name=f"{node.name}.arranged", inputs=(kept,), shape=shape, source=node.source, origin=node.origin
                )  # fmt: skip
            elif (swapped := numbers.swapped(ids, node)) is not None:
                base = _arranged(node, swapped[0], shape, numbers)
                if base is not None and not _narrow(base):
                    nodes.setdefault(swapped[1].name, swapped[1])
                    made = base
        if made is None:
            return None
        known[key] = made if isinstance(made, str) else nodes.setdefault(made.name, made).name
        return known[key]

    for node in graph.nodes.values():
        if node.name in moving:
            nodes[node.name] = node
            continue
        if not isinstance(node, Unfold):
            wanted = [settled(n, by_rows(graph.nodes[n].shape)) if n in moving else n for n in node.inputs]
            node = replace(node, inputs=tuple(wanted))
        nodes[node.name] = node
    outputs: list[str] = []
    for name in graph.outputs:
        if name in moving:  # the host gives it its shape
            whole = numbers.whole(name)
            alone = whole is not None and whole not in (*graph.outputs, *outputs)
            name = whole if whole is not None and alone else settled(name, by_rows(graph.nodes[name].shape))
        outputs.append(name)
    return graph.rewrite(nodes.values(), outputs=tuple(outputs))


def _narrow(made: Transpose | Rearrange | str | None) -> bool:
    """Whether copies are of single columns, or cannot be."""
    if isinstance(made, Rearrange):
        return any(part.width == 1 for part in made.parts) and len(made.parts) > 1
    return made is None


def _moves(node: Node) -> bool:
    return isinstance(node, View | Move) or (isinstance(node, Rearrange) and not node.parts)


def _digest(ids: Tensor) -> bytes:
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).digest()


def _joined_dimensions(graph: Graph) -> Graph:
    """Operators on rows with a view before and behind them, so that they see at most three dimensions."""
    nodes: dict[str, Node] = {}
    now: dict[str, str] = {}
    users, numbers = graph.users(), _Numbers(nodes)
    for node in graph.nodes.values():
        node = replace(node, inputs=tuple(now.get(name, name) for name in node.inputs))
        image = any(isinstance(user, Unfold) for user in users[node.name])
        if isinstance(node, Input) and len(node.shape) not in (0, 2, 3) and not image:
            joined = replace(node, shape=by_rows(node.shape), given=node.shape)
            nodes[node.name] = joined
            node = _reshaped(joined, node.shape, f"{node.name}.back", joined)
            now[joined.name] = node.name
        on_rows = isinstance(node, Linear | LayerNorm | Activation | Scale | Add | Softmax)
        if on_rows and len(node.shape) not in (2, 3):
            if isinstance(node, Activation | Scale | Add):
                rows, order = _as_stored(node, numbers)
            else:
                rows, order = by_rows(node.shape), tuple(range(len(node.shape)))
            names: list[str] = []
            for name in node.inputs:
                layout = Layout.contiguous(nodes[name].shape).permute(order)
                layout = layout.reshape(rows if nodes[name].shape == node.shape else by_rows(layout.shape))
                flat = _view(name, layout, f"{node.name}.{len(names)}.flat", node)
                nodes[flat.name] = flat
                names.append(flat.name)
            inner = replace(node, inputs=tuple(names), shape=rows)
            nodes[inner.name] = inner
            stored = Layout.contiguous(tuple(node.shape[d] for d in order))
            back = _view(inner.name, stored.permute(tuple(order.index(d) for d in range(len(order)))), f"{node.name}.back", node)
            now[node.name] = back.name
            node = back
        nodes[node.name] = node
    return graph.rewrite(nodes.values(), outputs=tuple(now.get(name, name) for name in graph.outputs))


def _as_stored(node: Node, numbers: _Numbers) -> tuple[Shape, tuple[int, ...]]:
    """Rows and order of dimensions in which the operands of a function of each element need the fewest copies: the last
    dimension as channels, the last two, or the second."""
    shape, whole = node.shape, tuple(range(len(node.shape)))
    ways = [(by_rows(shape), whole)]
    if len(shape) > 3:
        ways += [
            ((shape[0], math.prod(shape[1:-2]), shape[-2] * shape[-1]), whole),
            ((shape[0], math.prod(shape[2:]), shape[1]), (0, *whole[2:], 1)),
        ]
    found = [numbers.of(name) for name in node.inputs]
    return min(ways, key=lambda way: sum(
        numbers.pieces(ids.permute(way[1]).reshape(way[0])) for ids in found if ids is not None and ids.shape == shape
    ))  # fmt: skip


def _view(name: str, layout: Layout, made: str, like: Node) -> View:
    return View(name=made, inputs=(name,), shape=layout.shape, source=like.source, layout=layout, origin=like.origin)


def _reshaped(x: Node, shape: Shape, name: str, like: Node) -> View:
    return _view(x.name, Layout.contiguous(x.shape).reshape(shape), name, like)


class _Numbers:
    """Where the elements of moved tensors come from: each element of each tensor of the accelerator has a number; 0 is none."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes = nodes
        self.firsts: list[int] = []
        self.bases: list[Node] = []
        self.found: dict[str, Tensor | None] = {}
        self.transposes: dict[str, tuple[Transpose, int]] = {}  # of a tensor: it turned, and the number of its first element
        self.next = 1

    def of(self, name: str) -> Tensor | None:
        """Numbers of a tensor's elements, int64 of its shape; None for what cannot be followed."""
        if name not in self.found:
            node = self.nodes[name]
            if isinstance(node, View | Move):
                operands = [self.of(item) for item in node.inputs]
                known = [item for item in operands if item is not None]
                self.found[name] = node.evaluate(*known) if len(known) == len(operands) else None
            else:
                first = self._add(node)
                self.found[name] = torch.arange(first, self.next).reshape(node.shape)
        return self.found[name]

    def _add(self, node: Node) -> int:
        """Number of a tensor's first element."""
        self.firsts.append(self.next)
        self.bases.append(node)
        self.next += math.prod(node.shape)
        return self.firsts[-1]

    def whole(self, name: str) -> str | None:
        """The operator's result that a moved tensor is, all its elements in their order; None if it is no such."""
        ids = self.of(name)
        first = 0 if ids is None or not ids.numel() else int(ids.reshape(-1)[0])
        if ids is None or first == 0 or not torch.equal(ids.reshape(-1), torch.arange(first, first + ids.numel())):
            return None
        base = self.bases[int(self.owners(torch.tensor([first])))]
        plain = not isinstance(base, Input | Fixed | Rearrange) and len(base.shape) in (2, 3)
        return base.name if plain and math.prod(base.shape) == ids.numel() else None

    def pieces(self, ids: Tensor) -> int:
        """Ranges of neighbouring elements of rows of tensors that rows of elements are made of."""
        flat = ids.reshape(-1, ids.shape[-1])
        place = int(self.owners(flat.reshape(-1)[:1]))
        width = self.bases[place].shape[-1] if place >= 0 and self.bases[place].shape else 1
        first = self.firsts[place] if place >= 0 else 0
        follows = (flat[:, 1:] == flat[:, :-1] + 1) & ((flat[:, 1:] - first) % width != 0)
        return len(flat) + int((~follows).sum())

    def owners(self, ids: Tensor) -> Tensor:
        """Place in `bases` of the tensor that each element is of, -1 for none."""
        places = torch.tensor(self.firsts)
        return torch.where(ids > 0, torch.searchsorted(places, ids.contiguous(), right=True) - 1, -1)

    def swapped(self, ids: Tensor, like: Node) -> tuple[Tensor, Transpose] | None:
        """Elements of one tensor as those of the same with rows and channels changed, and the node that makes it."""
        used = [int(i) for i in self.owners(ids).unique() if i >= 0]
        base = self.bases[used[0]] if len(used) == 1 else None
        if base is None or len(base.shape) not in (2, 3) or isinstance(base, Rearrange | Fixed):
            return None
        *lead, rows, channels = base.shape
        if base.name not in self.transposes:
            turned = Transpose(
                name=f"{base.name}.swapped", inputs=(base.name,), shape=(*(lead or [1]), channels, rows), source=like.source,
                origin=like.origin,
            )  # fmt: skip
            self.transposes[base.name] = turned, self._add(turned)
        made, first = self.transposes[base.name]
        local = ids - self.firsts[used[0]]
        entry, row, channel = local // (rows * channels), local // channels % rows, local % channels
        return torch.where(ids > 0, (entry * channels + channel) * rows + row + first, 0), made


def _arranged(node: Node, ids: Tensor, shape: Shape, numbers: _Numbers) -> Rearrange | str | None:
    """A node that makes a tensor of these elements, the name of the one that they are, or None."""
    flat = ids.reshape(-1, shape[-1])
    owner = numbers.owners(flat)
    used = [int(i) for i in owner.unique() if i >= 0]
    tensors = [numbers.bases[i] for i in used]
    constants = [isinstance(t, Rearrange) and not t.parts for t in tensors]
    if len(used) == 1 and not constants[0] and by_rows(tensors[0].shape) == shape == tensors[0].shape:
        if bool((ids.reshape(-1) == torch.arange(math.prod(shape)) + numbers.firsts[used[0]]).all()):
            return tensors[0].name
    fill: Tensor | None = None
    parts: list[Part] = []
    inputs: list[str] = []
    for index, tensor, constant in zip(used, tensors, constants, strict=True):
        mine = owner == index
        local = flat - numbers.firsts[index]
        if constant:
            fill = torch.zeros(flat.shape) if fill is None else fill
            fill[mine] = tensor.fill.reshape(-1)[local[mine]]  # type: ignore[attr-defined]
            continue
        if len(tensor.shape) not in (2, 3):
            return None
        found = list(_parts(local, mine, tensor.shape[-1], len(inputs)))
        if not found or len(parts) + len(found) > MAX_PARTS:
            return None
        parts += found
        inputs.append(tensor.name)
    if not parts and fill is None:
        return None
    return Rearrange(
        name=f"{node.name}.arranged", inputs=tuple(inputs), shape=shape, source=node.source, origin=node.origin,
        parts=tuple(parts), fill=fill,
    )  # fmt: skip


def _parts(local: Tensor, mine: Tensor, width: int, operand: int) -> Iterator[Part]:
    """Ranges of columns in which the elements of one operand follow each other, row by row; nothing if they are too many."""
    follows = (local[:, 1:] == local[:, :-1] + 1) & (local[:, 1:] % width != 0) & mine[:, 1:] & mine[:, :-1]
    neither = ~mine[:, 1:] & ~mine[:, :-1]
    cuts = [0, *(torch.nonzero(~(follows | neither).all(0)).flatten() + 1).tolist(), local.shape[1]]
    if len(cuts) > MAX_PARTS:
        return
    for at, stop in zip(cuts[:-1], cuts[1:], strict=True):
        to = torch.nonzero(mine[:, at]).flatten()
        if not len(to):
            continue
        first = local[to, at]
        starts = first % width
        for start in starts.unique().tolist():
            chosen = starts == start
            yield Part(
                operand=operand, rows=first[chosen] // width, to=to[chosen], start=int(start), at=at, width=stop - at
            )  # fmt: skip
