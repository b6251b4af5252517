"""Queues: `Fifo`, and the command queue, which has stream ports."""

from amaranth import Module, Mux, Signal, Value
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Fifo", "Queue", "join"]


def join(m: Module, source, sink) -> None:
    """Connect two streams whose payloads have the same bits."""
    m.d.comb += [
        sink.valid.eq(source.valid), source.ready.eq(sink.ready),
        Value.cast(sink.payload).eq(Value.cast(source.payload)),
    ]


class Fifo(wiring.Component):
    """A memory and an output register. Behaves as Amaranth's ``SyncFIFOBuffered`` of that depth, cycle by cycle, but whether
    there is room, and whether the memory holds an entry, are registers: one level of logic from `r_en` to the memory.

    Parameters
    ----------
    width, depth : int
        Bits of an entry; entries, at least 2.

    Members
    -------
    w_data, w_en, w_rdy, r_data, r_en, r_rdy : as there. level : entries inside. empty : there are none.
    """

    def __init__(self, *, width: int, depth: int) -> None:
        self._inside = depth - 1
        super().__init__({
            "w_data": In(width), "w_en": In(1), "w_rdy": Out(1, init=1), "r_data": Out(width), "r_en": In(1), "r_rdy": Out(1),
            "level": Out(range(depth + 1)), "empty": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = max(1, (self._inside - 1).bit_length())
        m.submodules.storage = storage = memory.Memory(shape=len(self.w_data), depth=1 << bits, init=[])
        write, read = storage.write_port(), storage.read_port()
        inner, some = Signal(range(self._inside + 1)), Signal()  # entries in the memory; there are any
        m.d.comb += [
            write.en.eq(self.w_en & self.w_rdy), write.data.eq(self.w_data),
            read.en.eq(some & (~self.r_rdy | self.r_en)), self.r_data.eq(read.data),
            self.level.eq(inner + self.r_rdy), self.empty.eq(~some & ~self.r_rdy),
        ]
        for port in (write, read):
            with m.If(port.en):
                m.d.sync += port.addr.eq(port.addr + 1)
        m.d.sync += [
            inner.eq(inner + write.en - read.en), self.r_rdy.eq(read.en | (self.r_rdy & ~self.r_en)),
            some.eq(write.en | Mux(read.en, inner != 1, some)),
            self.w_rdy.eq(Mux(write.en & ~read.en, inner != self._inside - 1, self.w_rdy | read.en)),
        ]
        return m


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
        m.submodules.fifo = fifo = Fifo(width=len(payload), depth=self._depth)
        m.d.comb += [
            fifo.w_data.eq(payload), fifo.w_en.eq(self.i.valid), self.i.ready.eq(fifo.w_rdy),
            Value.cast(self.o.payload).eq(fifo.r_data), self.o.valid.eq(fifo.r_rdy), fifo.r_en.eq(self.o.ready),
            self.level.eq(fifo.level),
        ]
        return m
