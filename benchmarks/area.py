"""Area of whole accelerators by Yosys, and how long that takes."""

from benchmarks import Table
from hw.arch import get_arch
from hw.verilog import TOP_NAME, verilog
from sim.synth import TARGETS, synthesise

__all__ = ["run"]

PRESETS = ("tiny", "sta256", "sta1024")


def run() -> list[Table]:
    """One table for all presets and targets."""
    rows = []
    for preset in PRESETS:
        text, macs = verilog(preset), get_arch(preset).macs
        for target in TARGETS:
            found = synthesise(text, top=TOP_NAME, target=target)
            rows.append((f"{preset}, {target}", found.luts, found.lut_rams, found.ffs, found.dsps, found.brams,
                         found.luts / macs, found.seconds))
    return [Table(
        title="Area of the accelerator",
        columns=("preset, target", "LUT", "of them RAM", "FF", "DSP", "block RAM", "LUT/MAC", "synthesis s"),
        rows=tuple(rows),
        note="Mapped cells, hierarchical, before place and route. DSP: DSP48E2 or MULT18X18D. Block RAM: RAMB36 or DP16KD. "
             "LUT: 6 inputs (xcup) or 4 (ecp5).",
    )]
