"""Three ways to feed 16 multipliers with N:M sparse weights: area per MAC by Yosys, and bounds on cycles.

All lanes take one weight per cycle and multiply it with one activation of each of `ROWS` token rows, in the accelerator's
own `hw.lane.Mac`. They differ in how the activation that belongs to the weight is selected.
"""

from amaranth import Module, Signal, signed
from amaranth.back import verilog
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from benchmarks import Table
from hw.arch import Arch
from hw.feeder import PositionDecoder
from hw.lane import Lane, LaneControl, Mac
from hw.shared import SharedModules, place
from sim.synth import TARGETS, Resources, synthesise

__all__ = ["ROWS", "DenseLane", "MuxLane", "export", "gather_cycles", "lanes", "mux_cycles", "run"]

ROWS = 16
"""Multiply-accumulates of a lane."""

SUM_BITS = 26
"""Bits of a sum, as those of a gather lane of 1,024 columns."""

PATTERNS = ((1, 1), (2, 4), (1, 4), (2, 8), (1, 8), (1, 16), (1, 32))
"""N:M of the cycle table; 1:1 is dense."""


class _SelectLane(wiring.Component):
    """A lane whose activations arrive as a register stage (`control.ram`) and go to the MACs; subclasses give the source.

    Members
    -------
    weight : one step. control : stage enables. shadow[t] : finished sums.
    """

    def __init__(self, rows: int, **members) -> None:
        self._rows = rows
        super().__init__({**members, "weight": In(signed(8)), "control": In(LaneControl()),
                          "shadow": Out(signed(SUM_BITS)).array(rows)})

    def selected(self, row: int):
        """Activation of a token row, before the register."""
        raise NotImplementedError

    def elaborate(self, platform: object) -> Module:
        m = Module()
        weight = Signal(signed(8))
        with m.If(self.control.ram):
            m.d.sync += weight.eq(self.weight)
        for t in range(self._rows):
            mac, activation = Mac(SUM_BITS), Signal(8, name=f"activation{t}")
            place(m, platform, f"mac{t}", mac, module="mac")
            with m.If(self.control.ram):
                m.d.sync += activation.eq(self.selected(t))
            m.d.comb += [
                mac.a.eq(activation), mac.w.eq(weight), self.shadow[t].eq(mac.shadow),
                *(getattr(mac, name).eq(getattr(self.control, name)) for name in ("unsigned_a", "mul", "acc", "first", "copy")),
            ]
        return m


class DenseLane(_SelectLane):
    """No selection: a column of activations per step. The baseline.

    Members
    -------
    column[t] : activations of the step.
    """

    def __init__(self, rows: int = ROWS) -> None:
        super().__init__(rows, column=In(8).array(rows))

    def selected(self, row: int):
        return self.column[row]


class MuxLane(_SelectLane):
    """A multiplexer of M inputs per MAC on a window of M columns, which all lanes share and which is not part of the lane.

    Members
    -------
    window[t] : bytes of the group's M columns. position : column of the step's weight.
    """

    def __init__(self, m: int, rows: int = ROWS) -> None:
        super().__init__(rows, window=In(8 * m).array(rows), position=In(range(m)))

    def selected(self, row: int):
        return self.window[row].word_select(self.position, 8)


def _arch(depth: int, rows: int = ROWS) -> Arch:
    return Arch(name="bench", rows=rows, lanes=rows, lane_depth=depth, row_depth=32, psum_depth=32, bus_bytes=2 * rows)


def export(component: wiring.Component, name: str, *, ram_style: str = "block") -> str:
    """Verilog of one component, its MACs as instances of one module; `ram_style` replaces the lane RAM's."""
    shared = SharedModules()
    text = verilog.convert(component, name=name, platform=shared, emit_src=False, strip_internal_attrs=True)
    return "\n".join([*shared.texts.values(), str(text)]).replace('ram_style = "block"', f'ram_style = "{ram_style}"')


def lanes() -> dict[str, str]:
    """Verilog of each lane (module ``lane``), by what the tables call it."""
    return {
        "dense, no selection": export(DenseLane(), "lane"),
        **{f"multiplexer, M <= {m}": export(MuxLane(m), "lane") for m in (4, 8, 16, 32)},
        "gather, LUT RAM, depth 64": export(Lane(_arch(64)), "lane", ram_style="distributed"),
        "gather, block RAM, depth 512": export(Lane(_arch(512)), "lane"),
        "gather, block RAM, depth 1024": export(Lane(_arch(1024)), "lane"),
    }


def gather_cycles(n: int) -> float:
    """Cycles of one group of N kept weights and one column of outputs per lane: the RAM reads any column in any cycle."""
    return float(n)


def mux_cycles(n: int, m: int, *, columns_per_cycle: int, reuse: int = 1) -> float:
    """Bound for the multiplexer lanes: multiplying takes N cycles, refilling the window with M columns the rest.

    Parameters
    ----------
    n, m : int
        Pattern.
    columns_per_cycle : int
        Columns (a byte per token row) that the activation buffer delivers in a cycle.
    reuse : int
        Output columns of one lane that use a window before it is refilled; each needs accumulators of its own.
    """
    return max(float(n), m / (columns_per_cycle * reuse))


def _area(target: str) -> Table:
    found = {name: synthesise(text, top="lane", target=target) for name, text in lanes().items()}
    base = found["dense, no selection"]
    decoder = synthesise(export(PositionDecoder(), "position"), top="position", target=target)
    rows = [(name, *_per_mac(r), r.luts - base.luts, r.ffs - base.ffs) for name, r in found.items()]
    for macs in (16, 32):
        rows.append((f"position decoder, shared by {macs} MACs", *_per_mac(decoder, macs), decoder.luts, decoder.ffs))
    return Table(
        title=f"Area per MAC of a lane of {ROWS} MACs, {TARGETS[target].title}",
        columns=("lane", "LUT/MAC", "FF/MAC", "DSP/MAC", "RAM/MAC", "LUT - dense", "FF - dense"),
        rows=tuple(rows),
        note="LUT - dense, FF - dense: a whole lane against the dense one. RAM: RAMB36 or DP16KD. The window of the "
             "multiplexer lanes is not in the count: 8 M flip-flops per token row, for all lanes together.",
    )


def _per_mac(found: Resources, macs: int = ROWS) -> tuple[float, float, float, float]:
    return found.luts / macs, found.ffs / macs, found.dsps / macs, found.brams / macs


def _cycles() -> Table:
    widths = (1, 2, 4)
    rows = []
    for n, m in PATTERNS:
        ideal = gather_cycles(n)
        shares = [ideal / mux_cycles(n, m, columns_per_cycle=width) for width in widths]
        reuse = [ideal / mux_cycles(n, m, columns_per_cycle=1, reuse=times) for times in (4, 8)]
        rows.append((f"{n}:{m}", f"{m // n} col", m / n, *(share * m / n for share in (*shares, *reuse))))
    return Table(
        title="Bound on the speed-up over dense (group of M in N cycles is the best)",
        columns=("N:M", "full rate needs", "gather", *(f"mux {width} col" for width in widths),
                 *(f"mux 1 col, {times} sums" for times in (4, 8))),
        rows=tuple(rows),
        note="The gather lane holds the tile's activations and reads any of them in any cycle. The multiplexer lanes wait for "
             "their window: M columns a group, from a buffer that delivers so many columns (bytes per token row) a cycle; with "
             "several sums a MAC, a window serves as many output columns before it is refilled.",
    )


def run() -> list[Table]:
    """All tables."""
    return [*(_area(target) for target in ("xcup", "ecp5")), _cycles()]
