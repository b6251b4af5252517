"""The row unit: softmax, LayerNorm and RMSNorm over rows that arrive as columns. Models, and `RowUnit`."""

import numpy as np
from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import ArrayLike, NDArray

from hw.arch import Arch, get_arch
from hw.arithmetic import fold, kept, parts
from hw.exp2 import MASKED, ExpPass, exp2_mantissa, softmax_exp
from hw.isa import RowOp
from hw.queue import Fifo
from hw.row_layout import NORM_PARAM, ROW_COMMAND, column_layout, row_scale_layout
from hw.rownorm import NormPass, NormScale, layernorm_rows, moments_layout, norm_constants, rsqrt16
from hw.rowscale import RowScale, recip16, row_scale_softmax
from hw.shared import place
from hw.stream_util import StreamBuffer

__all__ = [
    "NORM_PARAM",
    "ROW_COMMAND",
    "RowCollector",
    "RowMoments",
    "RowUnit",
    "exp2_mantissa",
    "exp_rows",
    "layernorm_rows",
    "max_rows",
    "norm_constants",
    "recip16",
    "row_scale_layout",
    "row_scale_softmax",
    "rsqrt16",
    "softmax_exp",
    "softmax_rows",
]

Int = NDArray[np.int64]


def max_rows(scores: ArrayLike, running: ArrayLike = MASKED) -> Int:
    """Row operation MAX: maximum over the last axis of `scores` ``(..., cols)`` and `running` ``(...)``."""
    return np.maximum(np.asarray(scores, np.int64).max(-1), running)


def exp_rows(scores: ArrayLike, mx: ArrayLike, total: ArrayLike = 0) -> tuple[Int, Int]:
    """Row operation EXP: probabilities of `scores` ``(..., cols)`` against `mx`; `total` plus their sum."""
    scores = np.asarray(scores, np.int64)
    p = softmax_exp(np.asarray(mx, np.int64)[..., None] - scores, scores)
    return p, (total + p.sum(-1)) & 0xFFFFFF


def softmax_rows(scores: ArrayLike, row_mult: int, row_shift: int) -> tuple[Int, Int, Int]:
    """Row operation SOFTMAX of int16 `scores`: probabilities ``(..., cols)``, multipliers, shifts."""
    p, total = exp_rows(scores, max_rows(scores))
    return (p, *row_scale_softmax(total, row_mult, row_shift))


