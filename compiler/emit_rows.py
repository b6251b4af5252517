"""Emission of transposes, and of products and softmaxes of activations outside attention."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from algo.nm import NM
from compiler.emit import COPY, MAX_COLS, NOTHING, Emitter, Segment, k_chunks
from compiler.emit_gather import rotated
from compiler.ops import Product, Softmax, Transpose
from compiler.pack import pack_weights
from compiler.placement import Piece
from compiler.schedule import Task
from compiler.steps import At, Region, Step
from compiler.verify_network import describe
from hw.isa import Format, Operand, Out, Residual, RowOp, Scale

__all__ = ["emit_product", "emit_softmax", "emit_transpose"]


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
    steps: list[Step] = []
    for batch in range(place.batch):
        for number, piece in enumerate(theirs.pieces(batch)):
            at = batch * place.own_tiles * pitch + number * arch.rows
            steps += rotated(emitter, Step(
                op=index,
                fields={**COPY, "cols": channels, "out": Out.STORE8T, "o_stride": pitch * arch.rows},
                addresses={"a_addr": emitter.column(op.x, piece.tile), "o_addr": At(name, at * arch.rows)},
                reads=((op.x, piece.tile),),
                writes=tuple((name, batch * place.own_tiles + tile) for tile in range(place.own_tiles)),
                note=f"{op.name} [{batch}, {number}]",
            ), piece.skip)  # fmt: skip
    tasks = [Task(tuple(steps))]
    if place.share > 1:
        whole = Segment(start=0, stop=out.shape[2])
        for batch in range(place.batch):
            for number, piece in enumerate(place.pieces(batch)):
                own = batch * place.own_tiles + number
                source = At(name, own * pitch * arch.rows)
                tasks.append(Task(_placed(emitter, index, op, source, (name, own), piece, whole)))
    return tasks


def _placed(
    emitter: Emitter, index: int, op: Transpose, source: At, read: Region, piece: Piece, segment: Segment
) -> tuple[Step, ...]:
    """A tile of a batch entry's own, brought to its token rows of a tile of the result."""
    _, addresses, region = emitter.store_columns(op.out, piece.tile, segment)
    return rotated(emitter, Step(
        op=index,
        fields={
            **COPY, "cols": segment.stop - segment.start, "out": Out.STORE8, "o_skip": piece.skip,
            "o_drop": emitter.arch.rows - piece.skip - piece.count,
        },
        addresses={"a_addr": source, **addresses}, reads=(read,), writes=(region,), note=f"{op.name} to [{piece.tile}]",
    ), -piece.skip)  # fmt: skip


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
            tasks.append(Task(rotated(emitter, Step(
                op=index, fields={**COPY, "cols": k, "out": Out.STORE8},
                addresses={"a_addr": emitter.column(op.y, piece.tile), "o_addr": At(name, own * pitch * arch.rows)},
                reads=((op.y, piece.tile),), writes=((name, own),), note=f"{op.name} rows of [{batch}, {number}]",
            ), piece.skip)))  # fmt: skip
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
