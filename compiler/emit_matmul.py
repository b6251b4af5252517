"""Emission of a product of two activations: the second one is streamed as weights, as values are in attention."""

from __future__ import annotations

from dataclasses import replace

from compiler.emit import MAX_COLS, Emitter, Segment, k_chunks
from compiler.ops import MatMul
from compiler.placement import Piece, RowPlacement
from compiler.schedule import Task
from compiler.steps import At, Region, Step
from hw.isa import Out

__all__ = ["emit_matmul"]


def emit_matmul(emitter: Emitter, index: int, op: MatMul) -> list[Task]:
    """Tasks of operator number `index`: a copy of y in blocks of lanes if it is needed, then a TILE, or a chain over parts of
    the sum, for each batch entry, row tile and segment."""
    values, copies = emitter.values(index, op.y, 1)
    tasks = [Task((step,)) for step in copies]
    place = emitter.placement(values)
    for batch in range(emitter.tensors[op.x].shape[0]):
        for number, piece in enumerate(emitter.placement(op.x).pieces(batch)):
            chunks = _chunks(emitter, op, place, batch)
            limit = MAX_COLS if len(chunks) == 1 else emitter.arch.psum_depth
            for segment in emitter.segments(op.out, limit=limit):
                tasks.append(Task(tuple(_chain(emitter, index, op, values, (batch, number, piece), segment, chunks))))
    return tasks


def _chunks(emitter: Emitter, op: MatMul, place: RowPlacement, batch: int) -> list[tuple[int, int]]:
    """Parts of the sum: those that fit the lanes, and whose rows of y lie one after the other."""
    _, rows, cols = emitter.tensors[op.y].shape
    ends = [place.whole * place.rows, rows] if 0 < place.whole and place.shift(batch) else [rows]
    parts, start = [], 0
    for end in ends:
        found = k_chunks(end - start, None, emitter.arch, cols=cols, splittable=True) or []
        parts += [(start + first, start + last) for first, last in found]
        start = end
    return parts


def _chain(
    emitter: Emitter, index: int, op: MatMul, values: str, where: tuple[int, int, Piece], segment: Segment,
    chunks: list[tuple[int, int]],
) -> list[Step]:  # fmt: skip
    """One row tile and segment: partial sums, and post-processing in the last step."""
    arch, (batch, number, piece), steps = emitter.arch, where, []
    place, stride = emitter.placement(values), emitter.block_stride(values)
    rows = place.own_rows(batch)
    for part, (start, stop) in enumerate(chunks):
        first = emitter.transposed(values, batch, 0, int(rows[start]))
        fields = {
            "k": stop - start, "cols": segment.stop - segment.start, "w_dep": 1, "w_stride": stride, "psum_in": int(part > 0),
        }  # fmt: skip
        addresses = {
            "a_addr": emitter.column(op.x, piece.tile, start),
            "w_addr": replace(first, offset=first.offset + segment.start // arch.lanes * stride),
        }
        own = range(int(rows[start]) // arch.rows, int(rows[stop - 1]) // arch.rows + 1)
        reads: tuple[Region, ...] = ((op.x, piece.tile), *((values, emitter.own_tile(values, batch, tile)) for tile in own))
        writes: tuple[Region, ...] = ()
        if part + 1 < len(chunks):
            fields["psum_out"] = 1
        else:
            more, places, residual, region = _post(emitter, op, batch, number, piece, segment)
            fields |= {"mult": op.mult, "shift": op.shift, **more}
            addresses |= places
            reads += residual
            writes = (region,)
        note = f"{op.name} [{batch}, {number}] columns {segment.start}..{segment.stop - 1}, sum from {start}"
        steps.append(Step(op=index, fields=fields, addresses=addresses, reads=reads, writes=writes, note=note))
    return steps


def _post(
    emitter: Emitter, op: MatMul, batch: int, number: int, piece: Piece, segment: Segment
) -> tuple[dict[str, int], dict[str, At], tuple[Region, ...], Region]:
    """Residual and store: only the batch entry's own token rows, if it shares its row tile."""
    if emitter.tensors[op.out].layout != "columns":
        fields, addresses, region = emitter.store_own(op.out, batch, number, segment)
    else:
        fields, addresses, region = emitter.store_columns(op.out, piece.tile, segment)
    if len(emitter.placement(op.out).members(piece.tile)) > 1 and fields["out"] != Out.STORE8T:
        fields |= {"o_skip": piece.skip, "o_drop": emitter.arch.rows - piece.skip - piece.count}
    more, places, reads = emitter.residual(op.residual, piece.tile, segment)
    return fields | more, addresses | places, reads, region
