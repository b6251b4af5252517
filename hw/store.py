"""Store unit: result columns for the writer (int8, int16, or int8 transposed)."""

import numpy as np
from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import NDArray

from hw.arch import Arch
from hw.arithmetic import saturate
from hw.commands import column_layout, row_out_command, store_command
from hw.stream_util import Columns

__all__ = ["RowRoute", "Store", "Transposer", "transpose_blocks"]


def transpose_blocks(columns: NDArray[np.int8], lanes: int) -> NDArray[np.int8]:
    """Model of `Transposer`: columns (cols, rows) to words (blocks * rows, lanes), missing columns zero."""
    cols, rows = columns.shape
    padded = np.zeros((-(-cols // lanes) * lanes, rows), np.int8)
    padded[:cols] = columns
    return padded.reshape(-1, lanes, rows).swapaxes(1, 2).reshape(-1, lanes)


class Transposer(wiring.Component):
    """Blocks of `rows` columns become `rows` words of one byte of each column. `rows` = `lanes`.

    Byte t of column c lies in bank (t + c) mod rows at address c, so that a column is written and a row is read in one
    cycle each. Two blocks alternate: one is read while the next is written. Latency: a block.

    Members
    -------
    i : column; `last`: the block ends here, the columns that are missing are zero. o : word (row of the block).
    """

    def __init__(self, arch: Arch) -> None:
        self._rows = arch.rows
        self._column = 8 * arch.rows
        super().__init__({
            "i": In(stream.Signature(self._column)), "last": In(1), "o": Out(stream.Signature(self._column)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows, bits = self._rows, (self._rows - 1).bit_length()
        column, row, filling, reading = Signal(bits), Signal(bits), Signal(), Signal()
        count, full = [Signal(bits + 1, name=f"count{i}") for i in range(2)], Signal(2)
        write, end, read = Signal(), Signal(), Signal()
        m.d.comb += [
            self.i.ready.eq(~full.bit_select(filling, 1)), write.eq(self.i.valid & self.i.ready),
            end.eq(self.last | (column == rows - 1)),
            read.eq(full.bit_select(reading, 1) & (~self.o.valid | self.o.ready)),
        ]
        with m.If(write):
            m.d.sync += column.eq(Mux(end, 0, column + 1))
            with m.If(end):
                m.d.sync += [filling.eq(~filling), full.bit_select(filling, 1).eq(1)]
                for i in range(2):
                    with m.If(filling == i):
                        m.d.sync += count[i].eq(column + 1)
        with m.If(read):
            m.d.sync += row.eq(row + 1)
            with m.If(row == rows - 1):
                m.d.sync += [reading.eq(~reading), full.bit_select(reading, 1).eq(0)]
        with m.If(self.o.ready | read):
            m.d.sync += self.o.valid.eq(read)
        self._banks(m, write, column, filling, read, row, reading, Mux(reading, count[1], count[0]))
        return m

    def _banks(self, m: Module, write, column, filling, read, row, reading, count) -> None:
        """The skewed banks, with the rotation of columns going in and of rows coming out."""
        rows, bits = self._rows, len(column)
        row_read, present = Signal(bits), Signal(rows)
        with m.If(read):
            m.d.sync += [row_read.eq(row), present.eq(Cat(c < count for c in range(rows)))]
        shifted_in, shifted_out, banks = Signal(8 * rows), Signal(8 * rows), []
        # bank b takes byte b - column; word byte c comes from bank row + c
        m.d.comb += shifted_in.eq(Cat(self.i.payload, self.i.payload) >> ((rows - column) * 8)[: bits + 4])
        for b in range(rows):
            m.submodules[f"bank{b}"] = bank = memory.Memory(shape=8, depth=2 * rows, init=[])
            port_in, port_out, at = bank.write_port(), bank.read_port(), Signal(bits, name=f"at{b}")
            m.d.comb += [
                port_in.en.eq(write), port_in.addr.eq(Cat(column, filling)), port_in.data.eq(shifted_in.word_select(b, 8)),
                at.eq(b - row), port_out.en.eq(read), port_out.addr.eq(Cat(at, reading)),
            ]
            banks.append(port_out.data)
        m.d.comb += [
            shifted_out.eq(Cat(*banks, *banks) >> (row_read << 3)),
            self.o.payload.eq(Cat(Mux(present[c], shifted_out.word_select(c, 8), 0) for c in range(rows))),
        ]


class RowRoute(wiring.Component):
    """Sends the row unit's columns to the lanes (low 8 bits) or to the store unit, as each command says. Latency 0.

    Members
    -------
    cmd : `row_out_command` per TILE whose row operation has output. i : int16 columns. lanes, store : outputs.
    """

    def __init__(self, arch: Arch) -> None:
        self._rows = arch.rows
        column = stream.Signature(column_layout(arch.rows, 16))
        super().__init__({
            "cmd": In(stream.Signature(row_out_command())), "i": In(column),
            "lanes": Out(stream.Signature(8 * arch.rows)), "store": Out(column),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        move, cmd = Signal(), self.cmd.payload
        columns = Columns(m, cmd.count, move)
        m.d.comb += [
            self.lanes.valid.eq(self.cmd.valid & cmd.lanes & self.i.valid),
            self.store.valid.eq(self.cmd.valid & ~cmd.lanes & self.i.valid),
            self.lanes.payload.eq(Cat(self.i.payload[t][:8] for t in range(self._rows))),
            self.store.payload.eq(self.i.payload),
            self.i.ready.eq(self.cmd.valid & Mux(cmd.lanes, self.lanes.ready, self.store.ready)),
            move.eq(self.i.valid & self.i.ready), self.cmd.ready.eq(move & columns.last),
        ]
        return m


class Store(wiring.Component):
    """One column per cycle; transposed blocks with a block of latency.

    Members
    -------
    cmd : `store_command` per TILE that stores. post, row_unit : columns.
    o : columns of 2 * `rows` bytes, of int8 in the lower half.
    busy : a column left.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        column = stream.Signature(column_layout(arch.rows, 16))
        super().__init__({
            "cmd": In(stream.Signature(store_command())), "post": In(column), "row_unit": In(column),
            "o": Out(stream.Signature(16 * arch.rows)), "busy": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows, cmd = self._arch.rows, self.cmd.payload
        m.submodules.transposer = transposer = Transposer(self._arch)
        column, valid, take = Signal(column_layout(rows, 16)), Signal(), Signal()
        columns, transposing = Columns(m, cmd.cols, take), Signal()  # transposing : something is owed
        wide, transposed = cmd.wide, cmd.transposed
        # clipped before the choice, which drives the whole column
        clipped = [Cat(saturate(source.payload[t], 8) for t in range(rows)) for source in (self.row_unit, self.post)]
        bytes_ = Mux(cmd.from_rows, *clipped)
        words = Cat(column[t] for t in range(rows))
        # words still in the transposer leave before the next direct column
        owed, owed_next = Signal(range(4 * rows)), Signal(range(4 * rows))
        m.d.comb += [
            column.eq(Mux(cmd.from_rows, self.row_unit.payload, self.post.payload)),
            valid.eq(self.cmd.valid & Mux(cmd.from_post, self.post.valid, self.row_unit.valid)),
            transposer.i.payload.eq(bytes_), transposer.last.eq(columns.last), transposer.i.valid.eq(valid & transposed),
            take.eq(Mux(transposed, transposer.i.valid & transposer.i.ready,
                        valid & ~transposing & self.o.ready)),
            self.post.ready.eq(take & cmd.from_post), self.row_unit.ready.eq(take & ~cmd.from_post),
            self.cmd.ready.eq(take & columns.last),
            transposer.o.ready.eq(self.o.ready), self.busy.eq(self.o.valid & self.o.ready),
        ]
        with m.If(transposing):
            m.d.comb += [self.o.valid.eq(transposer.o.valid), self.o.payload.eq(transposer.o.payload)]
        with m.Else():
            m.d.comb += [
                self.o.valid.eq(valid & ~transposed),
                self.o.payload.eq(Cat(Mux(wide, words[: 8 * rows], bytes_), words[8 * rows:])),
            ]
        block_done = take & transposed & (columns.last | (columns.index[: (rows - 1).bit_length()] == rows - 1))
        word_left = transposing & self.o.valid & self.o.ready
        m.d.comb += owed_next.eq(owed + Mux(block_done, rows, 0) - word_left)
        m.d.sync += [owed.eq(owed_next), transposing.eq(owed_next != 0)]
        return m
