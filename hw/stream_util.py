"""Stream parts shared by units."""

from typing import Any

from amaranth.hdl import Module, ShapeLike
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["StreamHold"]


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
