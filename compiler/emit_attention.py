"""Emission of attention: scores and softmax of a head into the lanes, then their product with the values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from compiler.emit import Emitter, Segment, k_chunks, mask_stride
from compiler.ops import Attention
from compiler.plan import align_up
from compiler.steps import At, Step, pipelined
from compiler.verify_network import LoweringError, describe
from hw.isa import Operand, Out, RowOp, Scale
from hw.isa_check import constant_alignment
from hw.numerics import PARAM_DTYPE

__all__ = ["emit_attention"]


def emit_attention(emitter: Emitter, index: int, op: Attention, *, depth: int) -> list[Step]:
    """Steps of operator number `index`. `depth`: how many units' scores are ahead of the outputs; a unit is
    (batch entry, row tile, head)."""
    values, steps = emitter.copy(index, op.v, op.heads)
    emit = _AttentionEmitter(emitter, index, op, values)
    units = [(batch, tile, head) for batch, tile in emitter.units(op.q) for head in range(op.heads)]
    if emit.blocks is not None:
        return steps + [step for unit in units for step in emit.blocked(*unit)]
    if emit.keys + emit.head_dim > emitter.arch.lane_depth:
        depth = min(
            depth, 1
        )  # else a third unit's queries could keep the probabilities out of the lanes for good
    scores, outputs = [emit.scores(*unit) for unit in units], [emit.output(*unit) for unit in units]
    return steps + pipelined(scores, outputs, depth=depth)


@dataclass(eq=False)
class _AttentionEmitter:
    """Steps of one attention operator; `values` names the transposed values."""

    parent: Emitter
    index: int
    op: Attention
    values: str

    def __post_init__(self) -> None:
        arch, op = self.parent.arch, self.op
        self.keys = self.parent.tensors[op.k].shape[1]
        self.channels = self.parent.tensors[op.k].shape[2]
        self.head_dim = self.channels // op.heads
        one_pass = self.keys <= min(arch.row_depth, arch.lane_depth)
        splittable = (
            one_pass and self.keys <= arch.psum_depth
        )  # blocks of keys need the partial sums for the output
        chunks = k_chunks(self.head_dim, None, arch, cols=self.keys, splittable=splittable)
        if chunks is None:
            raise LoweringError(
                f"{describe(op)}: heads of {self.head_dim} features do not fit lane_depth {arch.lane_depth} "
                f"of {arch.name}, and {self.keys} keys leave no partial sums to cut them "
                f"(row_depth {arch.row_depth}, psum_depth {arch.psum_depth})"
            )
        self.chunks = chunks
        self.blocks = None if one_pass else self._blocks()

    def _blocks(self) -> list[tuple[int, int]]:
        """Blocks of keys [start, stop) of a row that is too long for one pass; starts are aligned for tiles
        and mask tables."""
        arch = self.parent.arch
        unit = max(arch.lanes, constant_alignment(arch) // PARAM_DTYPE.itemsize)
        size = min(arch.row_depth, arch.lane_depth // 2) // unit * unit
        if not size:
            raise LoweringError(
                f"{describe(self.op)}: {self.keys} keys need blocks of {unit}, "
                f"and row_depth of {arch.name} is {arch.row_depth}"
            )
        count = -(-self.keys // size)
        size = align_up(-(-self.keys // count), unit)
        return [(start, min(self.keys, start + size)) for start in range(0, self.keys, size)]

    def scores(
        self, batch: int, tile: int, head: int, block: tuple[int, int] | None = None, **fields: int
    ) -> list[Step]:
        """Q * K^T for a block of keys, into the row unit."""
        parent, op, rows = self.parent, self.op, self.parent.arch.rows
        start, stop = block or (0, self.keys)
        read = [parent.region(op.k, batch, t) for t in range(start // rows, -(-stop // rows))]
        fields = {
            "row_op": RowOp.SOFTMAX,
            "out": Out.LANES,
            "row_mult": op.out_mult,
            "row_shift": op.out_shift,
            **fields,
        }
        addresses: dict[str, At] = {}
        if op.mask is None:
            fields |= {"scale": Scale.CONST, "mult": op.score_mult, "shift": op.score_shift}
        else:
            fields |= {"scale": Scale.COLUMN}
            stride = mask_stride(self.keys, parent.arch)
            addresses["p_addr"] = At(parent.mask_table(op), batch * stride + start * PARAM_DTYPE.itemsize)
        steps = []
        for place, (k0, k1) in enumerate(self.chunks):
            final, channel = place + 1 == len(self.chunks), head * self.head_dim + k0
            steps.append(
                Step(
                    op=self.index,
                    fields={
                        "k": k1 - k0,
                        "cols": stop - start,
                        "w_dep": 1,
                        "w_stride": self.channels * rows,
                        "psum_in": int(place > 0),
                        **(fields if final else {"psum_out": 1}),
                    },
                    addresses={
                        "a_addr": parent.column(op.q, batch, tile, channel),
                        "w_addr": parent.column(op.k, batch, start // rows, channel),
                        **(addresses if final else {}),
                    },
                    reads=(parent.region(op.q, batch, tile), *read),
                    note=f"{op.name} scores [{batch}, {tile}] head {head}, keys {start}..{stop - 1}",
                )
            )
        return steps

    def output(
        self,
        batch: int,
        tile: int,
        head: int,
        block: tuple[int, int] | None = None,
        features: tuple[int, int] | None = None,
    ) -> list[Step]:
        """P * V for a block of keys; partial sums are kept unless the block is the last."""
        parent, op, arch = self.parent, self.op, self.parent.arch
        start, stop = block or (0, self.keys)
        f0, f1 = features or (0, self.head_dim)
        final, channel = stop == self.keys, head * self.head_dim + f0
        stride = parent.block_stride(self.values)
        weights = parent.transposed(self.values, batch, head, start)
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
        if final:
            store_fields, store_addresses = parent.store(
                op.out, batch, tile, Segment(start=channel, stop=channel + f1 - f0)
            )
            fields |= {"scale": Scale.ROW, **store_fields}
            addresses |= store_addresses
        else:
            fields["psum_out"] = 1
        return [
            Step(
                op=self.index,
                fields=fields,
                addresses=addresses,
                reads=tuple(
                    parent.region(self.values, batch, t)
                    for t in range(start // arch.rows, -(-stop // arch.rows))
                ),
                writes=(parent.region(op.out, batch, tile),) if final else (),
                note=f"{op.name} output [{batch}, {tile}] head {head}, keys {start}..{stop - 1}",
            )
        ]

    def blocked(self, batch: int, tile: int, head: int) -> list[Step]:
        """A row in blocks of keys: the maximum over all of them, then block by block exponentials and
        products with the values."""
        assert self.blocks is not None
        arch, steps = self.parent.arch, []
        for block in self.blocks:
            steps += self.scores(
                batch, tile, head, block, row_op=RowOp.MAX, out=Out.NONE, row_first=int(block[0] == 0)
            )
        width = min(self.head_dim, arch.psum_depth)
        if width < self.head_dim:
            width = max(arch.lanes, width // arch.lanes * arch.lanes)
        if width > arch.psum_depth:
            raise LoweringError(
                f"{describe(self.op)}: psum_depth {arch.psum_depth} is less than the {arch.lanes} lanes"
            )
        for f0 in range(0, self.head_dim, width):
            for block in self.blocks:
                first, last = block[0] == 0, block[1] == self.keys
                steps += self.scores(
                    batch, tile, head, block, row_op=RowOp.EXP, row_first=int(first), row_last=int(last)
                )
                steps += self.output(batch, tile, head, block, (f0, min(self.head_dim, f0 + width)))
        return steps
