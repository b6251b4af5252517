"""Exponentials of softmax: the base-2 model, the datapath of one row, the pass over the columns."""

import numpy as np
from amaranth import Array, Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import ArrayLike, NDArray

from hw.row_layout import ROW_COMMAND, column_layout
from hw.shared import place

__all__ = ["EXP_BASE", "EXP_SLOPE", "EXP_STEPS", "SCALE_JOB", "ExpLane", "ExpPass", "exp2_mantissa", "softmax_exp"]

Int = NDArray[np.int64]

EXP_BASE = (65280, 59854, 54886, 50330, 46152, 42321, 38808, 35586)
"""A of `docs/numerics.md`: the mantissa at the start of each of eight segments."""

EXP_SLOPE = (5434, 4984, 4572, 4192, 3847, 3529, 3238, 2968)
"""B of `docs/numerics.md`: how much the mantissa falls over a segment of 32."""

EXP_STEPS = 4
"""Registered steps from a score to its probability."""

SCALE_JOB = data.StructLayout({name: ROW_COMMAND[name].shape for name in ("row_mult", "row_shift")})
"""What the row scale needs besides the sums."""

_TOKEN = data.StructLayout({"first": 1, "last": 1, **SCALE_JOB.members})

MASKED = -32768
"""Score of a masked key: probability 0 whatever the maximum."""


def exp2_mantissa(f: ArrayLike) -> Int:
    """``~ 65280 * 2^(-f/256)`` for f in 0..255; monotone, off by at most 52 (7.9e-4 of 65280)."""
    f = np.asarray(f, np.int64)
    return np.array(EXP_BASE)[f >> 5] - ((np.array(EXP_SLOPE)[f >> 5] * (f & 31)) >> 5)


def _probabilities() -> Int:
    d = np.arange((9 << 8) + 1)
    i = np.minimum(d >> 8, 9)
    return (exp2_mantissa(d & 255) + (1 << (7 + i))) >> (8 + i)


_PROBABILITY = _probabilities()  # entry d; zero from d = 9 * 256 on


def softmax_exp(d: ArrayLike, q: ArrayLike) -> Int:
    """Probability of score `q` at distance ``d = (maximum - q) mod 2^16``; 0 for a masked key (-32768).

    Within 0.64 of 255 * 2^(-d/256) for every d (0.5 of it is the rounding to an integer); monotone in d.
    """
    d = np.asarray(d, np.int64) & 0xFFFF
    return np.where(np.asarray(q) == MASKED, 0, _PROBABILITY[np.minimum(d, len(_PROBABILITY) - 1)])


