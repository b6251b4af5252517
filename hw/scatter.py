"""From T values at once to one per cycle, and back: the joints around a datapath that the rows share."""

from amaranth import Module, Mux, Signal
from amaranth.hdl import ShapeLike
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Gather", "Scatter"]


class Scatter(wiring.Component):
    """Takes a value per row at once and sends them one by one, row 0 first.

    The first is offered in the cycle after the values were taken; then one per cycle. The next values are
    taken in the cycle after the last was sent.

    Parameters
    ----------
    shape : ShapeLike
        Shape of one value.
    rows : int
        Number of values.

    Members
    -------
    valid : In(1)
        `data` can be taken.
    ready : Out(1)
        `data` is taken in this cycle if `valid`. A register: independent of all inputs.
    data : In(shape).array(rows)
        Values.
    o : Out(stream)
        One value.
    """

    def __init__(self, shape: ShapeLike, *, rows: int) -> None:
        self.shape = shape
        self.rows = rows
        super().__init__({
            "valid": In(1),
            "ready": Out(1),
            "data":  In(shape).array(rows),
            "o":     Out(stream.Signature(shape)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        chain = [Signal(self.shape, name=f"value{row}", reset_less=True) for row in range(self.rows)]
        left, empty = Signal(range(self.rows + 1)), Signal(init=1)
        m.d.comb += [self.ready.eq(empty), self.o.valid.eq(~empty), self.o.payload.eq(chain[0])]
        # registers alone choose what the chain takes: it has many bits
        with m.If(Mux(empty, self.valid, self.o.ready)):
            m.d.sync += [left.eq(Mux(empty, self.rows, left - 1)), empty.eq(~empty & (left == 1))]
            m.d.sync += [value.eq(Mux(empty, new, above))
                         for value, new, above in zip(chain, self.data, [*chain[1:], chain[-1]], strict=True)]
        return m


class Gather(wiring.Component):
    """Collects a value per row, row 0 first, and offers them at once: the inverse of `Scatter`.

    They are offered in the cycle after the last was taken; the next is taken in the cycle after they left.

    Parameters
    ----------
    shape : ShapeLike
        Shape of one value.
    rows : int
        Number of values.

    Members
    -------
    i : In(stream)
        One value. Its ``ready`` is a register.
    valid : Out(1)
        `data` is complete.
    ready : In(1)
        `data` is taken in this cycle if `valid`.
    data : Out(shape).array(rows)
        Values.
    """

    def __init__(self, shape: ShapeLike, *, rows: int) -> None:
        self.shape = shape
        self.rows = rows
        super().__init__({
            "i":     In(stream.Signature(shape)),
            "valid": Out(1),
            "ready": In(1),
            "data":  Out(shape).array(rows),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        count, complete, room = Signal(range(self.rows + 1)), Signal(), Signal(init=1)
        chain = [Signal(self.shape, name=f"value{row}", reset_less=True) for row in range(self.rows)]
        m.d.comb += [
            self.valid.eq(complete),
            self.i.ready.eq(room),
        ]
        m.d.comb += [port.eq(value) for port, value in zip(self.data, chain, strict=True)]
        with m.If(self.valid & self.ready):
            m.d.sync += [count.eq(0), complete.eq(0), room.eq(1)]
        with m.Elif(self.i.valid & self.i.ready):
            m.d.sync += [count.eq(count + 1), complete.eq(count == self.rows - 1), room.eq(count != self.rows - 1)]
            m.d.sync += chain[-1].eq(self.i.payload)
            m.d.sync += [value.eq(above) for value, above in zip(chain, chain[1:], strict=False)]
        return m
