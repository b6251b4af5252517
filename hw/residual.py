"""Residual columns: words of `rows` bytes become columns of int16, from int8 (one word) or int16 (two words)."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import Arch
from hw.commands import column_layout, residual_command

__all__ = ["Widen"]


class Widen(wiring.Component):
    """One int8 column per cycle, or one int16 column every second cycle. Latency 0.

    Members
    -------
    cmd : `residual_command` per TILE with a residual. i : words of `rows` bytes. o : int16 columns.
    """

    def __init__(self, arch: Arch) -> None:
        self._rows = arch.rows
        super().__init__({
            "cmd": In(stream.Signature(residual_command())),
            "i": In(stream.Signature(8 * arch.rows)),
            "o": Out(stream.Signature(column_layout(arch.rows, 16))),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows, cmd = self._rows, self.cmd.payload
        low, have_low, moved = Signal(8 * rows), Signal(), Signal(16)
        complete = self.cmd.valid & self.i.valid & (~cmd.wide | have_low)
        move, last = Signal(), Signal()
        wide = [low.word_select(t, 16) if t < rows // 2 else self.i.payload.word_select(t - rows // 2, 16)
                for t in range(rows)]
        m.d.comb += [
            self.o.valid.eq(complete), move.eq(complete & self.o.ready), last.eq(moved + 1 == cmd.count),
            self.i.ready.eq(move | (self.cmd.valid & cmd.wide & ~have_low)), self.cmd.ready.eq(move & last),
            *(self.o.payload[t].eq(Mux(cmd.wide, wide[t].as_signed(), self.i.payload.word_select(t, 8).as_signed()))
              for t in range(rows)),
        ]
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [low.eq(self.i.payload), have_low.eq(cmd.wide & ~have_low)]
        with m.If(move):
            m.d.sync += moved.eq(Mux(last, 0, moved + 1))
        return m
