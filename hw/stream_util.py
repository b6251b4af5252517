"""Stream parts shared by units: registers that end long paths."""

from typing import Any

from amaranth.hdl import Module, Mux, ShapeLike, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Columns", "StreamBuffer", "StreamHold", "StreamSkid"]


class StreamHold(wiring.Component):
    """One register of a stream whose ``ready`` does not depend on what follows: ends long ready chains.

    One transfer every other cycle, latency 1: for commands, not for data.

    Parameters
    ----------
    shape : ShapeLike
        Payload.

    Members
    -------
    i : ``In(stream)``
    o : ``Out(stream)``
    """

    def __init__(self, shape: ShapeLike) -> None:
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.d.comb += self.i.ready.eq(~self.o.valid)
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [self.o.valid.eq(1), self.o.payload.eq(self.i.payload)]
        with m.Elif(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        return m


class StreamSkid(wiring.Component):
    """Ends a ready chain without latency: a transfer that what follows does not take is kept aside.

    One transfer a cycle, latency 0; ``i.ready`` is a register.

    Parameters
    ----------
    shape : ShapeLike
        Payload.

    Members
    -------
    i : ``In(stream)``
    o : ``Out(stream)``
    """

    def __init__(self, shape: ShapeLike) -> None:
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        given, offered = Value.cast(self.i.payload), Value.cast(self.o.payload)
        full, room, kept = Signal(), Signal(init=1), Signal(len(given), reset_less=True)
        m.d.comb += [self.i.ready.eq(room), self.o.valid.eq(full | self.i.valid), offered.eq(Mux(full, kept, given))]
        with m.If(~full):
            m.d.sync += kept.eq(given)
        held = self.o.valid & ~self.o.ready
        m.d.sync += [full.eq(held), room.eq(~held)]  # two registers: one drives the whole payload
        return m


class StreamBuffer(wiring.Component):
    """Ends every path through a stream: payload, ``valid`` and ``ready`` come from registers on both sides.

    One transfer a cycle, latency 1; holds two.

    Parameters
    ----------
    shape : ShapeLike
        Payload.

    Members
    -------
    i : ``In(stream)``
    o : ``Out(stream)``
    """

    def __init__(self, shape: ShapeLike) -> None:
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        given = Value.cast(self.i.payload)
        full, room = Signal(), Signal(init=1)  # two registers: one drives the whole payload
        kept, offered = Signal(len(given), reset_less=True), Signal(len(given), reset_less=True)
        m.d.comb += [self.i.ready.eq(room), Value.cast(self.o.payload).eq(offered)]
        with m.If(~full):
            m.d.sync += kept.eq(given)
        with m.If(~self.o.valid | self.o.ready):
            m.d.sync += [offered.eq(Mux(full, kept, given)), self.o.valid.eq(full | self.i.valid), full.eq(0), room.eq(1)]
        with m.Elif(self.i.valid):
            m.d.sync += [full.eq(1), room.eq(0)]
        return m


class Columns:
    """Counts the columns of the command at the head of a queue; whether one is the last is known from registers.

    Use inside `elaborate`.

    Parameters
    ----------
    m : Module
        Where the registers go.
    count : Value
        Columns of the command, at least 1.
    move : Value
        One passes in this cycle.

    Attributes
    ----------
    index, first, last : Signal
        Of the column that passes next: its place, whether it is the command's first, its last.
    """

    def __init__(self, m: Module, count: Value, move: Value) -> None:
        self.index, self.first, self.last = Signal(len(count), name="index"), Signal(init=1, name="first"), Signal(name="last")
        final = Signal()  # not the first, and the last
        m.d.comb += self.last.eq(Mux(self.first, count == 1, final))
        with m.If(move):
            m.d.sync += [self.index.eq(Mux(self.last, 0, self.index + 1)), self.first.eq(self.last),
                         final.eq(self.index + 2 == count)]
