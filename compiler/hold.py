"""Columns that stay in the lanes: a TILE on the same activations as the one before it need not load them again.

Layers that read the same tensor (queries, keys and values; gate and up projection) are emitted side by side, row tile by row
tile, so that this happens often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compiler.ops import Linear, Op, QuantNetwork
from compiler.schedule import Task
from compiler.steps import Region, Step
from hw.isa import Opcode, Operand, Source

__all__ = ["hold_columns", "join", "side_by_side"]

_SEEN_AS = ("a_rotate", "g_addr")
"""Fields that say how the loader changes columns from memory."""


def hold_columns(steps: Sequence[Step]) -> list[Step]:
    """The steps, with operand HELD where the lanes hold just what a step would load."""
    result, held, kept = [], None, frozenset[Region]()
    for step in steps:
        if step.opcode == Opcode.TILE and step.fields.get("source", Source.ARRAY) == Source.ARRAY:
            operand, columns = step.fields.get("operand", Operand.MEMORY), _columns(step)
            if operand == Operand.MEMORY and columns == held:
                step = _held(step)
            elif operand != Operand.HELD:
                held, kept = (columns if operand == Operand.MEMORY else None), frozenset(step.reads)
        if not kept.isdisjoint(step.writes):
            held = None
        result.append(step)
    return result


def _columns(step: Step) -> tuple[object, ...]:
    """What a step loads; `g_addr` is an address, and no mask of row groups, where there is a norm."""
    return (step.addresses.get("a_addr"), *(step.fields.get(name, 0) for name in ("k", "a_unsigned", *_SEEN_AS)))


def _held(step: Step) -> Step:
    fields = {name: value for name, value in step.fields.items() if name not in _SEEN_AS}
    addresses = {name: at for name, at in step.addresses.items() if name != "a_addr"}
    return replace(step, fields={**fields, "operand": Operand.HELD}, addresses=addresses)


def side_by_side(network: QuantNetwork, order: Sequence[int]) -> list[list[int]]:
    """The operators in order, with neighbours that read the same tensor, and not each other, together."""
    groups: list[list[int]] = []
    for index in order:
        op = network.ops[index]
        if groups and all(_apart(network.ops[other], op) for other in groups[-1]):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _apart(first: Op, second: Op) -> bool:
    if not (isinstance(first, Linear) and isinstance(second, Linear)) or first.x != second.x:
        return False
    return second.residual is None or second.residual.tensor != first.out


def join(chains: Sequence[Sequence[Step]]) -> Task:
    """One task of all their steps, which hold columns where they can."""
    return Task(tuple(hold_columns([step for chain in chains for step in chain])))
