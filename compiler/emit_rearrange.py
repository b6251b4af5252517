"""Emission of rearranged rows: copies through the loader, which turns a tile by row groups, stored without the rows of others; or
products with a matrix that chooses rows (`compiler.emit_gather`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiler.emit import IDENTITY, MAX_COLS, NOTHING, Emitter, Segment
from compiler.emit_gather import INSTRUCTION_CYCLES, Gather, gather_cost, gather_steps, gathers, turn_rows
from compiler.ops import Rearrange, RowSource
from compiler.placement import Placement
from compiler.schedule import Task
from compiler.steps import At, Region, Step
from compiler.verify_network import LoweringError, describe
from compiler.windows import Move, row_moves
from hw.isa import Out, Residual, Source

__all__ = ["emit_rearrange"]


def emit_rearrange(emitter: Emitter, index: int, op: Rearrange) -> list[Task]:
    """A task for each row tile of the result: what comes from no tensor, in whole columns, then the rows of others. A part is
    copied, or goes through the array if that takes less time, or if its rows change their places within row groups."""
    out = emitter.tensors[op.out].stored(emitter.arch)
    stored = _Stored(op, out, emitter.tensors[op.out].shape[2])
    steps: list[list[Step]] = [[] for _ in range(out.tiles)]
    turned: dict[Region, Task] = {}
    for part in op.sources:
        copies, chosen = _ways(emitter, op, part, stored)
        for move in copies:
            stored.wrote(part, move.tile, move.start, move.stop)
            steps[move.tile] += _copy(emitter, index, op, part, move)
        turned |= turn_rows(emitter, index, op, part, chosen)
        for gather in chosen:
            stored.wrote(part, gather.tile, gather.start, gather.stop)
            steps[gather.tile] += gather_steps(emitter, index, op, part, gather)
    fills = _fills(emitter, index, op, stored)
    return [*turned.values(), *(Task((*fills.get(tile, ()), *steps[tile])) for tile in range(out.tiles))]


@dataclass(eq=False)
class _Stored:
    """The result as its tiles hold it, (tiles * rows, channels). values: of the fill; parts: how many write there; missing: what
    no instruction has written yet of the rows in use."""

    op: Rearrange
    out: Placement
    channels: int

    def __post_init__(self) -> None:
        used = self.out.packed_rows().reshape(-1)
        shape = (self.out.tiles * self.out.rows, self.channels)
        self.missing = np.zeros(shape, bool)
        self.missing[used] = True
        self.parts = np.zeros(shape, np.int16)
        for part in self.op.sources:
            self.parts[used[part.to], part.at : part.at + part.width] += 1
        self.values = np.zeros(shape, np.int8 if self.op.fill is None else self.op.fill.dtype)
        if self.op.fill is not None:
            self.values[used] = self.op.fill

    def may_be_zero(self, part: RowSource) -> NDArray[np.bool_]:
        """Stored rows that zeros in the columns of a part do not hurt: the result has zeros there, or nothing."""
        columns = slice(part.at, part.at + part.width)
        return np.equal(self.parts[:, columns].any(1) | self.values[:, columns].any(1), False)

    def wrote(self, part: RowSource, tile: int, start: int, stop: int) -> None:
        """An instruction writes token rows [start, stop) of a tile in the columns of a part."""
        rows = tile * self.out.rows
        self.missing[rows + start : rows + stop, part.at : part.at + part.width] = False


def _ways(emitter: Emitter, op: Rearrange, part: RowSource, stored: _Stored) -> tuple[list[Move], list[Gather]]:
    """A part by copies, or through the array."""
    arch, place = emitter.arch, emitter.tensors[part.tensor].stored(emitter.arch)
    chosen = gathers(place, stored.out, part, stored.may_be_zero(part)) if arch.attention else []
    try:
        copies = row_moves(place, stored.out, part.rows, part.to, arch)
    except ValueError as error:
        if chosen:
            return [], chosen
        raise LoweringError(f"{describe(op)}: {error}; use an array with as many rows as lanes, or of at most 32 rows") from error
    if chosen and gather_cost(chosen, part.width, arch) < len(copies) * (part.width + INSTRUCTION_CYCLES):
        return [], chosen
    return copies, []


def _copy(emitter: Emitter, index: int, op: Rearrange, part: RowSource, move: Move) -> Iterator[Step]:
    for first in range(0, part.width, MAX_COLS):
        yield Step(
            op=index,
            fields={
                "source": Source.STREAM, "cols": min(MAX_COLS, part.width - first), "out": Out.STORE8, "mult": part.mult,
                "shift": part.shift, "a_rotate": move.rotate, "o_skip": move.start, "o_drop": emitter.arch.rows - move.stop,
            },
            addresses={
                "a_addr": emitter.column(part.tensor, move.source, part.start + first),
                "o_addr": emitter.column(op.out, move.tile, part.at + first),
            },
            reads=((part.tensor, move.source),),
            writes=((op.out, move.tile),),
            note=f"{op.name} [{move.tile}] rows {move.start}..{move.stop - 1} of {part.tensor} [{move.source}]",
        )  # fmt: skip


def _fills(emitter: Emitter, index: int, op: Rearrange, stored: _Stored) -> dict[int, list[Step]]:
    """Whole tiles of constants, where the rest leaves some of a tile."""
    out, channels = stored.out, stored.channels
    wanted = np.flatnonzero(stored.missing.reshape(out.tiles, -1).any(1))
    tiles = stored.values.reshape(out.tiles, out.rows, channels).transpose(0, 2, 1)
    return {int(tile): _filled(emitter, index, op, int(tile), tiles[tile]) for tile in wanted}


def _filled(emitter: Emitter, index: int, op: Rearrange, tile: int, columns: NDArray[np.integer]) -> list[Step]:
    kind = Residual.INT16 if columns.itemsize == 2 else Residual.INT8
    buffer, steps = emitter.constants.add(columns), []
    for start in range(0, len(columns), MAX_COLS):
        segment = Segment(start=start, stop=min(len(columns), start + MAX_COLS))
        fields, addresses, region = emitter.store_columns(op.out, tile, segment)
        at = At(buffer, start * columns.shape[1] * columns.itemsize)
        steps.append(Step(
            op=index, fields={**NOTHING, "residual": kind, "cols": segment.stop - segment.start, **IDENTITY, **fields},
            addresses={"r_addr": at, **addresses}, writes=(region,), note=f"{op.name} [{tile}] constants",
        ))  # fmt: skip
    return steps
