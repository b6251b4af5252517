"""Post unit: partial sums, bias, requantisation, residual, activation table; a column of `rows` values per cycle.

Model: `hw.numerics` (requantise, residual_add, table_lookup), applied in the order of docs/numerics.md.
"""

from amaranth import C, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import Arch
from hw.arithmetic import fold, kept, parts, rounded, saturate
from hw.commands import column_layout, param_layout, post_command, row_scale_layout
from hw.gearbox import pair_layout
from hw.shared import place
from hw.stream_util import Columns, StreamSkid

__all__ = ["STAGES", "TABLE_FLUSH", "TABLE_WORDS", "Post", "PostRow", "RowControl"]

STAGES = ("entered", "sum", "stored", "biased", "parts", "product", "shifted", "scaled", "chosen", "added", "looked", "result")
"""Pipeline registers a column passes. After: the choice of its source, the bias, the read of the psum RAM, the stored sum; the
products of the pieces of sum and multiplier, their sum, the shift, the rounding; the larger of value and residual or what is
to be added, the residual add, the table's address, the table."""

TABLE_WORDS = 32
"""Parameter words of a TABLE, eight entries each."""

TABLE_FLUSH = len(STAGES)
"""Moves of the pipeline before a TABLE may overwrite entries: columns before it have then left the table stage."""


class RowControl(wiring.Signature):
    """What all rows do in a stage; each field is aligned with the stage that uses it.

    Members
    -------
    empty, room : the pipeline moves if its end is empty or what follows has room: a register each, so that
    every row makes its own enable. bias : of the column in `entered`. psum_addr : whose stored sums are
    read; psum_in : add them. keep, keep_addr : the sum goes to the psum RAM.
    r_mult : of the residual; r_shift : of what is added. times8, times16 : the residual, int8 or int16, times r_mult is the
    multiplier. add : add the residual; larger : take the larger one. table : use the table.
    table_en, table_addr, table_data : load one entry.
    """

    def __init__(self, arch: Arch) -> None:
        psum = (arch.psum_depth - 1).bit_length()
        super().__init__({
            "empty": Out(1), "room": Out(1), "psum_addr": Out(psum), "keep": Out(1), "keep_addr": Out(psum),
            "psum_in": Out(1), "bias": Out(signed(32)), "r_mult": Out(signed(16)), "r_shift": Out(6),
            "times8": Out(1), "times16": Out(1), "add": Out(1), "larger": Out(1),
            "table": Out(1), "table_en": Out(1), "table_addr": Out(8), "table_data": Out(8),
        })


