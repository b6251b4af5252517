"""match_rotations and fold_gathers: rotary positions, however a module writes them.

Ref: J. Su et al., arXiv 2104.09864, eq. 34. Channels turn in pairs: (i, i + d / 2) of a head as transformers has it,
(2 i, 2 i + 1) in the original; written with halves and ``cat``, pairs and ``stack``, or complex numbers. So the pass matches
no pattern: it runs what is between a projection and an attention on probes. If that is ``x * c + x[partner] * s`` with
constants c and s for each row and channel, it becomes just that. Neighbouring pairs are first put half a head apart, by the
order of the projection's weights: the scores do not depend on the order of a head's channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compiler.graph import (
    Add,
    Aten,
    Attention,
    Constant,
    Fixed,
    Gather,
    Graph,
    Linear,
    MatMul,
    Mul,
    Node,
    Scale,
    ScaledDotProduct,
    View,
)
from compiler.layout import Layout

__all__ = ["ROTATION_PARTS", "fold_gathers", "match_rotations"]

aten = torch.ops.aten

ROTATION_PARTS = frozenset({
    aten.cat.default, aten.stack.default, aten.view_as_complex.default, aten.view_as_real.default,
})  # fmt: skip
"""Operators that only ever run on the accelerator as parts of a rotation."""

_LINEAR = frozenset({
    *ROTATION_PARTS, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.slice.Tensor, aten.roll.default,
    aten.mul.Scalar, aten.rsub.Scalar, aten._to_copy.default, aten.to.dtype, aten.expand.default,
})  # fmt: skip
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Turn:
    """``x * cos + x[..., partner] * sin`` on heads (batch, heads, rows, channels); cos, sin (batch, 1, rows, channels)."""

    cos: Tensor
    sin: Tensor
    partner: list[int]
    rows_first: bool  #: the region works on (batch, rows, heads, channels)


def match_rotations(graph: Graph) -> Graph:
    """Rotate queries and keys by sums and products on (batch, rows, channels)."""
    renamed: dict[str, str] = {}
    added: dict[str, list[Node]] = {}
    for node in graph.nodes.values():
        if isinstance(node, ScaledDotProduct | MatMul):
            for name in node.inputs[:2]:
                target = _behind_views(graph, name)
                if target.name not in added and (made := _rotation(graph, target)) is not None:
                    added[target.name] = made
                    renamed[target.name] = made[-1].name
    if not added:
        return graph
    nodes: list[Node] = []
    for node in graph.nodes.values():
        nodes.append(node)
        nodes += added.get(node.name, [])
    return graph.rewrite(nodes, renamed=renamed)


def _behind_views(graph: Graph, name: str) -> Node:
    node = graph.nodes[name]
    while isinstance(node, View | Scale):
        node = graph.nodes[node.inputs[0]]
    return node


def _rotation(graph: Graph, target: Node) -> list[Node] | None:
    """Nodes that compute a target from the nearest node that all of it comes from."""
    found = _region(graph, target)
    if found is None:
        return None
    base, region = found
    if len(_heads_shape(base.shape)) != 4:
        return None
    turn = _understand(_Region(graph, base, target, region))
    return None if turn is None else _written(base, target, region, turn)


def _region(graph: Graph, target: Node) -> tuple[Node, list[Node]] | None:
    """The nearest node that all paths to a target come from, and the linear operators between; None if there are others."""
    place = {name: i for i, name in enumerate(graph.nodes)}
    frontier: set[str] = {target.name}
    region: list[Node] = []
    while True:
        node = graph.nodes[max(frontier, key=place.__getitem__)]
        linear = isinstance(node, View | Scale | Add) or (isinstance(node, Aten) and node.target in _LINEAR)
        if not linear:
            return None
        frontier.discard(node.name)
        frontier |= {name for name in node.inputs if not isinstance(graph.nodes[name], Constant)}
        region.insert(0, node)
        if not frontier:
            return None
        if len(frontier) == 1 and any(len(item.inputs) > 1 or isinstance(item, Aten) for item in region):
            base = graph.nodes[frontier.pop()]
            if _heads_shape(base.shape) == _heads_shape(target.shape):
                return base, region
            frontier = {base.name}


@dataclass(frozen=True)
class _Region:
    """The operators between a base and a target, to be run on any values of the base."""

    graph: Graph
    base: Node
    target: Node
    nodes: list[Node]

    @torch.no_grad()
    def run(self, x: Tensor) -> Tensor:
        """The target's heads for those of the base."""
        values = {self.base.name: x.reshape(self.base.shape)}
        for node in self.nodes:
            operands = [
                values[name] if name in values else self.graph.nodes[name].evaluate() for name in node.inputs
            ]
            values[node.name] = node.evaluate(*operands)
        return values[self.target.name].reshape(x.shape)


