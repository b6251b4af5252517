"""Emission of attention: scores and softmax of a head into the lanes, then their product with the values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compiler.emit import Emitter, Segment, k_chunks, mask_stride
from compiler.ops import Attention, ScoreBias
from compiler.placement import Piece
from compiler.plan import align_up
from compiler.program import mask_params
from compiler.schedule import Task
from compiler.steps import At, Region, Step
from compiler.verify_network import LoweringError, describe
from hw.isa import Operand, Out, Residual, RowOp, Scale
from hw.isa_check import constant_alignment
from hw.numerics import PARAM_DTYPE

__all__ = ["emit_attention", "masked_scores", "visible_share"]


def emit_attention(emitter: Emitter, index: int, op: Attention) -> list[Task]:
    """Tasks of operator number `index`: copies of keys and values if they are needed, then a task for each batch entry,
    row tile and head."""
    values, copies = emitter.values(index, op.v, op.groups)
    keys, more = emitter.keys(index, op.k)
    tasks = [Task((step,)) for step in (*copies, *more)]
    emit = _AttentionEmitter(emitter, index, op, keys, values)
    units = [
        _Unit(batch, number, piece, head)
        for batch in range(emitter.tensors[op.q].shape[0])
        for number, piece in enumerate(emitter.placement(op.q).pieces(batch))
        for head in range(op.heads)
    ]
    if not emit.one_pass:
        return tasks + [Task(tuple(emit.blocked(unit))) for unit in units]
    return tasks + [Task(tuple(emit.scores(unit)), tuple(emit.output(unit))) for unit in units]


@dataclass(frozen=True)
class _Unit:
    """What one softmax is about: row tile `number` of a batch entry, which is a `piece` of the queries, and a head."""

    batch: int
    number: int
    piece: Piece
    head: int


@dataclass(eq=False)
class _AttentionEmitter:
    """Steps of one attention operator; `keys` and `values` name the tensors in the layouts of keys and of values."""

    parent: Emitter
    index: int
    op: Attention
    keys: str
    values: str

    def __post_init__(self) -> None:
        arch, op = self.parent.arch, self.op
        self.channels = self.parent.tensors[op.k].shape[2]
        self.head_dim = self.channels // op.groups
        self.place = self.parent.placement(self.keys)
        self.span = self.place.longest_span
        self.one_pass = self.span <= min(arch.row_depth, arch.lane_depth)
        splittable = (
            self.one_pass and self.span <= arch.psum_depth
        )  # blocks of keys need the partial sums for the output
        chunks = k_chunks(self.head_dim, None, arch, cols=self.span, splittable=splittable)
        if chunks is None:
            raise LoweringError(
                f"{describe(op)}: heads of {self.head_dim} features do not fit lane_depth {arch.lane_depth} "
                f"of {arch.name}, and {self.span} keys leave no partial sums to cut them "
                f"(row_depth {arch.row_depth}, psum_depth {arch.psum_depth})"
            )
        self.chunks = chunks

    def blocks(self, span: int) -> list[tuple[int, int]]:
        """Blocks of keys [start, stop) of a row that is too long for one pass; starts are aligned for tiles
        and mask tables."""
        arch = self.parent.arch
        unit = max(arch.lanes, constant_alignment(arch) // PARAM_DTYPE.itemsize)
        size = min(arch.row_depth, arch.lane_depth // 2) // unit * unit
        if not size:
            raise LoweringError(
                f"{describe(self.op)}: {span} keys need blocks of {unit}, "
                f"and row_depth of {arch.name} is {arch.row_depth}"
            )
        count = -(-span // size)
        size = align_up(-(-span // count), unit)
        return [(start, min(span, start + size)) for start in range(0, span, size)]

    def score_params(self, batch: int, start: int) -> tuple[dict[str, int], dict[str, At]]:
        """Requantisation of the scores from key `start` on: one for all columns, or a table that masks what is no key."""
        parent, op, offset = self.parent, self.op, start * PARAM_DTYPE.itemsize
        if op.mask is not None:
            stride = mask_stride(self.place, parent.arch)
            return {"scale": Scale.COLUMN}, {"p_addr": At(parent.mask_table(op), batch * stride + offset)}
        if self.place.span(batch) == self.place.length:
            return {"scale": Scale.CONST, "mult": op.score_mult, "shift": op.score_shift}, {}
        table = mask_params(self.place, batch, True, op.score_mult, op.score_shift)
        return {"scale": Scale.COLUMN}, {"p_addr": At(parent.constants.add(table), offset)}

    def kv_head(self, unit: _Unit) -> int:
        """Which head of the keys and values a unit uses."""
        return unit.head // (self.op.heads // self.op.groups)

    def limit(self, unit: _Unit) -> int:
        """Columns of scores that a unit needs: those after the last key that any of its rows sees are left out."""
        span = self.place.span(unit.batch)
        if self.op.bias is None:
            return span
        seen = np.flatnonzero(~masked_scores(self.op.bias)[self.bias_index(unit)].all(0))
        return int(self.place.own_rows(unit.batch)[seen[-1]]) + 1 if len(seen) else span

    def bias_index(self, unit: _Unit) -> tuple[int, int, slice]:
        """Where a unit's rows are within the bias."""
        batches, heads, _, _ = self.op.bias.values.shape  # type: ignore[union-attr]
        start = unit.number * self.parent.arch.rows
        return unit.batch % batches, unit.head % heads, slice(start, start + unit.piece.count)

    def bias(self, unit: _Unit, start: int) -> tuple[dict[str, int], dict[str, At]]:
        """What is added to the scores from column `start` on: a residual, laid out as columns."""
        bias, rows = self.op.bias, self.parent.arch.rows
        if bias is None:
            return {}, {}
        values = bias.values[self.bias_index(unit)]
        columns = np.zeros((self.place.span(unit.batch), rows), bias.values.dtype)
        columns[self.place.own_rows(unit.batch), unit.piece.skip : unit.piece.skip + unit.piece.count] = values.T
        kind = Residual.INT8 if columns.itemsize == 1 else Residual.INT16
        at = At(self.parent.constants.add(columns), start * rows * columns.itemsize)
        return {"residual": kind, "r_mult": bias.mult, "r_shift": bias.shift}, {"r_addr": at}

    def scores(self, unit: _Unit, block: tuple[int, int] | None = None, **fields: int) -> list[Step]:
        """Q * K^T for a block of keys, into the row unit."""
        parent, op, rows, batch = self.parent, self.op, self.parent.arch.rows, unit.batch
        start, stop = block or (0, self.limit(unit))
        read = [(self.keys, parent.own_tile(self.keys, batch, t)) for t in range(start // rows, -(-stop // rows))]
        fields = {
            "row_op": RowOp.SOFTMAX,
            "out": Out.LANES,
            "row_mult": op.out_mult,
            "row_shift": op.out_shift,
            **fields,
        }
        scale, addresses = self.score_params(batch, start)
        added, bias_address = self.bias(unit, start)
        fields |= scale | added
        addresses |= bias_address
        steps = []
        for place, (k0, k1) in enumerate(self.chunks):
            final, channel = place + 1 == len(self.chunks), unit.head * self.head_dim + k0
            key_channel = self.kv_head(unit) * self.head_dim + k0
            steps.append(
                Step(
                    op=self.index,
                    fields={
                        "k": k1 - k0,
                        "cols": stop - start,
                        "w_dep": 1,
                        "w_stride": parent.pitch(self.keys) * rows,
                        "psum_in": int(place > 0),
                        **(fields if final else {"psum_out": 1}),
                    },
                    addresses={
                        "a_addr": parent.column(op.q, unit.piece.tile, channel),
                        "w_addr": parent.column(self.keys, parent.own_tile(self.keys, batch, start // rows), key_channel),
                        **(addresses if final else {}),
                    },
                    reads=((op.q, unit.piece.tile), *read),
                    note=f"{op.name} scores [{batch}, {unit.number}] head {unit.head}, keys {start}..{stop - 1}",
                )
            )
        return steps

    def output(
        self,
        unit: _Unit,
        block: tuple[int, int] | None = None,
        features: tuple[int, int] | None = None,
    ) -> list[Step]:
        """P * V for a block of keys; partial sums are kept unless the block is the last."""
        parent, op, arch, batch = self.parent, self.op, self.parent.arch, unit.batch
        span = self.limit(unit)
        start, stop = block or (0, span)
        f0, f1 = features or (0, self.head_dim)
        final, channel = stop == span, unit.head * self.head_dim + f0
        stride = parent.block_stride(self.values)
        weights = parent.transposed(self.values, batch, self.kv_head(unit), start)
        fields: dict[str, int] = {
            "operand": Operand.ROWS,
            "a_unsigned": 1,
            "k": stop - start,
            "cols": f1 - f0,
            "w_dep": 1,
            "w_stride": stride,
            "psum_in": int(start > 0),
        }
        addresses = {"w_addr": replace(weights, offset=weights.offset + f0 // arch.lanes * stride)}
        writes: tuple[Region, ...] = ()
        if final:
            store_fields, store_addresses, region = self.store(unit, Segment(start=channel, stop=channel + f1 - f0))
            fields |= {"scale": Scale.ROW, **store_fields}
            addresses |= store_addresses
            writes = (region,)
        else:
            fields["psum_out"] = 1
        return [
            Step(
                op=self.index,
                fields=fields,
                addresses=addresses,
                reads=tuple(
                    (self.values, parent.own_tile(self.values, batch, t))
                    for t in range(start // arch.rows, -(-stop // arch.rows))
                ),
                writes=writes,
                note=f"{op.name} output [{batch}, {unit.number}] head {unit.head}, keys {start}..{stop - 1}",
            )
        ]

    def store(self, unit: _Unit, segment: Segment) -> tuple[dict[str, int], dict[str, At], Region]:
        """Where a unit's output goes: only its own token rows, if it shares its row tile."""
        parent, op, piece = self.parent, self.op, unit.piece
        if parent.tensors[op.out].layout == "keys":
            return parent.store_own(op.out, unit.batch, unit.number, segment)
        fields, addresses, region = parent.store_columns(op.out, piece.tile, segment)
        if len(parent.placement(op.out).members(piece.tile)) > 1:
            fields |= {"o_skip": piece.skip, "o_drop": parent.arch.rows - piece.skip - piece.count}
        return fields, addresses, region

    def blocked(self, unit: _Unit) -> list[Step]:
        """A row in blocks of keys: the maximum over all of them, then block by block exponentials and
        products with the values."""
        arch, span, steps = self.parent.arch, self.limit(unit), []
        blocks = self.blocks(span)
        for block in blocks:
            steps += self.scores(unit, block, row_op=RowOp.MAX, out=Out.NONE, row_first=int(block[0] == 0))
        width = min(self.head_dim, arch.psum_depth)
        if width < self.head_dim:
            width = max(arch.lanes, width // arch.lanes * arch.lanes)
        if width > arch.psum_depth:
            raise LoweringError(
                f"{describe(self.op)}: psum_depth {arch.psum_depth} is less than the {arch.lanes} lanes"
            )
        for f0 in range(0, self.head_dim, width):
            for block in blocks:
                first, last = block[0] == 0, block[1] == span
                steps += self.scores(unit, block, row_op=RowOp.EXP, row_first=int(first), row_last=int(last))
                steps += self.output(unit, block, (f0, min(self.head_dim, f0 + width)))
        return steps


def masked_scores(bias: ScoreBias) -> NDArray[np.bool_]:
    """Which scores a bias masks, whatever they are: (batch or 1, heads or 1, rows, keys)."""
    return bias.values.astype(np.int64) * bias.mult >> bias.shift <= -(1 << 16)


def visible_share(op: Attention) -> float:
    """Part of the scores that the bias does not mask."""
    return 1.0 if op.bias is None else float(1 - masked_scores(op.bias).mean())
