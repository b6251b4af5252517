"""LayerNorm and RMSNorm: model, constants, moments of a row, the row scale, and the pass over the columns."""

from math import sqrt

import numpy as np
from amaranth import Array, Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import ArrayLike, NDArray

from hw.arch import Arch
from hw.arithmetic import fold, kept, parts, rounded
from hw.isa import RowOp
from hw.numerics import round_shift, saturate
from hw.pipeline import Pipeline
from hw.row_layout import NORM_PARAM, ROW_COMMAND, column_layout
from hw.rowscale import bit_length
from hw.scatter import Gather, Scatter
from hw.shared import place

__all__ = [
    "NORM_ROW_STEPS",
    "NORM_STEPS",
    "ROOT_LATENCY",
    "RSQRT_TABLE",
    "VARIANCE_LATENCY",
    "InverseRoot",
    "NormLane",
    "NormPass",
    "NormScale",
    "Variance",
    "layernorm_rows",
    "moments_layout",
    "norm_constants",
    "norm_row_scale",
    "rsqrt16",
]

Int = NDArray[np.int64]

RSQRT_TABLE = tuple(round(2**19 / (sqrt(v) + sqrt(v + 255))) for v in range(1 << 14, 1 << 16, 256))
"""``2^18 / sqrt(v)``, 11 bits, indexed with ``(v >> 8) - 64``; error balanced over the 256 v of an entry."""

VARIANCE_LATENCY = 8
"""Cycles from a row's moments to its normalised variance."""

ROOT_LATENCY = 10
"""Cycles from a variance to the row scale."""

NORM_STEPS = 9
"""Registered steps of the normalisation of a column."""

NORM_ROW_STEPS = 3
"""Steps after the first that still use the values of the column's rows."""

_NEWTON = (3 << 36) + (1 << 20)  # 2^20: centres the error of the Newton step, which is never positive
_MEAN_BITS = 23
_MIN_VARIANCE = 1 << 14
_NORM_ROW = data.StructLayout({"mean": signed(_MEAN_BITS), "mult": unsigned(16), "shift": unsigned(6)})
_ROOT = data.StructLayout({"mean": signed(_MEAN_BITS), "halvings": unsigned(5), "v": unsigned(16)})


def rsqrt16(v: ArrayLike) -> Int:
    """``~ 2^23 / sqrt(v)`` for v in [2^14, 2^16), in [2^15, 2^16): relative error below 2.3e-5.

    One Newton step from the 11-bit t of `RSQRT_TABLE`: ``u = (3*2^36 + 2^20 - v*t*t) >> 17``,
    ``min((t*u + 2^14) >> 15, 65535)``.
    """
    v = np.asarray(v, np.int64)
    t = np.array(RSQRT_TABLE)[(v >> 8) - 64]
    u = (_NEWTON - v * t * t) >> 17
    return np.minimum((t * u + (1 << 14)) >> 15, 65535)


def _scaled(numerator: float, bits: int) -> tuple[int, int]:
    """Integer of exactly `bits` bits and shift with ``integer * 2^-shift ~ numerator``."""
    shift = 0
    while round(numerator * 2**shift) < 1 << (bits - 1):
        shift += 1
    return min(round(numerator * 2**shift), (1 << bits) - 1), shift


def norm_constants(cols: int) -> tuple[int, int, int, int]:
    """``ln_inv, ln_shift, row_mult, row_shift`` of a LAYERNORM or RMSNORM over `cols` columns.

    ``ln_inv * 2^-ln_shift ~ 64 / cols`` and ``row_mult * 2^-row_shift ~ cols / 8``, both multipliers in
    [2^15, 2^16): relative error at most 1.6e-5.

    Raises
    ------
    TypeError
        `cols` is not an int.
    ValueError
        `cols` is outside 1..65535.
    """
    if not isinstance(cols, int) or isinstance(cols, bool):
        raise TypeError(f"cols must be an int, not {cols!r}")
    if not 1 <= cols <= 65535:
        raise ValueError(f"cols must be in 1..65535, not {cols!r}")
    return (*_scaled(64 / cols, 16), *_scaled(cols / 8, 16))


