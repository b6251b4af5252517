"""Emission of rearranged rows: copies through the loader, which turns a tile by row groups, stored without the rows of others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiler.emit import IDENTITY, MAX_COLS, NOTHING, Emitter, Segment
from compiler.ops import Rearrange, RowSource
from compiler.placement import Placement
from compiler.schedule import Task
from compiler.steps import At, Step
from compiler.verify_network import LoweringError, describe
from compiler.windows import Move
from hw.arch import Arch
from hw.isa import Out, Residual, Source

__all__ = ["emit_rearrange", "row_moves"]


def row_moves(
    source: Placement, out: Placement, rows: NDArray[np.int64], to: NDArray[np.int64], arch: Arch
) -> list[Move]:
    """Copies that bring rows ``rows`` of one tensor to rows ``to`` of another, both counted over the batch: one for each run of
    neighbours that comes from one tile, turned alike.

    Raises
    ------
    ValueError
        A row would have to change its place within a row group.
    """
    depth, groups = arch.rows // arch.row_groups, arch.row_groups
    theirs, ours = source.packed_rows().reshape(-1)[rows], out.packed_rows().reshape(-1)[to]
    if ((theirs - ours) % depth).any():
        raise ValueError(f"rows would move by less than a group of {depth}")
    order = np.argsort(ours)
    theirs, ours = theirs[order], ours[order]
    rotate = (theirs - ours) % arch.rows // depth % groups
    keys = np.stack([ours // arch.rows, theirs // arch.rows, rotate])
    starts = np.flatnonzero(np.concatenate([[True], (keys[:, 1:] != keys[:, :-1]).any(0) | (np.diff(ours) != 1)]))
    stops = [*starts[1:].tolist(), len(ours)]
    return [
        Move(*(int(key) for key in keys[:, first]), int(ours[first] % arch.rows), int(ours[stop - 1] % arch.rows) + 1)
        for first, stop in zip(starts.tolist(), stops, strict=True)
    ]


@dataclass(frozen=True)
class _Copy:
    """A move of a range of columns."""

    part: RowSource
    move: Move


def emit_rearrange(emitter: Emitter, index: int, op: Rearrange) -> list[Task]:
    """A task for each row tile of the result: what comes from no tensor, in whole columns, then the copies."""
    out = emitter.tensors[op.out].stored(emitter.arch)
    copies: list[list[_Copy]] = [[] for _ in range(out.tiles)]
    for part in op.sources:
        place = emitter.tensors[part.tensor].stored(emitter.arch)
        try:
            found = row_moves(place, out, part.rows, part.to, emitter.arch)
        except ValueError as error:
            raise LoweringError(f"{describe(op)}: {error}; use an array of at most 32 rows") from error
        for move in found:
            copies[move.tile].append(_Copy(part, move))
    fills = _fills(emitter, index, op, out)
    return [
        Task((*fills.get(tile, ()), *(step for copy in copies[tile] for step in _steps(emitter, index, op, copy))))
        for tile in range(out.tiles)
    ]


def _steps(emitter: Emitter, index: int, op: Rearrange, copy: _Copy) -> Iterator[Step]:
    part, move, rows = copy.part, copy.move, emitter.arch.rows
    for first in range(0, part.width, MAX_COLS):
        width = min(MAX_COLS, part.width - first)
        yield Step(
            op=index,
            fields={
                "source": Source.STREAM, "mult": part.mult, "shift": part.shift, "cols": width, "out": Out.STORE8,
                "a_rotate": move.rotate, "o_skip": move.start, "o_drop": rows - move.stop,
            },
            addresses={
                "a_addr": emitter.column(part.tensor, move.source, part.start + first),
                "o_addr": emitter.column(op.out, move.tile, part.at + first),
            },
            reads=((part.tensor, move.source),),
            writes=((op.out, move.tile),),
            note=f"{op.name} [{move.tile}] rows {move.start}..{move.stop - 1} of {part.tensor} [{move.source}]",
        )  # fmt: skip


def _fills(emitter: Emitter, index: int, op: Rearrange, out: Placement) -> dict[int, list[Step]]:
    """Whole tiles of constants, where the copies leave some of a tile."""
    info, rows = emitter.tensors[op.out], emitter.arch.rows
    channels = info.shape[2]
    missing = np.ones((info.shape[0] * info.shape[1], channels), bool)
    for part in op.sources:
        missing[part.to, part.at : part.at + part.width] = False
    wanted = np.unique(out.packed_rows().reshape(-1)[missing.any(1)] // rows)
    if not len(wanted):
        return {}
    wide = info.dtype == "int16"
    stored = np.zeros((out.tiles * rows, channels), np.int16 if wide else np.int8)
    if op.fill is not None:
        stored[out.packed_rows().reshape(-1)] = op.fill
    tiles = stored.reshape(out.tiles, rows, channels).transpose(0, 2, 1)
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
