"""Emission of what moves rows, and of products and softmaxes of activations outside attention.

Rearranged rows are copies through the loader, which turns a tile by row groups, stored without the rows of others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from algo.nm import NM
from compiler.emit import IDENTITY, MAX_COLS, NOTHING, Emitter, Segment, k_chunks
from compiler.ops import Product, Rearrange, RowSource, Softmax, Transpose
from compiler.pack import pack_weights
from compiler.placement import Piece, Placement
from compiler.schedule import Task
from compiler.steps import At, Region, Step
from compiler.verify_network import LoweringError, describe
from compiler.windows import Move, row_moves
from hw.arch import Arch
from hw.isa import Format, Operand, Out, Residual, RowOp, Scale, Source

__all__ = ["emit_product", "emit_rearrange", "emit_softmax", "emit_transpose"]


@dataclass(frozen=True)
class _Copy:
    """A move of a range of columns; ``own``: from a tile of the result itself."""

    part: RowSource
    move: Move
    own: bool = False


def _repeated(copies: list[_Copy], rows: int, known: dict[tuple[int, ...], int]) -> list[_Copy]:
    """The copies into one tile. Where one row goes to many, and an earlier tile has the same (``known``), all come from there at
    once. (Doubling what a tile has so far takes fewer copies, but each waits for the one before, about 110 cycles.)"""
    runs: list[list[_Copy]] = []
    for copy in copies:
        if runs and _same_row(runs[-1][-1], copy, rows):
            runs[-1].append(copy)
        else:
            runs.append([copy])
    result: list[_Copy] = []
    for run in runs:
        move, stop = run[0].move, run[-1].move.stop
        key = (id(run[0].part), move.source, (move.start + move.rotate) % rows, move.start, stop)
        earlier = known.setdefault(key, move.tile) if len(run) > 1 else move.tile
        again = _Copy(run[0].part, Move(move.tile, earlier, 0, move.start, stop), own=True)
        result += run if earlier == move.tile else [again]
    return result


def _same_row(last: _Copy, copy: _Copy, rows: int) -> bool:
    """Whether a row comes from where the one before it comes from."""
    before, move = last.move, copy.move
    single = before.stop - before.start == 1 == move.stop - move.start
    same = last.part is copy.part and before.source == move.source and before.stop == move.start
    return single and same and (before.start + before.rotate) % rows == (move.start + move.rotate) % rows


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
    fills, known = _fills(emitter, index, op, out), dict[tuple[int, ...], int]()
    if emitter.arch.row_groups == emitter.arch.rows and not _overlap(op, emitter.tensors[op.out].shape):
        copies = [_repeated(mine, emitter.arch.rows, known) for mine in copies]
    return [
        Task((*fills.get(tile, ()), *(step for copy in copies[tile] for step in _steps(emitter, index, op, copy))))
        for tile in range(out.tiles)
    ]


def _overlap(op: Rearrange, shape: tuple[int, ...]) -> bool:
    """Whether a part writes over another: then a tile does not keep what was copied into it."""
    written = np.zeros((shape[0] * shape[1], shape[2]), bool)
    for part in op.sources:
        columns = slice(part.at, part.at + part.width)
        if written[part.to, columns].any():
            return True
        written[part.to, columns] = True
    return False


def _steps(emitter: Emitter, index: int, op: Rearrange, copy: _Copy) -> Iterator[Step]:
    part, move, rows = copy.part, copy.move, emitter.arch.rows
    tensor, start = (op.out, part.at) if copy.own else (part.tensor, part.start)
    for first in range(0, part.width, MAX_COLS):
        width = min(MAX_COLS, part.width - first)
        yield Step(
            op=index,
            fields={
                "source": Source.STREAM, "cols": width, "out": Out.STORE8,
                **({"mult": 2, "shift": 1} if copy.own else {"mult": part.mult, "shift": part.shift}),
                "a_rotate": move.rotate, "o_skip": move.start, "o_drop": rows - move.stop,
            },
            addresses={
                "a_addr": emitter.column(tensor, move.source, start + first),
                "o_addr": emitter.column(op.out, move.tile, part.at + first),
            },
            reads=((tensor, move.source),),
            writes=((op.out, move.tile),),
            note=f"{op.name} [{move.tile}] rows {move.start}..{move.stop - 1} of {tensor} [{move.source}]",
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


# -- rows and channels change places -------------------------------------------------------------------------


def emit_transpose(emitter: Emitter, index: int, op: Transpose) -> list[Task]:
    """The store unit turns blocks of `lanes` channels: what it writes are columns of the result. Where tails of the result share
    tiles, a copy brings them there."""
    arch, out = emitter.arch, emitter.tensors[op.out]
    place, theirs = emitter.placement(op.out), emitter.placement(op.x)
    name, pitch, channels = op.out, emitter.pitch(op.out), out.shape[1]
    if place.share > 1:
        name = f"{op.out}@turned"
        emitter.tails[name] = place.batch * place.own_tiles * pitch * arch.rows
    steps = []
    for batch in range(place.batch):
        for number, piece in enumerate(theirs.pieces(batch)):
            at = batch * place.own_tiles * pitch + number * arch.rows
            steps.append(Step(
                op=index,
                fields={
                    "source": Source.STREAM, "mult": 2, "shift": 1, "cols": channels, "out": Out.STORE8T,
                    "o_stride": pitch * arch.rows, "a_rotate": _groups(piece.skip, op, arch),
                },
                addresses={"a_addr": emitter.column(op.x, piece.tile), "o_addr": At(name, at * arch.rows)},
                reads=((op.x, piece.tile),),
                writes=tuple((name, batch * place.own_tiles + tile) for tile in range(place.own_tiles)),
                note=f"{op.name} [{batch}, {number}]",
            ))  # fmt: skip
    tasks = [Task(tuple(steps))]
    if place.share > 1:
        whole = Segment(start=0, stop=out.shape[2])
        for batch in range(place.batch):
            for number, piece in enumerate(place.pieces(batch)):
                own = batch * place.own_tiles + number
                source = At(name, own * pitch * arch.rows)
                tasks.append(Task((_placed(emitter, index, op, source, (name, own), piece, whole),)))
    return tasks


def _placed(
    emitter: Emitter, index: int, op: Transpose, source: At, read: Region, piece: Piece, segment: Segment
) -> Step:
    """A tile of a batch entry's own, brought to its token rows of a tile of the result."""
    _, addresses, region = emitter.store_columns(op.out, piece.tile, segment)
    return Step(
        op=index,
        fields={
            "source": Source.STREAM, "mult": 2, "shift": 1, "cols": segment.stop - segment.start, "out": Out.STORE8,
            "a_rotate": _groups(-piece.skip, op, emitter.arch), "o_skip": piece.skip,
            "o_drop": emitter.arch.rows - piece.skip - piece.count,
        },
        addresses={"a_addr": source, **addresses}, reads=(read,), writes=(region,), note=f"{op.name} to [{piece.tile}]",
    )  # fmt: skip