def norm_row_scale(
    total: ArrayLike,
    squares: ArrayLike,
    cols: int,
    *,
    ln_inv: int,
    ln_shift: int,
    eps: int,
    row_mult: int,
    row_shift: int,
    rms: bool = False,
) -> tuple[Int, Int, Int]:
    """Mean (units of 2^-6), multiplier and shift of rows with these sums over `cols` values."""
    total, variance = np.asarray(total, np.int64), cols * np.asarray(squares, np.int64)
    if rms:
        mean = np.zeros_like(total)
    else:
        mean = saturate(round_shift(total * ln_inv, ln_shift), _MEAN_BITS)
        variance = variance - total * total
    variance = np.maximum(variance + eps, _MIN_VARIANCE)
    halvings = np.maximum(bit_length(variance) - 15, 0) >> 1
    m = (rsqrt16(variance >> (2 * halvings)) * row_mult) >> 16
    return mean, m, np.minimum(row_shift + halvings, 63)


def layernorm_rows(
    x: ArrayLike,
    gamma: ArrayLike,
    beta: ArrayLike,
    shift: ArrayLike,
    *,
    ln_inv: int,
    ln_shift: int,
    eps: int,
    row_mult: int,
    row_shift: int,
    rms: bool = False,
) -> Int:
    """LayerNorm (or RMSNorm) over the last axis of `x` ``(..., cols)``, int16 in, int16 out.

    `gamma`, `beta`, `shift` ``(cols,)`` are the column parameters; the others are fields of the instruction.
    """
    x = np.asarray(x, np.int64)
    total, squares = x.sum(-1, keepdims=True), (x * x).sum(-1, keepdims=True)
    mean, m, s = norm_row_scale(
        total, squares, x.shape[-1],
        ln_inv=ln_inv, ln_shift=ln_shift, eps=eps, row_mult=row_mult, row_shift=row_shift, rms=rms,
    )
    z = saturate(round_shift(((x << 6) - mean) * m, s), 16)
    return saturate(round_shift(z * np.asarray(gamma, np.int64) + np.asarray(beta, np.int64), shift), 16)


def moments_layout(arch: Arch) -> data.StructLayout:
    """Sum and sum of squares of up to ``arch.row_depth`` int16 values."""
    bits = arch.row_depth.bit_length() - 1
    return data.StructLayout({"total": signed(16 + bits), "squares": unsigned(31 + bits)})