class ExpLane(wiring.Component):
    """Exponentials and their sum for one row: four registered steps and an accumulator.

    Members
    -------
    load : In(1)
        Take `mx` as the row's maximum.
    mx : In(signed(16))
        Maximum.
    x : In(signed(16))
        Score.
    step : In(5)
        Enables of: distance, fall from the segment's start, mantissa, probability, sum.
    first : In(1)
        With ``step[4]``: the sum starts with this probability.
    p : Out(8)
        Probability, after ``step[3]``.
    total : Out(24)
        Sum, after ``step[4]``.
    """

    def __init__(self) -> None:
        super().__init__({
            "load":  In(1),
            "mx":    In(signed(16)),
            "x":     In(signed(16)),
            "step":  In(EXP_STEPS + 1),
            "first": In(1),
            "p":     Out(8),
            "total": Out(24),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        mx = Signal(signed(16), reset_less=True)
        distance = Signal(16, reset_less=True)
        masked = Signal(reset_less=True)
        base, low, high = (Signal(16, name=name, reset_less=True) for name in ("base", "low", "high"))
        mantissa = Signal(16, reset_less=True)
        octave, octave_late = Signal(4, reset_less=True), Signal(4, reset_less=True)
        zero, zero_late = Signal(reset_less=True), Signal(reset_less=True)
        p = Signal(8, reset_less=True)
        segment, offset = distance[5:8], distance[:5]
        scaled = Signal(16)

        with m.If(self.load):
            m.d.sync += mx.eq(self.mx)
        with m.If(self.step[0]):
            m.d.sync += [distance.eq(mx - self.x), masked.eq(self.x == MASKED)]
        with m.If(self.step[1]):
            slope = Array(EXP_SLOPE)[segment]
            # five terms: a multiplier block of the device would be spent on 5 bits
            terms = [Mux(offset[bit], slope, 0) << bit for bit in range(5)]
            m.d.sync += [
                base.eq(Array(EXP_BASE)[segment]), low.eq(terms[0] + terms[1] + terms[2]), high.eq((terms[3] + terms[4]) >> 3),
                octave.eq(distance[8:12]),
                zero.eq(masked | distance[12:].any()),
            ]
        with m.If(self.step[2]):
            m.d.sync += [mantissa.eq(base - ((low + (high << 3)) >> 5)), octave_late.eq(octave), zero_late.eq(zero)]
        m.d.comb += [scaled.eq(mantissa >> octave_late), self.p.eq(p)]
        with m.If(self.step[3]):
            m.d.sync += p.eq(Mux(zero_late, 0, scaled[8:] + scaled[7]))
        with m.If(self.step[4]):
            m.d.sync += self.total.eq(Mux(self.first, 0, self.total) + p)
        return m


class ExpPass(wiring.Component):
    """Second pass of SOFTMAX and EXP: turns the columns of a job into probabilities and sums them per row.

    One column per cycle; a column taken in cycle n is offered in cycle n + 4. Between two jobs `i` rests
    for one cycle. A finished sum that nobody takes holds everything.

    Parameters
    ----------
    rows : int
        Token rows T.

    Members
    -------
    job : In(stream)
        Row command (its ``cols``, ``first``, ``last``, ``row_mult`` and ``row_shift`` count).
    mx : In(signed(16)).array(rows)
        Maximum of each row, taken with `job`.
    i : In(stream)
        Scores, ``job.cols`` columns per job.
    o : Out(stream)
        Probabilities 0..255, as int16 columns.
    scale : Out(stream)
        ``row_mult`` and ``row_shift`` of a job with ``last``, when its sums are complete.
    total : Out(24).array(rows)
        Sums; stable while `scale` is offered.
    idle : Out(1)
        No job and no column inside.
    """

    def __init__(self, *, rows: int) -> None:
        self.rows = rows
        super().__init__({
            "job":   In(stream.Signature(ROW_COMMAND)),
            "mx":    In(signed(16)).array(rows),
            "i":     In(stream.Signature(column_layout(rows))),
            "o":     Out(stream.Signature(column_layout(rows))),
            "scale": Out(stream.Signature(SCALE_JOB)),
            "total": Out(24).array(rows),
            "idle":  Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        job = Signal(ROW_COMMAND, reset_less=True)
        left = Signal.like(job.cols)  # columns of the job still to come
        fresh = Signal()
        valid, some = Signal(EXP_STEPS), Signal()  # some : any of `valid`
        token = [Signal(_TOKEN, name=f"token{stage}", reset_less=True) for stage in range(EXP_STEPS)]
        blocked, en, take, load = Signal(), Signal(), Signal(), Signal()
        active = Signal()  # `left` is not 0
        step = Cat(take, valid & en.replicate(EXP_STEPS))

        m.d.comb += [
            blocked.eq(self.scale.valid & ~self.scale.ready),
            en.eq(~blocked & (~valid[-1] | self.o.ready)),
            self.o.valid.eq(valid[-1] & ~blocked),
            self.i.ready.eq(active & en),
            take.eq(self.i.valid & active & en),
            self.job.ready.eq(~active),
            load.eq(self.job.valid & ~active),
            self.idle.eq(~active & ~some),
        ]
        with m.If(load):
            offer = self.job.payload
            m.d.sync += [job.eq(offer), left.eq(offer.cols), fresh.eq(offer.first), active.eq(1)]
        with m.Elif(take):
            m.d.sync += [left.eq(left - 1), fresh.eq(0), active.eq(left != 1)]
        with m.If(en):
            m.d.sync += [valid.eq(Cat(take, valid[:-1])), some.eq(take | valid[:-1].any())]
        with m.If(take):
            m.d.sync += [token[0][name].eq(job[name]) for name in ("row_mult", "row_shift")]
            m.d.sync += [token[0].first.eq(fresh), token[0].last.eq(job.last & (left == 1))]
        for stage in range(1, EXP_STEPS):
            with m.If(step[stage]):
                m.d.sync += token[stage].eq(token[stage - 1])
        end = step[EXP_STEPS]
        with m.If(end):
            m.d.sync += [self.scale.payload[name].eq(token[-1][name]) for name in ("row_mult", "row_shift")]
        with m.If(end & token[-1].last):
            m.d.sync += self.scale.valid.eq(1)
        with m.Elif(self.scale.ready):
            m.d.sync += self.scale.valid.eq(0)
        self._add_lanes(m, platform, load=load, step=step, first=token[-1].first)
        return m

    def _add_lanes(self, m: Module, platform: object, *, load: Value, step: Value, first: Value) -> None:
        for row in range(self.rows):
            lane = ExpLane()
            place(m, platform, f"lane{row}", lane, module="exp_lane")
            m.d.comb += [
                lane.load.eq(load),
                lane.mx.eq(self.mx[row]),
                lane.x.eq(self.i.payload[row]),
                lane.step.eq(step),
                lane.first.eq(first),
                self.o.payload[row].eq(lane.p),
                self.total[row].eq(lane.total),
            ]