def _groups(rows: int, op: Transpose | Product, arch: Arch) -> int:
    """A rotation by token rows in row groups."""
    depth = arch.rows // arch.row_groups
    if rows % depth:
        raise LoweringError(f"{describe(op)}: rows would move by less than a group of {depth}; use an array of at most 32 rows")
    return rows // depth % arch.row_groups


# -- products of two activations -----------------------------------------------------------------------------


def emit_product(emitter: Emitter, index: int, op: Product) -> list[Task]:
    """Rows of y stream as weights, as keys do: a chain of TILEs for each batch entry, row tile and segment of columns."""
    arch, (_, columns, k) = emitter.arch, emitter.tensors[op.y].shape
    y, tasks = _own_tiles(emitter, index, op)
    limit = min(MAX_COLS, columns if 2 * k <= arch.lane_depth else arch.psum_depth) // arch.lanes * arch.lanes or columns
    chunks = k_chunks(k, None, arch, cols=min(columns, limit), splittable=True) or []
    own, pitch = emitter.placement(op.y).own_tiles, emitter.pitch(op.y)
    for batch in range(emitter.tensors[op.x].shape[0]):
        for piece in emitter.placement(op.x).pieces(batch):
            for start in range(0, columns, limit):
                segment = Segment(start=start, stop=min(columns, start + limit))
                first = batch * own + start // arch.rows
                read = tuple((y, tile) for tile in range(first, batch * own + -(-segment.stop // arch.rows)))
                chain = _product_chain(emitter, index, op, y, piece, segment, chunks, first * pitch, pitch, read)
                tasks.append(Task(tuple(chain)))
    return tasks


def _product_chain(
    emitter: Emitter, index: int, op: Product, y: str, piece: Piece, segment: Segment, chunks: list[tuple[int, int]], column: int,
    pitch: int, read: tuple[Region, ...],
) -> Iterator[Step]:  # fmt: skip
    rows = emitter.arch.rows
    store, addresses, region = emitter.store_columns(op.out, piece.tile, segment)
    if len(emitter.placement(op.out).members(piece.tile)) > 1:
        store |= {"o_skip": piece.skip, "o_drop": rows - piece.skip - piece.count}
    for place, (start, stop) in enumerate(chunks):
        last = place + 1 == len(chunks)
        fields = {"k": stop - start, "cols": segment.stop - segment.start, "w_dep": 1, "w_stride": pitch * rows}
        yield Step(
            op=index,
            fields={
                **fields, "psum_in": int(place > 0),
                **({"mult": op.mult, "shift": op.shift, **store} if last else {"psum_out": 1}),
            },
            addresses={
                "a_addr": emitter.column(op.x, piece.tile, start), "w_addr": At(y, (column + start) * rows),
                **(addresses if last else {}),
            },
            reads=((op.x, piece.tile), *read),
            writes=(region,) if last else (),
            note=f"{op.name} [{piece.tile}] columns {segment.start}..{segment.stop - 1}",
        )  # fmt: skip


def _own_tiles(emitter: Emitter, index: int, op: Product) -> tuple[str, list[Task]]:
    """y with all row tiles of a batch entry in a row, each from its first token row on; and the tasks that make it."""
    place, arch, pitch = emitter.placement(op.y), emitter.arch, emitter.pitch(op.y)
    if place.share == 1:
        return op.y, []
    name, k = f"{op.y}@own", emitter.tensors[op.y].shape[2]
    if name in emitter.tails:
        return name, []
    emitter.tails[name] = place.batch * place.own_tiles * pitch * arch.rows
    tasks = []
    for batch in range(place.batch):
        for number, piece in enumerate(place.pieces(batch)):
            own = batch * place.own_tiles + number
            tasks.append(Task((Step(
                op=index,
                fields={
                    "source": Source.STREAM, "mult": 2, "shift": 1, "cols": k, "out": Out.STORE8,
                    "a_rotate": _groups(piece.skip, op, arch),
                },
                addresses={"a_addr": emitter.column(op.y, piece.tile), "o_addr": At(name, own * pitch * arch.rows)},
                reads=((op.y, piece.tile),), writes=((name, own),), note=f"{op.name} rows of [{batch}, {number}]",
            ),)))  # fmt: skip
    return name, tasks


# -- softmax outside attention -------------------------------------------------------------------------------


def emit_softmax(emitter: Emitter, index: int, op: Softmax) -> list[Task]:
    """The row unit's exponentials go to the lanes alone: multiplied with the identity, they come out at the other end."""
    columns = emitter.tensors[op.out].shape[2]
    identity = np.eye(columns, dtype=np.int8) * Softmax.ONE
    pattern = NM("1:32") if columns >= 32 and emitter.arch.sparse else None
    kind = Residual.INT16 if emitter.tensors[op.x].dtype == "int16" else Residual.INT8
    packed = pack_weights(
        identity, pattern, lanes=emitter.arch.lanes, layer=describe(op), format=None if emitter.arch.sparse else Format.DENSE
    )
    weights = {"w_addr": At(emitter.constants.add(packed.values))}
    if packed.format != Format.DENSE:
        weights["x_addr"] = At(emitter.constants.add(packed.positions))
    tasks, whole = [], Segment(start=0, stop=columns)
    for tile in range(emitter.tiles(op.x)):
        exponentials = Step(
            op=index,
            fields={
                **NOTHING, "residual": kind, "r_mult": op.in_mult, "r_shift": op.in_shift, "cols": columns,
                "row_op": RowOp.SOFTMAX, "out": Out.LANES, "row_mult": op.out_mult, "row_shift": op.out_shift,
            },
            addresses={"r_addr": emitter.column(op.x, tile)}, reads=((op.x, tile),), note=f"{op.name} [{tile}] exponentials",
        )  # fmt: skip
        store, addresses, region = emitter.store_columns(op.out, tile, whole)
        shares = Step(
            op=index,
            fields={
                "operand": Operand.ROWS, "a_unsigned": 1, "k": columns, "cols": columns, "w_stride": packed.stride,
                "format": packed.format, "n": packed.n, "m": packed.m, "scale": Scale.ROW, **store,
            },
            addresses={**weights, **addresses}, writes=(region,), note=f"{op.name} [{tile}] shares",
        )  # fmt: skip
        tasks.append(Task((exponentials,), (shares,)))
    return tasks