class Variance(wiring.Component):
    """Mean and normalised variance of one row per cycle, from its moments. Latency `VARIANCE_LATENCY`.

    Parameters
    ----------
    arch : Arch
        Architecture; only ``row_depth`` counts.

    Members
    -------
    job : In
        Row command; must not change while a row is inside.
    i : In(stream)
        ``total``, ``squares``.
    o : Out(stream)
        ``mean`` (units of 2^-6), ``v`` in [2^14, 2^16) and ``halvings`` with variance ~ v * 4^halvings.
    """

    def __init__(self, arch: Arch) -> None:
        self.bits = 2 * arch.row_depth.bit_length() + 29  # of cols * squares + ln_eps
        self._multiplier = arch.multiplier_bits
        super().__init__({
            "job": In(ROW_COMMAND),
            "i":   In(stream.Signature(moments_layout(arch))),
            "o":   Out(stream.Signature(_ROOT)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        pipe = Pipeline(m, self.i, self.o)
        total, squares, job = self.i.payload.total, self.i.payload.squares, self.job
        layer = job.op == RowOp.LAYERNORM
        x = pipe.stage(**{name: parts(a, b, bits=self._multiplier) for name, a, b in (
            ("scaled", total, job.ln_inv), ("power", squares, job.cols), ("square", total, total))})
        for _ in range(2):
            x = pipe.stage(scaled=fold(x.scaled), power=fold(x.power), square=fold(x.square))
        (scaled, _), (power, _), (square, _) = x.scaled[0], x.power[0], x.square[0]
        x = pipe.stage(mean=scaled >> (job.ln_shift - 1)[:6], variance=(power - Mux(layer, square, 0))[:self.bits])
        x = pipe.stage(mean=Mux(layer, rounded(x.mean, _MEAN_BITS), 0), variance=(x.variance + job.ln_eps)[:self.bits])
        v, high = _halve(x.variance, (16, 8))
        x = pipe.stage(mean=x.mean, v=v, halvings=high)
        v, middle = _halve(x.v, (4, 2))
        x = pipe.stage(mean=x.mean, v=v, halvings=Cat(middle, x.halvings))
        v, low = _halve(x.v, (1,))
        v = Mux(v < _MIN_VARIANCE, _MIN_VARIANCE, v)[:16]
        x = pipe.stage(mean=x.mean, v=v, halvings=Cat(low, x.halvings))
        m.d.comb += [
            self.o.payload.mean.eq(x.mean),
            self.o.payload.v.eq(x.v),
            self.o.payload.halvings.eq(x.halvings),
        ]
        pipe.finish(VARIANCE_LATENCY)
        return m


def _halve(v: Value, counts: tuple[int, ...]) -> tuple[Value, Value]:
    """Shift right by two as often as 2^14 is still reached, in steps of `counts`; and how often."""
    taken: list[Value] = []
    for count in counts:
        fits = (v >> (2 * count + 14)).any()
        v = Mux(fits, v >> (2 * count), v)
        taken.insert(0, fits)
    return v, Cat(*taken)


class InverseRoot(wiring.Component):
    """Multiplier and shift of one row per cycle, from its normalised variance. Latency `ROOT_LATENCY`.

    Members
    -------
    job : In
        Row command; must not change while a row is inside.
    i : In(stream)
        What `Variance` sends.
    o : Out(stream)
        ``mean``, ``mult`` and ``shift``, the latter one less than s_t.
    """

    def __init__(self, arch: Arch) -> None:
        self._multiplier = arch.multiplier_bits
        super().__init__({
            "job": In(ROW_COMMAND),
            "i":   In(stream.Signature(_ROOT)),
            "o":   Out(stream.Signature(_NORM_ROW)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        pipe = Pipeline(m, self.i, self.o)
        v = self.i.payload.v
        shift = self.job.row_shift + self.i.payload.halvings
        entries = Array(RSQRT_TABLE)
        x = pipe.stage(
            mean=self.i.payload.mean,
            shift=(Mux(shift > 63, 63, shift) - 1)[:6],
            v=v,
            t=entries[((v >> 8) - 64)[:8]],
        )
        x = pipe.stage(mean=x.mean, shift=x.shift, v=x.v, t=x.t)  # the table may be a block RAM
        x = pipe.stage(mean=x.mean, shift=x.shift, v=x.v, t=x.t, square=x.t * x.t)
        x = pipe.stage(mean=x.mean, shift=x.shift, t=x.t, ratio=parts(x.square, x.v, bits=self._multiplier))
        x = pipe.stage(mean=x.mean, shift=x.shift, t=x.t, ratio=fold(x.ratio)[0][0])
        x = pipe.stage(mean=x.mean, shift=x.shift, t=x.t, u=((_NEWTON - x.ratio) >> 17)[:21])
        x = pipe.stage(mean=x.mean, shift=x.shift, root=parts(x.u, x.t, bits=self._multiplier))
        x = pipe.stage(mean=x.mean, shift=x.shift, root=fold(x.root)[0][0])
        root = (x.root + (1 << 14)) >> 15
        x = pipe.stage(mean=x.mean, shift=x.shift, root=Mux(root > 65535, 65535, root)[:16])
        x = pipe.stage(mean=x.mean, shift=x.shift, product=x.root * self.job.row_mult)
        m.d.comb += [
            self.o.payload.mean.eq(x.mean),
            self.o.payload.mult.eq(x.product >> 16),
            self.o.payload.shift.eq(x.shift),
        ]
        pipe.finish(ROOT_LATENCY)
        return m


class NormScale(wiring.Component):
    """Mean, multiplier and shift of T rows from their moments: one job at a time, a row per cycle.

    They are offered T + 19 cycles after the moments were taken.

    Parameters
    ----------
    arch : Arch
        Architecture: ``rows`` and ``row_depth`` count.

    Members
    -------
    i : In(stream)
        Row command.
    moments : In(moments_layout(arch)).array(rows)
        Moments, taken with `i`.
    o : Out(stream)
        The row command again, when `row` is complete.
    row : Out(struct).array(rows)
        ``mean``, ``mult`` and ``shift`` (less one) of each row; stable while `o` is offered.
    busy : Out(1)
        A job is inside.
    """

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        super().__init__({
            "i":       In(stream.Signature(ROW_COMMAND)),
            "moments": In(moments_layout(arch)).array(arch.rows),
            "o":       Out(stream.Signature(ROW_COMMAND)),
            "row":     Out(_NORM_ROW).array(arch.rows),
            "busy":    Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = self.arch.rows
        m.submodules.scatter = scatter = Scatter(moments_layout(self.arch), rows=rows)
        m.submodules.variance = variance = Variance(self.arch)
        m.submodules.root = root = InverseRoot(self.arch)
        m.submodules.gather = gather = Gather(_NORM_ROW, rows=rows)
        wiring.connect(m, scatter.o, variance.i)
        wiring.connect(m, variance.o, root.i)
        wiring.connect(m, root.o, gather.i)
        job = self.o.payload
        m.d.comb += [
            self.i.ready.eq(~self.busy),
            scatter.valid.eq(self.i.valid & ~self.busy),
            variance.job.eq(job),
            root.job.eq(job),
            self.o.valid.eq(gather.valid),
            gather.ready.eq(self.o.ready),
        ]
        m.d.comb += [scatter.data[row].eq(self.moments[row]) for row in range(rows)]
        m.d.comb += [self.row[row].eq(gather.data[row]) for row in range(rows)]
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [job.eq(self.i.payload), self.busy.eq(1)]
        with m.Elif(self.o.valid & self.o.ready):
            m.d.sync += self.busy.eq(0)
        return m


class NormLane(wiring.Component):
    """Normalisation of one row in registered steps, with a multiplier in the second and the sixth.

    Members
    -------
    load : In(1)
        Take `row`.
    row : In(struct)
        Mean, multiplier and shift (less one).
    x : In(signed(16))
        Value.
    step : In(9)
        Enables of: difference, parts of the product, product, shift, z, gamma, beta, shift, y.
    gamma, beta, shift : In
        Column parameters at steps 5, 6 and 7; `shift` is less one.
    y : Out(signed(16))
        Result, after ``step[8]``.
    """

    def __init__(self, arch: Arch) -> None:
        self._multiplier = arch.multiplier_bits
        super().__init__({
            "load":  In(1),
            "row":   In(_NORM_ROW),
            "x":     In(signed(16)),
            "step":  In(NORM_STEPS),
            "gamma": In(signed(16)),
            "beta":  In(signed(32)),
            "shift": In(6),
            "y":     Out(signed(16)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        row = Signal(_NORM_ROW, reset_less=True)
        difference = Signal(signed(_MEAN_BITS + 1), reset_less=True)
        product = Signal(signed(_MEAN_BITS + 17), reset_less=True)
        shifted = Signal.like(product)
        z = Signal(signed(16), reset_less=True)
        scaled = Signal(signed(32), reset_less=True)
        biased = Signal(signed(33), reset_less=True)
        result = Signal.like(biased)
        y = Signal.like(z)
        terms = parts(difference, row.mult, bits=self._multiplier)
        pieces = kept(terms, "piece")
        m.d.comb += self.y.eq(y)
        with m.If(self.load):
            m.d.sync += row.eq(self.row)
        actions = (
            difference.eq((self.x << 6) - row.mean),
            [register.eq(term) for (register, _), (term, _) in zip(pieces, terms, strict=True)],
            product.eq(fold(pieces)[0][0]),
            shifted.eq(product >> row.shift),
            z.eq(rounded(shifted, 16)),
            scaled.eq(z * self.gamma),
            biased.eq(scaled + self.beta),
            result.eq(biased >> self.shift),
            y.eq(rounded(result, 16)),
        )
        for stage, action in enumerate(actions):
            with m.If(self.step[stage]):
                m.d.sync += action
        return m


class NormPass(wiring.Component):
    """Second pass of LAYERNORM and RMSNORM: normalises the columns of a job.

    One column per cycle; a column taken in cycle n is offered in cycle n + 9. Between two jobs `i` rests
    for four cycles.

    Parameters
    ----------
    arch : Arch
        Architecture: ``rows`` and ``multiplier_bits`` count.

    Members
    -------
    job : In(stream)
        Row command; only its ``cols`` count.
    row : In(struct).array(rows)
        What `NormScale` made, taken with `job`.
    i : In(stream)
        Columns, ``job.cols`` per job.
    params : In(stream)
        Beta, gamma, shift (1..63) of each column; taken together with the column.
    o : Out(stream)
        Normalised columns.
    idle : Out(1)
        No job and no column inside.
    """

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.rows = rows = arch.rows
        super().__init__({
            "job":    In(stream.Signature(ROW_COMMAND)),
            "row":    In(_NORM_ROW).array(rows),
            "i":      In(stream.Signature(column_layout(rows))),
            "params": In(stream.Signature(NORM_PARAM)),
            "o":      Out(stream.Signature(column_layout(rows))),
            "idle":   Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        left = Signal.like(self.job.payload.cols)  # columns of the job still to come
        valid, some = Signal(NORM_STEPS), Signal()  # some : any of `valid`
        active, en, take, load = Signal(), Signal(), Signal(), Signal()  # active : `left` is not 0
        step = Cat(take, valid[:-1] & en.replicate(NORM_STEPS - 1))
        param = self.params.payload
        m.d.comb += [
            en.eq(~self.o.valid | self.o.ready),
            take.eq(self.i.valid & self.params.valid & active & en),
            self.i.ready.eq(self.params.valid & active & en),
            self.params.ready.eq(self.i.valid & active & en),
            # the first steps still use the values of the last job's rows
            self.job.ready.eq(~active & ~valid[:NORM_ROW_STEPS].any()),
            load.eq(self.job.valid & self.job.ready),
            self.o.valid.eq(valid[-1]),
            self.idle.eq(~active & ~some),
        ]
        with m.If(load):
            m.d.sync += [left.eq(self.job.payload.cols), active.eq(1)]
        with m.Elif(take):
            m.d.sync += [left.eq(left - 1), active.eq(left != 1)]
        with m.If(en):
            m.d.sync += [valid.eq(Cat(take, valid[:-1])), some.eq(take | valid[:-1].any())]

        def delay(value: Value, steps: int, name: str) -> Value:
            for stage in range(steps):
                register = Signal.like(value, name=f"{name}{stage}", reset_less=True)
                with m.If(step[stage]):
                    m.d.sync += register.eq(value)
                value = register
            return value

        gamma = delay(param.mult, 5, "gamma")
        beta = delay(param.bias, 6, "beta")
        shift = delay((param.shift - 1)[:6], 7, "shift")
        for row in range(self.rows):
            lane = NormLane(self.arch)
            place(m, platform, f"lane{row}", lane, module="norm_lane")
            m.d.comb += [
                lane.load.eq(load),
                lane.row.eq(self.row[row]),
                lane.x.eq(self.i.payload[row]),
                lane.step.eq(step),
                lane.gamma.eq(gamma),
                lane.beta.eq(beta),
                lane.shift.eq(shift),
                self.o.payload[row].eq(lane.y),
            ]
        return m
