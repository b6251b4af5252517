"""Post unit: partial sums, bias, requantisation, residual, activation table; a column of `rows` values per cycle.

Model: `hw.numerics` (requantise, residual_add, table_lookup), applied in the order of docs/numerics.md.
"""

from amaranth import C, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import Arch
from hw.commands import column_layout, param_layout, post_command, row_scale_layout
from hw.gearbox import pair_layout
from hw.isa import Residual, RowOp, Scale, Source
from hw.shared import place
from hw.soft import product as product_of
from hw.stream_util import StreamSkid

__all__ = ["STAGES", "TABLE_FLUSH", "TABLE_WORDS", "Post", "PostRow", "RowControl"]

STAGES = ("sum", "biased", "product", "scaled", "added", "looked")
"""Pipeline registers a column passes: after the psum read, the adders, the multiply, the shift, the residual add, the table."""

TABLE_WORDS = 32
"""Parameter words of a TABLE, eight entries each."""

TABLE_FLUSH = 7
"""Moves of the pipeline before a TABLE may overwrite entries: columns before it have then left the table stage."""


def saturate(value, bits: int):
    """Expression: a signed value clipped to `bits` bits."""
    high = value[bits - 1:]
    overflow = high.any() & ~high.all()
    top = C((1 << (bits - 1)) - 1, bits)
    return Mux(overflow, top ^ value[-1].replicate(bits), value[:bits]).as_signed()


def round_shift(value, shift):
    """Expression: ``(value + 2^(shift-1)) >> shift``, shift >= 1."""
    shifted = (Cat(C(0, 1), value).as_signed() >> shift).as_signed()  # keeps the last bit shifted out
    return (shifted[1:].as_signed() + shifted[0])


class RowControl(wiring.Signature):
    """What all rows do in a stage; each field is aligned with the stage that uses it.

    Members
    -------
    take : a column enters; with psum_addr, the stored sums are read, and bias is added. advance : the pipeline moves.
    keep, keep_addr : the sum (stage 0) goes to the psum RAM. psum_in : add the stored sum.
    r_mult : of the residual; r_shift : of what is added. times8, times16 : the residual, int8 or int16, times r_mult is the
    multiplier. add : add the residual; larger : take the larger one. table : use the table.
    table_en, table_addr, table_data : load one entry.
    """

    def __init__(self, arch: Arch) -> None:
        psum = (arch.psum_depth - 1).bit_length()
        super().__init__({
            "take": Out(1), "advance": Out(1), "psum_addr": Out(psum), "keep": Out(1), "keep_addr": Out(psum),
            "psum_in": Out(1), "bias": Out(signed(32)), "r_mult": Out(signed(16)), "r_shift": Out(6),
            "times8": Out(1), "times16": Out(1), "add": Out(1), "larger": Out(1),
            "table": Out(1), "table_en": Out(1), "table_addr": Out(8), "table_data": Out(8),
        })


