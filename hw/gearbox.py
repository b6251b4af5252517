"""Width converters of streams, without bubbles: `Narrower` takes words apart, `Widener` puts them
together. Either may move words in pairs: an int16 column is a pair of words, an int8 column is one."""

from collections.abc import Iterable
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Narrower", "Widener", "pair_layout"]


def pair_layout(size: int) -> data.StructLayout:
    """Two words of `size` bytes, both of which count if `wide`; else the first, in the lower half."""
    return data.StructLayout({"data": 16 * size, "wide": 1})


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

    One narrow word or pair a cycle, no bubble between wide words; latency 0 (``o`` is a multiplexer of ``i``).

    Parameters
    ----------
    in_bytes : int
        Bytes of a wide word.
    out_bytes : int
        Bytes of a narrow word, at most half of ``in_bytes``.
    pairs : bool
        Narrow words may leave two at a time.

    Members
    -------
    i : ``In(stream {data, first, last})``
        Wide words; ``first <= last``. With ``pairs`` also ``wide``: in pairs, ``first`` is even and ``last`` odd.
    o : ``Out(stream)``
        Narrow words; with ``pairs`` ``{data, wide}``, where a word that is not ``wide`` is the lower half of ``data``.
    """

    def __init__(self, *, in_bytes: int, out_bytes: int, pairs: bool = False) -> None:
        self.ratio = _ratio(("out_bytes", out_bytes), ("in_bytes", in_bytes))
        self.in_bytes = in_bytes
        self.out_bytes = out_bytes
        self.pairs = pairs
        slot = range(self.ratio)
        word = {"data": 8 * in_bytes, "first": slot, "last": slot, **({"wide": 1} if pairs else {})}
        super().__init__({
            "i": In(stream.Signature(data.StructLayout(word))),
            "o": Out(stream.Signature(pair_layout(out_bytes) if pairs else unsigned(8 * out_bytes))),
        })

    def compute(self, words: Iterable[tuple[int, ...]]) -> list[int]:
        """Narrow words of the wide words ``(data, first, last)`` or ``(data, first, last, wide)``."""
        bits, sent = 8 * self.out_bytes, []
        for value, first, last, *wide in words:
            count = 2 if any(wide) else 1
            sent += [(value >> (slot * bits)) & ((1 << count * bits) - 1) for slot in range(first, last + 1, count)]
        return sent

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        inside = Signal()  # slots of the wide word were sent already, `slot` is the next
        slot = Signal(range(self.ratio))
        current = Signal(range(self.ratio))
        final = Signal()
        bits = 8 * self.out_bytes
        wide = self.i.payload.wide if self.pairs else Const(0, 1)
        m.d.comb += [
            current.eq(Mux(inside, slot, self.i.payload.first)),
            final.eq((current | wide) == self.i.payload.last),
            self.o.valid.eq(self.i.valid),
            self.i.ready.eq(self.o.ready & final),
        ]
        word, words = Signal(bits), self.i.payload.data
        with m.Switch(current):
            for k in range(self.ratio):
                with m.Case(k):
                    m.d.comb += word.eq(words[k * bits:(k + 1) * bits])
        if self.pairs:
            # the upper half does not depend on `wide`: it is the odd word of the pair in any case
            upper = Cat(words[k * bits:(k + 1) * bits] for k in range(1, self.ratio, 2)).word_select(current[1:], bits)
            m.d.comb += [self.o.payload.data.eq(Cat(word, upper)), self.o.payload.wide.eq(wide)]
        else:
            m.d.comb += self.o.payload.eq(word)
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += [
                inside.eq(~final),
                slot.eq((current | wide) + 1),
            ]
        return m


class Widener(wiring.Component):
    """Gather narrow words, each in its slot, into a wide word, until ``last`` or the top slot arrives.

    One narrow word or pair a cycle, no bubble between wide words; latency 1 (``o`` is a register).

    Parameters
    ----------
    in_bytes : int
        Bytes of a narrow word, at most half of ``out_bytes``.
    out_bytes : int
        Bytes of a wide word.
    pairs : bool
        Narrow words may come two at a time.

    Members
    -------
    i : ``In(stream {data, slot, last})``
        Narrow words; slots rise within a wide word. With ``pairs`` ``data`` has the bytes of two, and ``wide`` says that both
        count: the second fills the slot after ``slot``, which is even.
    o : ``Out(stream {data, mask})``
        Wide words; bit k of ``mask`` says that slot k was filled. Other slots hold old data.
    """

    def __init__(self, *, in_bytes: int, out_bytes: int, pairs: bool = False) -> None:
        self.ratio = _ratio(("in_bytes", in_bytes), ("out_bytes", out_bytes))
        self.in_bytes = in_bytes
        self.out_bytes = out_bytes
        self.pairs = pairs
        word = {**pair_layout(in_bytes).members} if pairs else {"data": 8 * in_bytes}
        super().__init__({
            "i": In(stream.Signature(data.StructLayout({**word, "slot": range(self.ratio), "last": 1}))),
            "o": Out(stream.Signature(data.StructLayout({"data": 8 * out_bytes, "mask": self.ratio}))),
        })

    def compute(self, words: Iterable[tuple[int, ...]]) -> list[tuple[int, int]]:
        """Wide words ``(data, mask)``, empty slots zero, of the narrow words ``(data, slot, last)`` or ``(data, slot, last,
        wide)``."""
        bits, sent, value, mask = 8 * self.in_bytes, [], 0, 0
        for word, slot, last, *wide in words:
            count = 2 if any(wide) else 1
            value |= (word & ((1 << count * bits) - 1)) << (bits * slot)
            mask |= ((1 << count) - 1) << slot
            if last or slot + count == self.ratio:
                sent.append((value, mask))
                value, mask = 0, 0
        return sent

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        words = [Signal(8 * self.in_bytes, name=f"word_{k}", reset_less=True) for k in range(self.ratio)]
        mask = Signal(self.ratio)
        full = Signal()
        filled = Signal(self.ratio)
        payload, bits = self.i.payload, 8 * self.in_bytes
        slots = Cat(payload.slot == k for k in range(self.ratio))
        wide = payload.wide if self.pairs else Const(0, 1)
        m.d.comb += [
            filled.eq(Cat(slots[k] | (wide & slots[k - 1]) if k % 2 else slots[k] for k in range(self.ratio))),
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
                full.eq(payload.last | filled[-1]),
                mask.eq(Mux(full, 0, mask) | filled),
            ]
            for k, word in enumerate(words):
                second = wide if k % 2 else 0
                with m.If(filled[k]):
                    m.d.sync += word.eq(Mux(second, payload.data[bits:], payload.data[:bits]))
        return m
