"""Command queue: a short FIFO with stream ports."""

from amaranth import Module, Value
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

__all__ = ["Queue", "join"]


def join(m: Module, source, sink) -> None:
    """Connect two streams whose payloads have the same bits."""
    m.d.comb += [
        sink.valid.eq(source.valid), source.ready.eq(sink.ready),
        Value.cast(sink.payload).eq(Value.cast(source.payload)),
    ]


class Queue(wiring.Component):
    """`depth` payloads; latency 1 cycle, one payload per cycle.

    Members
    -------
    i, o : streams of the given shape. level : payloads inside.
    """

    def __init__(self, shape, *, depth: int) -> None:
        self._depth = depth
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape)),
                          "level": Out(range(depth + 1))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        payload = Value.cast(self.i.payload)
        m.submodules.fifo = fifo = SyncFIFOBuffered(width=len(payload), depth=self._depth)
        m.d.comb += [
            fifo.w_data.eq(payload), fifo.w_en.eq(self.i.valid), self.i.ready.eq(fifo.w_rdy),
            Value.cast(self.o.payload).eq(fifo.r_data), self.o.valid.eq(fifo.r_rdy), fifo.r_en.eq(self.o.ready),
            self.level.eq(fifo.level),
        ]
        return m