class RowMoments(wiring.Component):
    """Maximum, sum and sum of squares of one row.

    Parameters
    ----------
    arch : Arch
        Architecture; only ``row_depth`` counts.

    Members
    -------
    x : In(signed(16))
        Value.
    first : In(1)
        It begins the row.
    use_max, use_sum : In(1)
        Let it count for the maximum, for the moments.
    mx : Out(signed(16))
        Maximum; a cycle after the last value.
    moments : Out(moments_layout(arch))
        Sum, a cycle after the last value, and sum of squares, three cycles after.
    """

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        super().__init__({
            "x":       In(signed(16)),
            "first":   In(1),
            "use_max": In(1),
            "use_sum": In(1),
            "mx":      Out(signed(16), init=MASKED),
            "moments": Out(moments_layout(arch)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        terms = parts(self.x, self.x, spare=self.arch.spare_dsps)
        pieces, square = kept(terms, "piece"), Signal(31, reset_less=True)
        use, first = Signal(2), Signal(2)  # of the pieces, of the square
        moments = Signal(self.moments.shape(), reset_less=True)
        total, squares = moments.total, moments.squares
        m.d.comb += self.moments.eq(moments)
        with m.If(self.use_max & (self.first | (self.x > self.mx))):
            m.d.sync += self.mx.eq(self.x)
        m.d.sync += [use.eq(Cat(self.use_sum, use)), first.eq(Cat(self.first, first))]
        with m.If(self.use_sum):
            m.d.sync += [total.eq(Mux(self.first, 0, total) + self.x),
                         *(piece.eq(term) for (piece, _), (term, _) in zip(pieces, terms, strict=True))]
        with m.If(use[0]):
            m.d.sync += square.eq(fold(fold(pieces))[0][0])
        with m.If(use[1]):
            m.d.sync += squares.eq(Mux(first[1], 0, squares) + square)
        return m


class RowCollector(wiring.Component):
    """First pass: takes the columns of a command, forwards them and keeps what the second pass has to know.

    One column per cycle. The job is offered in the cycle after the last column (LAYERNORM, RMSNORM: two
    later); the next command is taken with it.

    Parameters
    ----------
    arch : Arch
        Architecture.

    Members
    -------
    cmd : In(stream)
        Row commands.
    i : In(stream)
        Columns, ``cmd.cols`` for each command.
    o : Out(stream)
        The same columns, without those of MAX.
    job : Out(stream)
        The command (``first`` and ``last`` set unless it is EXP), when `mx` and `moments` are complete.
        None for MAX.
    mx : Out(signed(16)).array(rows)
        Maximum of each row.
    moments : Out(moments_layout(arch)).array(rows)
        Moments of each row.
    busy : Out(1)
        A command is inside.
    """

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        super().__init__({
            "cmd":     In(stream.Signature(ROW_COMMAND)),
            "i":       In(stream.Signature(column_layout(arch.rows))),
            "o":       Out(stream.Signature(column_layout(arch.rows))),
            "job":     Out(stream.Signature(ROW_COMMAND)),
            "mx":      Out(signed(16)).array(arch.rows),
            "moments": Out(moments_layout(arch)).array(arch.rows),
            "busy":    Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        job = self.job.payload
        left = Signal.like(job.cols)  # columns still to come
        fresh, take = Signal(), Signal()
        is_max, is_norm = job.op == RowOp.MAX, (job.op == RowOp.LAYERNORM) | (job.op == RowOp.RMSNORM)
        m.d.comb += [take.eq(self.i.valid & self.i.ready), self.o.payload.eq(self.i.payload)]
        with m.FSM() as fsm:
            with m.State("IDLE"):
                m.d.comb += self.cmd.ready.eq(1)
                with m.If(self.cmd.valid):
                    m.next = "COLUMNS"
            with m.State("COLUMNS"):
                m.d.comb += [self.i.ready.eq(self.o.ready | is_max), self.o.valid.eq(self.i.valid & ~is_max)]
                with m.If(take & (left == 1)):
                    with m.If(is_max):
                        m.next = "IDLE"
                    with m.Elif(is_norm):
                        m.next = "SQUARES"
                    with m.Else():
                        m.next = "GIVE"
            with m.State("SQUARES"):  # the last square is being made
                m.next = "SUM"
            with m.State("SUM"):  # and added
                m.next = "GIVE"
            with m.State("GIVE"):
                m.d.comb += [self.job.valid.eq(1), self.cmd.ready.eq(self.job.ready)]
                with m.If(self.job.ready):
                    m.next = "IDLE"
                    with m.If(self.cmd.valid):
                        m.next = "COLUMNS"
        m.d.comb += self.busy.eq(~fsm.ongoing("IDLE"))
        with m.If(self.cmd.valid & self.cmd.ready):
            cmd = self.cmd.payload
            whole = (cmd.op != RowOp.MAX) & (cmd.op != RowOp.EXP)
            m.d.sync += [job.eq(cmd), left.eq(cmd.cols), fresh.eq(1)]
            m.d.sync += [job.first.eq(cmd.first | whole), job.last.eq(cmd.last | whole)]
        with m.Elif(take):
            m.d.sync += [left.eq(left - 1), fresh.eq(0)]
        for row in range(self.arch.rows):
            moments = RowMoments(self.arch)
            place(m, platform, f"row{row}", moments, module="row_moments")
            m.d.comb += [
                moments.x.eq(self.i.payload[row]),
                moments.first.eq(fresh & job.first),
                moments.use_max.eq(take & (is_max | (job.op == RowOp.SOFTMAX))),
                moments.use_sum.eq(take & is_norm),
                self.mx[row].eq(moments.mx),
                self.moments[row].eq(moments.moments),
            ]
        return m


class RowUnit(wiring.Component):
    """Softmax, LayerNorm and RMSNorm of ``arch.rows`` rows at once, as their int16 columns arrive.

    A first pass keeps maximum or moments of each row while the columns go into a memory of 2 * ``row_depth``
    columns; a second pass reads them. Both take a column per cycle and work at the same time on different
    commands; results come in the order of the commands. `docs/numerics.md` says what is computed.

    ==================  ============================  ============================================
    row operation       last column in to first out   distance of like commands (C columns each)
    ==================  ============================  ============================================
    SOFTMAX, EXP        6 cycles                      max(C, T) + 1 (without row scale: C + 1)
    LAYERNORM, RMSNORM  T + 32 cycles                 max(C + 4, T + 20)
    MAX                 no output                     C + 1
    ==================  ============================  ============================================

    The row scale follows the last probability by T + 22 cycles. Going from one of the first two lines to the
    other empties the second pass. Up to three row scales wait inside; then probabilities wait, too.
    An EXP that continues a row (no ``first``) must follow the row's previous EXP without a SOFTMAX between.

    Parameters
    ----------
    arch : Arch or str
        Architecture or name of a preset.

    Members
    -------
    cmd : In(stream)
        `ROW_COMMAND`, one per TILE with a row operation, ``1 <= cols <= row_depth``.
    i : In(stream)
        Columns: ``cmd.cols`` for each command.
    params : In(stream)
        `NORM_PARAM`: beta, gamma, shift (1..63) for each column of LAYERNORM and RMSNORM.
    o : Out(stream)
        Columns: normalised values, or probabilities 0..255; none for MAX.
    scale : Out(stream)
        Multiplier and shift of each row: one for each SOFTMAX, and each EXP with ``last``.
    busy : Out(1)
        A command, a column or a row scale is inside.
    stalled : Out(1)
        A column or a row scale is offered and not taken.

    Raises
    ------
    TypeError
        `arch` is no `Arch` and no name.
    ValueError
        Unknown preset.
    """

    def __init__(self, arch: Arch | str) -> None:
        self.arch = get_arch(arch)
        rows = self.arch.rows
        super().__init__({
            "cmd":     In(stream.Signature(ROW_COMMAND)),
            "i":       In(stream.Signature(column_layout(rows))),
            "params":  In(stream.Signature(NORM_PARAM)),
            "o":       Out(stream.Signature(column_layout(rows))),
            "scale":   Out(stream.Signature(row_scale_layout(rows))),
            "busy":    Out(1),
            "stalled": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = self.arch.rows
        m.submodules.collector = collector = RowCollector(self.arch)
        # one more than the memory: the FIFO's output register
        m.submodules.fifo = fifo = Fifo(width=16 * rows, depth=2 * self.arch.row_depth + 1)
        m.submodules.columns = columns = StreamBuffer(column_layout(rows))
        m.submodules.exp_pass = exp_pass = ExpPass(rows=rows)
        m.submodules.row_scale = row_scale = RowScale(rows=rows)
        m.submodules.norm_scale = norm_scale = NormScale(self.arch)
        m.submodules.norm_pass = norm_pass = NormPass(self.arch)

        wiring.connect(m, wiring.flipped(self.cmd), collector.cmd)
        wiring.connect(m, wiring.flipped(self.i), collector.i)
        wiring.connect(m, exp_pass.scale, row_scale.i)
        wiring.connect(m, row_scale.o, wiring.flipped(self.scale))
        wiring.connect(m, wiring.flipped(self.params), norm_pass.params)
        m.d.comb += [row_scale.total[row].eq(exp_pass.total[row]) for row in range(rows)]
        self._connect_jobs(m, collector, exp_pass, norm_scale, norm_pass)
        m.d.comb += [
            fifo.w_data.eq(collector.o.payload),
            fifo.w_en.eq(collector.o.valid),
            collector.o.ready.eq(fifo.w_rdy),
            columns.i.payload.as_value().eq(fifo.r_data),
            columns.i.valid.eq(fifo.r_rdy),
            fifo.r_en.eq(columns.i.ready),
            # at most one of the two has a job, and takes columns
            exp_pass.i.payload.eq(columns.o.payload),
            exp_pass.i.valid.eq(columns.o.valid),
            norm_pass.i.payload.eq(columns.o.payload),
            norm_pass.i.valid.eq(columns.o.valid),
            columns.o.ready.eq(exp_pass.i.ready | norm_pass.i.ready),
            self.o.payload.eq(Mux(norm_pass.o.valid, norm_pass.o.payload, exp_pass.o.payload)),
            self.o.valid.eq(norm_pass.o.valid | exp_pass.o.valid),
            norm_pass.o.ready.eq(self.o.ready),
            exp_pass.o.ready.eq(self.o.ready),
            self.busy.eq(collector.busy | fifo.r_rdy | columns.o.valid | ~exp_pass.idle | exp_pass.scale.valid
                         | row_scale.busy | norm_scale.busy | ~norm_pass.idle),
            self.stalled.eq((self.o.valid & ~self.o.ready) | (self.scale.valid & ~self.scale.ready)),
        ]
        return m

    def _connect_jobs(
        self,
        m: Module,
        collector: RowCollector,
        exp_pass: ExpPass,
        norm_scale: NormScale,
        norm_pass: NormPass,
    ) -> None:
        """Hand jobs on, so that the second pass sees them in order and does one kind at a time."""
        job = collector.job
        is_exp = (job.payload.op == RowOp.SOFTMAX) | (job.payload.op == RowOp.EXP)
        exp_turn, norm_turn = Signal(), Signal()
        m.d.comb += [
            exp_turn.eq(is_exp & ~norm_scale.busy & norm_pass.idle),
            norm_turn.eq(exp_pass.idle),
            exp_pass.job.payload.eq(job.payload),
            exp_pass.job.valid.eq(job.valid & exp_turn),
            norm_scale.i.payload.eq(job.payload),
            norm_scale.i.valid.eq(job.valid & ~is_exp),
            job.ready.eq(Mux(is_exp, exp_pass.job.ready & exp_turn, norm_scale.i.ready)),
            norm_pass.job.payload.eq(norm_scale.o.payload),
            norm_pass.job.valid.eq(norm_scale.o.valid & norm_turn),
            norm_scale.o.ready.eq(norm_pass.job.ready & norm_turn),
        ]
        for row in range(self.arch.rows):
            m.d.comb += [
                exp_pass.mx[row].eq(collector.mx[row]),
                norm_scale.moments[row].eq(collector.moments[row]),
                norm_pass.row[row].eq(norm_scale.row[row]),
            ]