class PostRow(wiring.Component):
    """Datapath of one token row. Latency: `len(STAGES)` cycles of `advance`.

    Members
    -------
    control : see `RowControl`. acc : int32 sum. mult, shift : multiplier and shift, aligned with stages `biased` and `product`.
    residual : aligned with stage `sum`. o : int16 result.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        super().__init__({
            "control": In(RowControl(arch)), "acc": In(signed(32)), "mult": In(signed(16)), "shift": In(6),
            "residual": In(signed(16)), "o": Out(signed(16)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        c = self.control
        m.submodules.psum = psum = memory.Memory(shape=signed(32), depth=self._arch.psum_depth, init=[],
                                                 attrs={"ram_style": "block"})
        m.submodules.table = table = memory.Memory(shape=8, depth=256, init=[])
        keep, stored, entry, looked = psum.write_port(), psum.read_port(), table.write_port(), table.read_port()
        acc, total, biased = Signal(signed(32)), Signal(signed(32)), Signal(signed(32))
        product, scaled, added = Signal(signed(48)), Signal(signed(16)), Signal(signed(16))
        r_product, r_later, r_scaled, plain = Signal(signed(32)), Signal(signed(32)), Signal(signed(33)), Signal(signed(16))
        mult = Mux(c.times16, r_product[16:].as_signed(), Mux(c.times8, r_product[8:24].as_signed(), self.mult))
        addend, larger = Signal(signed(33)), Signal(signed(33))
        use_table = Signal()
        m.d.comb += [
            stored.en.eq(c.take), stored.addr.eq(c.psum_addr),
            total.eq(acc + Mux(c.psum_in, stored.data, 0)),
            keep.en.eq(c.keep), keep.addr.eq(c.keep_addr), keep.data.eq(total),
            entry.en.eq(c.table_en), entry.addr.eq(c.table_addr), entry.data.eq(c.table_data),
            looked.en.eq(c.advance & c.table), looked.addr.eq(saturate(added, 8) ^ 0x80),
            # one adder and one saturation for both: max(a, b) + 0 or a + b
            larger.eq(Mux(c.larger & (r_scaled > scaled), r_scaled, scaled)), addend.eq(Mux(c.add, r_scaled, 0)),
            self.o.eq(Mux(use_table, looked.data.as_signed(), plain)),
        ]
        with m.If(c.take):
            m.d.sync += acc.eq(self.acc + c.bias)  # here and not to the stored sum: that comes out of its RAM late
        with m.If(c.advance):
            m.d.sync += [
                # one multiplier for what is added (which waits a stage) and for what multiplies
                biased.eq(total), r_product.eq(product_of(self.residual, c.r_mult, spare=self._arch.spare_dsps)),
                product.eq(biased * mult), r_later.eq(r_product),
                scaled.eq(saturate(round_shift(product, self.shift), 16)), r_scaled.eq(round_shift(r_later, c.r_shift)),
                added.eq(saturate(larger + addend, 16)),
                plain.eq(added), use_table.eq(c.table),
            ]
        return m


class Post(wiring.Component):
    """The unit: takes a column per cycle from the array, the loader's bypass, or nothing (source ZERO).

    Members
    -------
    cmd : `post_command` per TILE and TABLE. acc : columns from the array. bypass : int8 columns (source STREAM).
    params : 8-byte words: column parameters, or 8 table entries. residual : columns, int16 if `wide`, else int8.
    scale : row scales. to_rows : columns for the row unit. to_store : columns for the store unit.
    busy : a column was taken. wait_input, wait_output : stalled for lack of operands, or by what follows.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        column = column_layout(arch.rows, 16)
        super().__init__({
            "cmd": In(stream.Signature(post_command())),
            "acc": In(stream.Signature(column_layout(arch.rows, 32))),
            "bypass": In(stream.Signature(8 * arch.rows)),
            "params": In(stream.Signature(64)),
            "residual": In(stream.Signature(pair_layout(arch.rows))),
            "scale": In(stream.Signature(row_scale_layout(arch.rows))),
            "to_rows": Out(stream.Signature(column)), "to_store": Out(stream.Signature(column)),
            "busy": Out(1), "wait_input": Out(1), "wait_output": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cmd, index, take, advance = self.cmd.payload, Signal(16), Signal(), Signal()
        # the enables of a column travel with it; residual is consumed one stage later than the sum
        names = ("valid", "psum_in", "keep", "times8", "times16", "add", "larger", "table", "rows", "by_row")
        flags = data.StructLayout(dict.fromkeys(names, 1))
        stages = [Signal(flags, name=f"stage_{name}") for name in STAGES]
        enter = Signal(flags)
        keep_busy, inputs = Signal(), Signal()
        by_column, by_row = cmd.scale == Scale.COLUMN, cmd.scale == Scale.ROW
        has_residual = cmd.residual != Residual.NONE
        tile = self.cmd.valid & ~cmd.load_table
        last = index + 1 == cmd.cols
        m.d.comb += [
            keep_busy.eq(stages[0].valid & stages[0].keep & cmd.psum_in & (index == 0)),
            inputs.eq(
                ((cmd.source == Source.ZERO) | ((cmd.source == Source.ARRAY) & self.acc.valid)
                 | ((cmd.source == Source.STREAM) & self.bypass.valid))
                & (cmd.psum_out | ~by_column | self.params.valid) & (cmd.psum_out | ~by_row | self.scale.valid)
                & (~has_residual | self.residual.valid) & ~keep_busy),
            take.eq(tile & inputs & advance),
            enter.valid.eq(take), enter.psum_in.eq(cmd.psum_in), enter.keep.eq(cmd.psum_out),
            enter.times8.eq(cmd.residual == Residual.MUL8), enter.times16.eq(cmd.residual == Residual.MUL16),
            enter.add.eq((cmd.residual == Residual.INT8) | (cmd.residual == Residual.INT16)),
            enter.larger.eq(cmd.residual == Residual.MAX8),
            enter.table.eq(cmd.table), enter.rows.eq(cmd.row_op != RowOp.NONE),
            enter.by_row.eq(by_row),
            self.acc.ready.eq(take & (cmd.source == Source.ARRAY)),
            self.bypass.ready.eq(take & (cmd.source == Source.STREAM)),
            self.residual.ready.eq(take & has_residual),
            self.scale.ready.eq(take & by_row & last & ~cmd.psum_out),
            self.busy.eq(take), self.wait_input.eq(tile & ~inputs), self.wait_output.eq(tile & inputs & ~advance),
        ]
        with m.If(take):
            m.d.sync += index.eq(Mux(last, 0, index + 1))
        self._output(m, stages, advance)
        with m.If(advance):
            m.d.sync += [now.eq(before) for now, before in zip(stages, [enter, *stages[:-1]])]
            # partial sums end here: they are no output
            m.d.sync += stages[1].valid.eq(stages[0].valid & ~stages[0].keep)
        control = self._rows(m, platform, enter, stages, take, advance, index)
        self._table(m, control, tile & take & last, by_column & ~cmd.psum_out & take)
        return m

    def _output(self, m: Module, stages: list, advance: Signal) -> None:
        """The last stage goes to the row unit or the store unit; the pipeline moves when it is empty or taken.

        The skid keeps what those are ready for out of the array's way: the longest path of the design without it.
        """
        out = stages[-1]
        m.submodules.skid = skid = StreamSkid(data.StructLayout({"rows": 1, "column": self.to_rows.payload.shape()}))
        to_rows, column = skid.o.payload.rows, skid.o.payload.column
        m.d.comb += [
            skid.i.valid.eq(out.valid), skid.i.payload.rows.eq(out.rows), advance.eq(~out.valid | skid.i.ready),
            self.to_rows.valid.eq(skid.o.valid & to_rows), self.to_store.valid.eq(skid.o.valid & ~to_rows),
            self.to_rows.payload.eq(column), self.to_store.payload.eq(column),
            skid.o.ready.eq(Mux(to_rows, self.to_rows.ready, self.to_store.ready)),
        ]
        self._result = skid.i.payload.column

    def _rows(self, m: Module, platform: object, enter, stages: list, take: Signal, advance: Signal, index: Signal):
        """Instances of the row datapath and the operands all rows share."""
        cmd, rows = self.cmd.payload, self._arch.rows
        params = data.View(param_layout(), self.params.payload)
        control = RowControl(self._arch).create()
        shared = data.StructLayout({"mult": signed(16), "shift": 6, "r_mult": signed(16), "r_shift": 6})
        sum_, biased, product = (Signal(shared, name=f"shared_{name}") for name in ("sum", "biased", "product"))
        scale, scale_biased, scale_product = (Signal(row_scale_layout(rows), name=name)
                                              for name in ("scale", "scale_biased", "scale_product"))
        by_column = cmd.scale == Scale.COLUMN
        mult = Mux(by_column, params.mult, cmd.mult.as_signed())
        with m.If(take):
            m.d.sync += [
                sum_.mult.eq(mult), sum_.shift.eq(Mux(by_column, params.shift, cmd.shift)),
                sum_.r_mult.eq(Mux(enter.times8 | enter.times16, mult, cmd.r_mult.as_signed())), sum_.r_shift.eq(cmd.r_shift),
            ]
            with m.If(cmd.scale == Scale.ROW):
                m.d.sync += scale.eq(self.scale.payload)
        with m.If(advance):
            m.d.sync += [biased.eq(sum_), product.eq(biased)]
            with m.If(stages[0].by_row):
                m.d.sync += scale_biased.eq(scale)
            with m.If(stages[1].by_row):
                m.d.sync += scale_product.eq(scale_biased)
        keep_addr = Signal.like(index)
        residual = Signal(column_layout(rows, 16))
        with m.If(take):
            m.d.sync += [keep_addr.eq(index), *(residual[t].eq(self._residual(t)) for t in range(rows))]
        m.d.comb += [
            control.take.eq(take), control.advance.eq(advance), control.psum_addr.eq(index),
            control.keep.eq(stages[0].valid & stages[0].keep & advance), control.keep_addr.eq(keep_addr),
            control.psum_in.eq(stages[0].psum_in), control.bias.eq(Mux(by_column & ~cmd.psum_out, params.bias, 0)),
            control.r_mult.eq(sum_.r_mult), control.r_shift.eq(product.r_shift),
            control.times8.eq(stages[1].times8), control.times16.eq(stages[1].times16),
            control.add.eq(stages[3].add), control.larger.eq(stages[3].larger), control.table.eq(stages[4].table),
        ]
        for t in range(rows):
            row = PostRow(self._arch)
            place(m, platform, f"row{t}", row, module="post_row")
            for name in RowControl(self._arch).members:
                m.d.comb += getattr(row.control, name).eq(getattr(control, name))
            acc = Mux(cmd.source == Source.ARRAY, self.acc.payload[t],
                      Mux(cmd.source == Source.STREAM, self.bypass.payload.word_select(t, 8).as_signed(), 0))
            m.d.comb += [
                row.acc.eq(acc), row.residual.eq(residual[t]),
                row.mult.eq(Mux(stages[1].by_row, scale_biased.mult[t], biased.mult)),
                row.shift.eq(Mux(stages[2].by_row, scale_product.shift[t], product.shift)),
                self._result[t].eq(row.o),
            ]
        return control

    def _residual(self, t: int):
        """Token row t of the residual's column."""
        column = self.residual.payload
        return Mux(column.wide, column.data.word_select(t, 16).as_signed(), column.data.word_select(t, 8).as_signed())

    def _table(self, m: Module, control, tile_done, param_taken) -> None:
        """TABLE: `TABLE_WORDS` words, an entry per cycle, once the columns before it have left the pipeline's table stage."""
        cmd, entry = self.cmd.payload, Signal(8)
        loading, flushed = self.cmd.valid & cmd.load_table, Signal(3)
        ready = loading & self.params.valid & (flushed == TABLE_FLUSH)
        with m.If(~loading):
            m.d.sync += flushed.eq(0)
        with m.Elif((flushed != TABLE_FLUSH) & control.advance):
            m.d.sync += flushed.eq(flushed + 1)
        m.d.comb += [
            control.table_en.eq(ready), control.table_addr.eq(entry),
            control.table_data.eq(self.params.payload.word_select(entry[:3], 8)),
            self.params.ready.eq(param_taken | (ready & (entry[:3] == 7))),
            self.cmd.ready.eq(tile_done | (ready & (entry == 8 * TABLE_WORDS - 1))),
        ]
        with m.If(ready):
            m.d.sync += entry.eq(entry + 1)
