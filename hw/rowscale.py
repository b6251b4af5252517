"""Row scale of softmax: the reciprocal of a row's sum as a multiplier and a shift, a row per cycle."""

import numpy as np
from amaranth import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import ArrayLike, NDArray

from hw.exp2 import SCALE_JOB
from hw.pipeline import Pipeline
from hw.row_layout import row_scale_layout
from hw.scatter import Gather, Scatter

__all__ = ["SCALE_LATENCY", "RowScale", "SoftmaxScale", "bit_length", "recip16", "row_scale_softmax"]

Int = NDArray[np.int64]

SCALE_LATENCY = 20
"""Cycles from a sum to its row scale, of which 16 divide, a bit each."""

_TOTAL_BITS = 24
_SUM = data.StructLayout({"total": _TOTAL_BITS, "row_mult": 16, "row_shift": 6})
_SCALE = data.StructLayout({"mult": unsigned(16), "shift": unsigned(6)})


def bit_length(value: ArrayLike) -> Int:
    """Number of bits of a non-negative integer below 2^63, element by element (0 for 0)."""
    v = np.asarray(value, np.int64)
    high = v >> 32
    # frexp is exact on 32-bit values
    return np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(v & 0xFFFFFFFF)[1]).astype(np.int64)


def recip16(mantissa: ArrayLike) -> Int:
    """``min(2^31 // mantissa, 65535)`` for a mantissa in [2^15, 2^16)."""
    return np.minimum((1 << 31) // np.asarray(mantissa, np.int64), 65535)


def row_scale_softmax(total: ArrayLike, row_mult: int, row_shift: int) -> tuple[Int, Int]:
    """Multiplier and shift of rows with these sums: ``m * 2^-s ~ row_mult * 2^-row_shift / total``.

    ``m`` is truncated twice, off by less than 2^-13 relative for row_mult in [2^14, 2^15). A sum of 0
    (every key masked) gives (0, 1).
    """
    total = np.asarray(total, np.int64)
    e = np.maximum(bit_length(total) - 1, 0)
    mantissa = np.where(total > 0, (total << 16) >> (e + 1), 1 << 15)
    m = (recip16(mantissa) * row_mult) >> 16
    return np.where(total > 0, m, 0), np.where(total > 0, np.minimum(row_shift + e, 63), 1)


class SoftmaxScale(wiring.Component):
    """Row scale of one sum per cycle: normalise, divide 2^31 by the mantissa, multiply with ``row_mult``.

    Latency `SCALE_LATENCY` cycles, of which 16 are a restoring divider.

    Members
    -------
    i : In(stream)
        Sum ``total``, ``row_mult``, ``row_shift``.
    o : Out(stream)
        ``mult``, ``shift``.
    """

    def __init__(self) -> None:
        super().__init__({
            "i": In(stream.Signature(_SUM)),
            "o": Out(stream.Signature(_SCALE)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        pipe = Pipeline(m, self.i, self.o)
        total = self.i.payload.total
        value, coarse = _normalise(total, (16, 8))
        x = pipe.stage(value=value, coarse=coarse, zero=total == 0, mult=self.i.payload.row_mult, shift=self.i.payload.row_shift)
        value, fine = _normalise(x.value, (4, 2, 1))
        x = pipe.stage(mantissa=value[_TOTAL_BITS - 16:], zeros=Cat(fine, x.coarse), zero=x.zero, mult=x.mult, shift=x.shift)
        shift = x.shift + (_TOTAL_BITS - 1 - x.zeros)[:5]
        x = pipe.stage(
            mantissa=x.mantissa,
            mult=Mux(x.zero, 0, x.mult),
            shift=Mux(x.zero, 1, Mux(shift > 63, 63, shift))[:6],
        )
        rest, quotient = Const(1 << 15, 16), Const(0, 0)
        for _ in range(16):
            # a mantissa of 2^15 gives 16 ones: the clip to 65535 comes for free
            twice = Cat(Const(0, 1), rest)
            less = twice - x.mantissa
            fits = ~less[17]
            rest, quotient = Mux(fits, less, twice)[:16], Cat(fits, quotient)
            x = pipe.stage(rest=rest, quotient=quotient, mantissa=x.mantissa, mult=x.mult, shift=x.shift)
            rest, quotient = x.rest, x.quotient
        x = pipe.stage(product=quotient * x.mult, shift=x.shift)
        m.d.comb += [self.o.payload.mult.eq(x.product >> 16), self.o.payload.shift.eq(x.shift)]
        pipe.finish(SCALE_LATENCY)
        return m


def _normalise(value: Value, steps: tuple[int, ...]) -> tuple[Value, Value]:
    """Shift left by each of `steps` where nothing is lost; and by which."""
    taken: list[Value] = []
    for step in steps:
        empty = value[_TOTAL_BITS - step:] == 0
        value = Mux(empty, Cat(Const(0, step), value), value)[:_TOTAL_BITS]
        taken.insert(0, empty)
    return value, Cat(*taken)


class RowScale(wiring.Component):
    """Row scales of T sums: `Scatter`, `SoftmaxScale`, `Gather`.

    The scales are offered T + 21 cycles after the sums were taken; new sums are taken every T + 1 cycles.
    Up to two sets are inside.

    Parameters
    ----------
    rows : int
        Token rows T.

    Members
    -------
    i : In(stream)
        ``row_mult``, ``row_shift``. Its ``ready`` is a register.
    total : In(24).array(rows)
        Sums, taken with `i`.
    o : Out(stream)
        Multiplier and shift of each row.
    busy : Out(1)
        Something is inside.
    """

    def __init__(self, *, rows: int) -> None:
        self.rows = rows
        super().__init__({
            "i":     In(stream.Signature(SCALE_JOB)),
            "total": In(_TOTAL_BITS).array(rows),
            "o":     Out(stream.Signature(row_scale_layout(rows))),
            "busy":  Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.scatter = scatter = Scatter(unsigned(_TOTAL_BITS), rows=self.rows)
        m.submodules.scale = scale = SoftmaxScale()
        m.submodules.gather = gather = Gather(_SCALE, rows=self.rows)
        job = Signal(SCALE_JOB, reset_less=True)
        inside = Signal(2)  # sets taken and not yet left
        enter, leave = Signal(), Signal()
        m.d.comb += [
            scatter.valid.eq(self.i.valid),
            self.i.ready.eq(scatter.ready),
            scale.i.payload.total.eq(scatter.o.payload),
            scale.i.payload.row_mult.eq(job.row_mult),
            scale.i.payload.row_shift.eq(job.row_shift),
            scale.i.valid.eq(scatter.o.valid),
            scatter.o.ready.eq(scale.i.ready),
            self.o.valid.eq(gather.valid),
            gather.ready.eq(self.o.ready),
            enter.eq(self.i.valid & self.i.ready),
            leave.eq(self.o.valid & self.o.ready),
            self.busy.eq(inside != 0),
        ]
        wiring.connect(m, scale.o, gather.i)
        m.d.sync += inside.eq(inside + enter - leave)
        with m.If(enter):
            m.d.sync += job.eq(self.i.payload)
        for row in range(self.rows):
            m.d.comb += [
                scatter.data[row].eq(self.total[row]),
                self.o.payload.mult[row].eq(gather.data[row].mult),
                self.o.payload.shift[row].eq(gather.data[row].shift),
            ]
        return m