def _heads_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(batch, heads, rows, channels), or with rows before heads, of a shape that may have the channels in pairs."""
    return (*shape[:-2], 2 * shape[-2]) if len(shape) == 5 and shape[-1] == 2 else shape


def _understand(region: _Region) -> _Turn | None:
    """The rotation that a region computes, if it is one."""
    shape, generator = _heads_shape(region.base.shape), torch.Generator().manual_seed(0)
    probe = torch.randn(shape, generator=generator)
    if bool(region.run(torch.zeros(shape)).any()):
        return None
    wanted = region.run(probe)
    for partner in _partners(shape[-1]):
        first = torch.tensor([i <= other for i, other in enumerate(partner)])
        ones, others = region.run(first.float().expand(shape)), region.run((~first).float().expand(shape))
        cos, sin = torch.where(first, ones, others), torch.where(first, others, ones)
        error = (probe * cos + probe[..., partner] * sin - wanted).abs().max()
        if float(error) > _TOLERANCE or not bool(sin.any()):
            continue
        for axis in (1, 2):
            one = [table.narrow(axis, 0, 1) for table in (cos, sin)]
            if all(bool((table == first).all()) for table, first in zip((cos, sin), one, strict=True)):
                rows_first = axis == 2
                cos, sin = (table.transpose(1, 2) if rows_first else table for table in one)
                return _Turn(cos, sin, partner, rows_first)
    return None


def _partners(width: int) -> Iterator[list[int]]:
    """Which channel each one turns with: half of the turned ones apart, or the neighbour; all of a head or a part of it."""
    for turned in dict.fromkeys((width, width // 2, width // 4, 3 * width // 4)):
        if turned < 2 or turned % 2:
            continue
        half, rest = turned // 2, list(range(turned, width))
        yield [*range(half, turned), *range(half), *rest]
        yield [*(i ^ 1 for i in range(turned)), *rest]


def _written(base: Node, target: Node, region: list[Node], turn: _Turn) -> list[Node]:
    """The rotation as products and a sum on rows of channels."""
    shape, name = _heads_shape(base.shape), target.name
    batch, heads, rows, width = shape if not turn.rows_first else (shape[0], shape[2], shape[1], shape[3])
    origin = tuple(dict.fromkeys(item for node in region for item in node.origin))
    common: dict[str, Any] = {"shape": (batch, rows, heads * width), "source": target.source, "origin": origin}
    order = _apart(turn.partner)
    place = {channel: i for i, channel in enumerate(order)}
    partner = [place[turn.partner[channel]] for channel in order]
    tables = [_by_rows(table[..., order], heads) for table in (turn.cos, turn.sin)]
    to_rows = Layout.contiguous(base.shape).reshape(shape)
    to_rows = (to_rows if turn.rows_first else to_rows.permute((0, 2, 1, 3))).reshape(common["shape"])
    nodes: list[Node] = [View(name=f"{name}.rows", inputs=(base.name,), layout=to_rows, **common)]
    if order != sorted(order):
        nodes.append(Gather(name=f"{name}.apart", inputs=(nodes[-1].name,), channels=_all_heads(order, heads), **common))
    x = nodes[-1].name
    nodes += [
        *(Constant(name=f"{name}.{which}", shape=tuple(table.shape), value=table, origin=origin)
          for which, table in zip(("cos", "sin"), tables, strict=True)),
        Gather(name=f"{name}.partner", inputs=(x,), channels=_all_heads(partner, heads), **common),
        Mul(name=f"{name}.turned", inputs=(f"{name}.partner", f"{name}.sin"), **common),
        Mul(name=f"{name}.kept", inputs=(x, f"{name}.cos"), **common),
        Add(name=f"{name}.sum", inputs=(f"{name}.kept", f"{name}.turned"), **common),
    ]  # fmt: skip
    if order != sorted(order):
        back = [place[channel] for channel in range(width)]
        nodes.append(Gather(name=f"{name}.back", inputs=(nodes[-1].name,), channels=_all_heads(back, heads), **common))
    to_heads = Layout.contiguous((batch, rows, heads, width))
    to_heads = to_heads if turn.rows_first else to_heads.permute((0, 2, 1, 3))
    view = View(
        name=f"{name}.rotated", inputs=(nodes[-1].name,), shape=target.shape, source=target.source, origin=origin,
        layout=to_heads.reshape(target.shape),
    )  # fmt: skip
    return [*nodes, view]


def _apart(partner: list[int]) -> list[int]:
    """An order of a head's channels in which partners are in long runs: first ones, then their partners, then the rest."""
    firsts = [i for i, other in enumerate(partner) if i < other]
    return [*firsts, *(partner[i] for i in firsts), *(i for i, other in enumerate(partner) if i == other)]


