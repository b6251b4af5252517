"""Width converters of streams, without bubbles: `Narrower` takes words apart, `Widener` puts them
together."""

from collections.abc import Iterable
from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Narrower", "Widener"]


def _ratio(narrow: tuple[str, int], wide: tuple[str, int]) -> int:
    for name, value in (narrow, wide):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value <= 0 or value & (value - 1):
            raise ValueError(f"{name} must be a positive power of two, not {value!r}")
    if wide[1] < 2 * narrow[1]:
        raise ValueError(f"{wide[0]} must be at least twice {narrow[0]} ({narrow[1]}), not {wide[1]!r}")
    return wide[1] // narrow[1]


class Narrower(wiring.Component):
    """Send slots ``first`` to ``last`` of each wide word as narrow words, lowest first.

    One narrow word a cycle, no bubble between wide words; latency 0 (``o`` is a multiplexer of ``i``).

    Parameters
    ----------
    in_bytes : int
        Bytes of a wide word.
    out_bytes : int
        Bytes of a narrow word, at most half of ``in_bytes``.

    Members
    -------
    i : ``In(stream {data, first, last})``
        Wide words; ``first <= last``.
    o : ``Out(stream)``
        Narrow words.
    """

    def __init__(self, *, in_bytes: int, out_bytes: int) -> None:
        self.ratio = _ratio(("out_bytes", out_bytes), ("in_bytes", in_bytes))
        self.in_bytes = in_bytes
        self.out_bytes = out_bytes
        slot = range(self.ratio)
        super().__init__({
            "i": In(stream.Signature(data.StructLayout({"data": 8 * in_bytes, "first": slot, "last": slot}))),
            "o": Out(stream.Signature(unsigned(8 * out_bytes))),
        })

    def compute(self, words: Iterable[tuple[int, int, int]]) -> list[int]:
        """Narrow words of the wide words ``(data, first, last)``."""
        bits = 8 * self.out_bytes
        return [(value >> (slot * bits)) & ((1 << bits) - 1)
                for value, first, last in words for slot in range(first, last + 1)]

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        inside = Signal()  # slots of the wide word were sent already, `slot` is the next
        slot = Signal(range(self.ratio))
        current = Signal(range(self.ratio))
        final = Signal()
        bits = 8 * self.out_bytes
        m.d.comb += [
            current.eq(Mux(inside, slot, self.i.payload.first)),
            final.eq(current == self.i.payload.last),
            self.o.valid.eq(self.i.valid),
            self.i.ready.eq(self.o.ready & final),
        ]
        with m.Switch(current):
            for k in range(self.ratio):
                with m.Case(k):
                    m.d.comb += self.o.payload.eq(self.i.payload.data[k * bits:(k + 1) * bits])
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += [
                inside.eq(~final),
                slot.eq(current + 1),
            ]
        return m


class Widener(wiring.Component):
    """Gather narrow words, each in its slot, into a wide word, until ``last`` or the top slot arrives.

    One narrow word a cycle, no bubble between wide words; latency 1 (``o`` is a register).

    Parameters
    ----------
    in_bytes : int
        Bytes of a narrow word, at most half of ``out_bytes``.
    out_bytes : int
        Bytes of a wide word.

    Members
    -------
    i : ``In(stream {data, slot, last})``
        Narrow words; slots rise within a wide word.
    o : ``Out(stream {data, mask})``
        Wide words; bit k of ``mask`` says that slot k was filled. Other slots hold old data.
    """

    def __init__(self, *, in_bytes: int, out_bytes: int) -> None:
        self.ratio = _ratio(("in_bytes", in_bytes), ("out_bytes", out_bytes))
        self.in_bytes = in_bytes
        self.out_bytes = out_bytes
        super().__init__({
            "i": In(stream.Signature(data.StructLayout(
                {"data": 8 * in_bytes, "slot": range(self.ratio), "last": 1}))),
            "o": Out(stream.Signature(data.StructLayout({"data": 8 * out_bytes, "mask": self.ratio}))),
        })

    def compute(self, words: Iterable[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """Wide words ``(data, mask)``, empty slots zero, of the narrow words ``(data, slot, last)``."""
        wide, value, mask = [], 0, 0
        for word, slot, last in words:
            value |= word << (8 * self.in_bytes * slot)
            mask |= 1 << slot
            if last or slot == self.ratio - 1:
                wide.append((value, mask))
                value, mask = 0, 0
        return wide

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        words = [Signal(8 * self.in_bytes, name=f"word_{k}", reset_less=True) for k in range(self.ratio)]
        mask = Signal(self.ratio)
        full = Signal()
        one_hot = Signal(self.ratio)
        m.d.comb += [
            one_hot.eq(1 << self.i.payload.slot),
            self.i.ready.eq(~full | self.o.ready),
            self.o.valid.eq(full),
            self.o.payload.data.eq(Cat(words)),
            self.o.payload.mask.eq(mask),
        ]
        with m.If(self.o.ready):
            m.d.sync += full.eq(0)
        with m.If(full & self.o.ready):
            m.d.sync += mask.eq(0)
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [
                full.eq(self.i.payload.last | one_hot[-1]),
                mask.eq(Mux(full, 0, mask) | one_hot),
            ]
            for k, word in enumerate(words):
                with m.If(one_hot[k]):
                    m.d.sync += word.eq(self.i.payload.data)
        return m