class PostRow(wiring.Component):
    """Datapath of one token row. Latency: `len(STAGES)` cycles of `advance`.

    Members
    -------
    control : see `RowControl`. acc : int32 sum. mult, shift : multiplier and shift, aligned with stages `stored` and `parts`.
    residual : aligned with stage `entered`. o : int16 result.
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
        advance = Signal()
        m.submodules.psum = psum = memory.Memory(shape=signed(32), depth=self._arch.psum_depth, init=[],
                                                 attrs={"ram_style": "block"})
        m.submodules.table = table = memory.Memory(shape=8, depth=256, init=[])
        keep, stored, entry, looked = psum.write_port(), psum.read_port(), table.write_port(), table.read_port()
        entered, acc, later, held, total, biased = (
            Signal(signed(32), name=name) for name in ("entered", "acc", "later", "held", "total", "biased"))
        m.d.comb += [
            advance.eq(c.empty | c.room), stored.en.eq(advance), stored.addr.eq(c.psum_addr),
            total.eq(later + held), keep.en.eq(c.keep), keep.addr.eq(c.keep_addr), keep.data.eq(total),
            entry.en.eq(c.table_en), entry.addr.eq(c.table_addr), entry.data.eq(c.table_data),
        ]
        with m.If(advance):
            m.d.sync += [entered.eq(self.acc), acc.eq(entered + c.bias), later.eq(acc), held.eq(Mux(c.psum_in, stored.data, 0)),
                         biased.eq(total)]
        r_product = self._residual(m, advance)
        scaled = self._scale(m, advance, biased, r_product)
        self._finish(m, advance, scaled, r_product, looked)
        return m

    def _residual(self, m: Module, advance: Signal) -> Signal:
        """What the residual gives, in stage `stored`: one multiplier for what is added (later) and for what multiplies."""
        c = self.control
        terms = parts(self.residual, c.r_mult, spare=self._arch.spare_dsps)
        r_parts, r_product = kept(terms, "r_part"), Signal(signed(32))
        with m.If(advance):
            m.d.sync += [register.eq(term) for (register, _), (term, _) in zip(r_parts, terms)]
            m.d.sync += r_product.eq(fold(fold(r_parts))[0][0])
        return r_product

    def _scale(self, m: Module, advance: Signal, biased: Signal, r_product: Signal) -> Signal:
        """Multiply and shift, from stage `biased` to stage `scaled`."""
        c = self.control
        mult, shift, product = Signal(signed(16)), Signal(6), Signal(signed(48))
        shifted, scaled = Signal(signed(49)), Signal(signed(16))
        terms = parts(biased, mult, bits=self._arch.multiplier_bits)
        pieces = kept(terms, "piece")
        with m.If(advance):
            m.d.sync += [
                mult.eq(Mux(c.times16, r_product[16:].as_signed(), Mux(c.times8, r_product[8:24].as_signed(), self.mult))),
                *(register.eq(term) for (register, _), (term, _) in zip(pieces, terms)),
                product.eq(fold(pieces)[0][0]), shift.eq(self.shift),
                shifted.eq(Cat(C(0, 1), product).as_signed() >> shift),  # keeps the last bit shifted out
                scaled.eq(rounded(shifted, 16)),
            ]
        return scaled

    def _finish(self, m: Module, advance: Signal, scaled: Signal, r_product: Signal, looked) -> None:
        """Residual and table. Of the residual more than 17 bits change nothing: the sum is clipped to 16."""
        c = self.control
        r_shifted, waiting = Signal(signed(33)), [Signal(signed(17), name=f"r_scaled{i}") for i in range(4)]
        chosen, addend, added = Signal(signed(17)), Signal(signed(17)), Signal(signed(16))
        plain, use_table, o = Signal(signed(16)), Signal(), Signal(signed(16))
        residual = waiting[-1]
        m.d.comb += [
            self.o.eq(o), looked.en.eq(advance & c.table), looked.addr.eq(saturate(added, 8) ^ 0x80),
        ]
        with m.If(advance):
            m.d.sync += [
                r_shifted.eq(Cat(C(0, 1), r_product).as_signed() >> c.r_shift), waiting[0].eq(rounded(r_shifted, 17)),
                *(now.eq(before) for now, before in zip(waiting[1:], waiting)),
                # one adder and one saturation for both: max(a, b) + 0 or a + b
                chosen.eq(Mux(c.larger & (residual > scaled), residual, scaled)), addend.eq(Mux(c.add, residual, 0)),
                added.eq(saturate(chosen + addend, 16)),
                plain.eq(added), use_table.eq(c.table), o.eq(Mux(use_table, looked.data.as_signed(), plain)),
            ]


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
        cmd, take, advance, empty = self.cmd.payload, Signal(), Signal(), Signal(init=1)
        columns = Columns(m, cmd.cols, take)
        # the enables of a column travel with it
        names = ("valid", "psum_in", "keep", "times8", "times16", "add", "larger", "table", "rows", "by_row")
        flags = data.StructLayout(dict.fromkeys(names, 1))
        stages = [Signal(flags, name=f"stage_{name}") for name in STAGES]
        self._output(m, stages[-1])
        enter = Signal(flags)
        keep_busy, inputs = Signal(), Signal()
        owed = [stage.valid & stage.keep for stage in stages[:3]]
        tile = self.cmd.valid & ~cmd.load_table
        m.d.comb += [
            # the sums that the column reads must have been written: two stages are between
            keep_busy.eq(cmd.psum_in & columns.first & (owed[0] | owed[1])),
            inputs.eq(
                (~cmd.array | self.acc.valid) & (~cmd.bypass | self.bypass.valid) & (~cmd.params | self.params.valid)
                & (~cmd.scaled | self.scale.valid) & (~cmd.residual | self.residual.valid) & ~keep_busy),
            # as `advance`, from a register of its own: that one drives the whole pipeline
            take.eq(tile & inputs & (~stages[-1].valid | self._room)),
            enter.valid.eq(take), enter.psum_in.eq(cmd.psum_in), enter.keep.eq(cmd.psum_out),
            *(enter[name].eq(cmd[name]) for name in ("times8", "times16", "add", "larger", "table", "rows", "by_row")),
            self.acc.ready.eq(take & cmd.array), self.bypass.ready.eq(take & cmd.bypass),
            self.residual.ready.eq(take & cmd.residual), self.scale.ready.eq(take & cmd.scaled & columns.last),
            self.busy.eq(take), self.wait_input.eq(tile & ~inputs), self.wait_output.eq(tile & inputs & ~advance),
        ]
        m.d.comb += advance.eq(empty | self._room)
        with m.If(advance):
            m.d.sync += [empty.eq(~stages[-2].valid), *(now.eq(before) for now, before in zip(stages, [enter, *stages[:-1]]))]
            # partial sums end here: they are no output
            m.d.sync += stages[3].valid.eq(stages[2].valid & ~stages[2].keep)
        control = self._rows(m, platform, stages, advance, empty, columns.index, owed[2])
        self._table(m, control, advance, tile & take & columns.last, cmd.params & take)
        return m

    def _output(self, m: Module, out) -> None:
        """The last stage goes to the row unit or the store unit; the pipeline moves when it is empty or taken (`_room`).

        The skid keeps what those are ready for out of the array's way: the longest path of the design without it.
        """
        m.submodules.skid = skid = StreamSkid(data.StructLayout({"rows": 1, "column": self.to_rows.payload.shape()}))
        to_rows, column = skid.o.payload.rows, skid.o.payload.column
        m.d.comb += [
            skid.i.valid.eq(out.valid), skid.i.payload.rows.eq(out.rows),
            self.to_rows.valid.eq(skid.o.valid & to_rows), self.to_store.valid.eq(skid.o.valid & ~to_rows),
            self.to_rows.payload.eq(column), self.to_store.payload.eq(column),
            skid.o.ready.eq(Mux(to_rows, self.to_rows.ready, self.to_store.ready)),
        ]
        self._result, self._room = skid.i.payload.column, skid.i.ready

    def _rows(self, m: Module, platform: object, stages: list, advance, empty, index, keep):
        """Instances of the row datapath and the operands all rows share."""
        cmd, rows = self.cmd.payload, self._arch.rows
        params = data.View(param_layout(), self.params.payload)
        control = RowControl(self._arch).create()
        by_column = cmd.by_column
        given = Signal(signed(16), name="given_mult")
        m.d.comb += given.eq(Mux(by_column, params.mult, cmd.mult.as_signed()))

        def travel(value, steps: int, name: str, *, by_row: bool = False) -> list:
            """Registers of a value in the first stages; with `by_row`, they keep it where no column needs it."""
            found = [Signal(value.shape(), name=f"{name}_{stage}", reset_less=True) for stage in STAGES[:steps]]
            for stage, (now, before) in enumerate(zip(found, [value, *found])):
                needed = (cmd.by_row if stage == 0 else stages[stage - 1].by_row) if by_row else 1
                with m.If(advance & needed):
                    m.d.sync += now.eq(before)
            return found

        addr, bias = travel(index, 3, "addr"), travel(Mux(cmd.params, params.bias, 0).as_signed(), 1, "bias")
        mult, shift = travel(given, 3, "mult"), travel(Mux(by_column, params.shift, cmd.shift)[:6], 5, "shift")
        r_mult = travel(Mux(cmd.times8 | cmd.times16, given, cmd.r_mult.as_signed()).as_signed(), 1, "r_mult")
        r_shift = travel(cmd.r_shift, 3, "r_shift")
        row_mult = travel(Cat(self.scale.payload.mult), 3, "row_mult", by_row=True)[-1]
        row_shift = travel(Cat(self.scale.payload.shift), 5, "row_shift", by_row=True)[-1]
        residual = travel(Cat(self._residual(t) for t in range(rows)), 1, "residual")[0]
        m.d.comb += [
            control.empty.eq(empty), control.room.eq(self._room), control.bias.eq(bias[0]), control.psum_addr.eq(addr[0]),
            control.psum_in.eq(stages[1].psum_in), control.keep.eq(keep & advance), control.keep_addr.eq(addr[2]),
            control.r_mult.eq(r_mult[0]), control.r_shift.eq(r_shift[2]),
            control.times8.eq(stages[2].times8), control.times16.eq(stages[2].times16),
            control.add.eq(stages[7].add), control.larger.eq(stages[7].larger), control.table.eq(stages[9].table),
        ]
        for t in range(rows):
            row = PostRow(self._arch)
            place(m, platform, f"row{t}", row, module="post_row")
            for name in RowControl(self._arch).members:
                m.d.comb += getattr(row.control, name).eq(getattr(control, name))
            acc = Mux(cmd.array_data, self.acc.payload[t],
                      Mux(cmd.bypass_data, self.bypass.payload.word_select(t, 8).as_signed(), 0))
            m.d.comb += [
                row.acc.eq(acc), row.residual.eq(residual.word_select(t, 16).as_signed()),
                row.mult.eq(Mux(stages[2].by_row, row_mult.word_select(t, 16), mult[2])),
                row.shift.eq(Mux(stages[4].by_row, row_shift.word_select(t, 6), shift[4])),
                self._result[t].eq(row.o),
            ]
        return control

    def _residual(self, t: int):
        """Token row t of the residual's column."""
        column = self.residual.payload
        return Mux(column.wide, column.data.word_select(t, 16).as_signed(), column.data.word_select(t, 8).as_signed())

    def _table(self, m: Module, control, advance, tile_done, param_taken) -> None:
        """TABLE: `TABLE_WORDS` words, an entry per cycle, once the columns before it have left the pipeline's table stage."""
        cmd, entry = self.cmd.payload, Signal(8)
        loading, flushed = self.cmd.valid & cmd.load_table, Signal(range(TABLE_FLUSH + 1))
        ready = loading & self.params.valid & (flushed == TABLE_FLUSH)
        with m.If(~loading):
            m.d.sync += flushed.eq(0)
        with m.Elif((flushed != TABLE_FLUSH) & advance):
            m.d.sync += flushed.eq(flushed + 1)
        m.d.comb += [
            control.table_en.eq(ready), control.table_addr.eq(entry),
            control.table_data.eq(self.params.payload.word_select(entry[:3], 8)),
            self.params.ready.eq(param_taken | (ready & (entry[:3] == 7))),
            self.cmd.ready.eq(tile_done | (ready & (entry == 8 * TABLE_WORDS - 1))),
        ]
        with m.If(ready):
            m.d.sync += entry.eq(entry + 1)