def _all_heads(order: list[int], heads: int) -> tuple[int, ...]:
    return tuple(head * len(order) + channel for head in range(heads) for channel in order)


def _by_rows(table: Tensor, heads: int) -> Tensor:
    """(batch, 1, rows, channels) for one head as (1 or batch, rows, heads * channels)."""
    table = table if bool((table == table[:1]).all()) is False else table[:1]
    return table[:, 0].repeat(1, 1, heads).contiguous()


def fold_gathers(graph: Graph) -> Graph:
    """An order of channels goes into the weights of the Linear that makes them; one that queries and keys of an attention share
    is dropped, for keys that are constant it goes into them."""
    users, nodes = graph.users(), dict(graph.nodes)
    renamed: dict[str, str] = {}
    for node in graph.nodes.values():
        if isinstance(node, Gather) and isinstance(linear := nodes[node.inputs[0]], Linear) and len(users[linear.name]) == 1:
            if linear.name not in graph.outputs and linear.post.is_empty:
                order = list(node.channels)
                bias = None if linear.bias is None else linear.bias[order]
                nodes[linear.name] = replace(linear, weight=linear.weight[order], bias=bias, shape=node.shape)
                renamed[node.name] = linear.name
        elif isinstance(node, Attention):
            nodes |= {item.name: item for item in _without_order(node, nodes)}
    place = {name: i for i, name in enumerate(graph.nodes)}
    kept = sorted((n for n in nodes.values() if n.name not in renamed), key=lambda n: place.get(n.name, -1))
    return graph.rewrite(kept, renamed=renamed)


def _without_order(node: Attention, nodes: dict[str, Node]) -> list[Node]:
    q, k = (nodes[name] for name in node.inputs[:2])
    width = node.shape[-1] // node.heads
    if not isinstance(q, Gather) or q.channels != _all_heads([c % width for c in q.channels[:width]], node.heads):
        return [node]
    order = list(q.channels[:width])
    groups = node.kv_heads or node.heads
    if isinstance(k, Gather) and k.channels == _all_heads(order, groups):
        return [replace(node, inputs=(q.inputs[0], k.inputs[0], *node.inputs[2:]))]
    if isinstance(k, Fixed):
        back = [order.index(channel) for channel in range(width)]
        fixed = replace(k, name=f"{node.name}.keys", value=k.value[..., list(_all_heads(back, groups))])
        return [fixed, replace(node, inputs=(q.inputs[0], fixed.name, *node.inputs[2:]))]
    return [node]
