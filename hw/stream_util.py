"""Stream parts shared by units."""

from typing import Any

from amaranth.hdl import Module, Mux, ShapeLike, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["StreamHold", "StreamSkid"]


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
        full, kept = Signal(), Signal(len(given), reset_less=True)
        m.d.comb += [self.i.ready.eq(~full), self.o.valid.eq(full | self.i.valid), offered.eq(Mux(full, kept, given))]
        with m.If(~full):
            m.d.sync += kept.eq(given)
        m.d.sync += full.eq(self.o.valid & ~self.o.ready)
        return m
