"""The cycle engine against the RTL on random programs: every counter of every program, and the speed of both."""

import sys
import time
from dataclasses import replace

import numpy as np

from benchmarks import Table
from hw.arch import PRESETS, Arch
from sim.cycle import run_code
from sim.memory import MemoryModel
from tests.sim.cycle_cases import compare, random_case, run_rtl

__all__ = ["SET", "run"]

_TINY = PRESETS["tiny"]

_WIDE = {"max_channels": 300, "max_rows": 9, "ops": 3}

SET: tuple[tuple[Arch, int, int, dict[str, int]], ...] = (
    (_TINY, 0, 200, {}),
    (_TINY, 1000, 100, {"repeat": 9}),
    (_TINY, 2000, 60, _WIDE),
    (replace(_TINY, name="tiny, deeper", lane_depth=256, row_depth=128, psum_depth=64, fifo_beats=64), 0, 40, _WIDE),
    (replace(_TINY, name="tiny, bus 16", bus_bytes=16, row_depth=16), 0, 40, {"repeat": 5}),
    (replace(_TINY, name="tiny, bus 64", bus_bytes=64), 0, 40, {"repeat": 5}),
    (replace(_TINY, name="8 x 8, bus 128", rows=8, lanes=8, bus_bytes=128, fifo_beats=64), 0, 40, {"repeat": 3}),
    (PRESETS["ecp5"], 0, 20, {"ops": 4}),
    (replace(_TINY, name="dense only", sparse=False), 0, 20, {"repeat": 3}),
    (replace(PRESETS["gemv256"], lanes=16, bus_bytes=16, name="4 x 16"), 0, 30, {"repeat": 3}),
    (PRESETS["sta256"], 0, 20, {"max_channels": 600, "ops": 3}),
    (PRESETS["sta1024"], 0, 10, {"max_channels": 1000, "ops": 3}),
)
"""Architecture, first seed, number of programs, options of the random program."""


def _row(arch: Arch, first: int, programs: int, options: dict[str, int]) -> tuple[str | int | float | None, ...]:
    cycles = stepped = wrong = 0
    rtl_s = model_s = 0.0
    for seed in range(first, first + programs):
        case = random_case(seed, arch, **options)
        rtl = run_rtl(case)
        run, different = compare(case, rtl)
        every, more = compare(case, rtl, skip=False)
        if different or more:
            wrong += 1
            print(f"{arch.name}, seed {seed}: {different or more}", file=sys.stderr)
        cycles, stepped = cycles + run.cycles, stepped + run.stepped
        rtl_s, model_s = rtl_s + rtl.wall_s, model_s + run.wall_s
    return arch.name, programs, cycles, wrong, stepped / cycles, cycles / rtl_s / 1e6, cycles / model_s / 1e6, rtl_s / model_s


_LARGE: tuple[tuple[str, int, int], ...] = (("tiny", 150, 60), ("sta256", 30, 500), ("gemv256", 30, 500), ("sta1024", 20, 900))
"""Preset, number of programs, channels: programs on which the engine is compared with itself."""


def _skipping(name: str, programs: int, channels: int) -> tuple[str | int | float | None, ...]:
    cycles = stepped = wrong = 0
    for seed in range(programs):
        case = random_case(seed, PRESETS[name], ops=3, repeat=8, max_channels=channels)
        memory = case.memory if not case.memory.stall_probability else MemoryModel(latency=1 + seed % 200)
        fast, slow = (run_code(case.code, PRESETS[name], memory, skip=skip) for skip in (True, False))
        wrong += fast.counters != slow.counters or not np.array_equal(fast.completed, slow.completed)
        cycles, stepped = cycles + slow.cycles, stepped + fast.stepped
    return name, programs, cycles, wrong, stepped / cycles


def run() -> list[Table]:
    """One row an architecture."""
    start = time.monotonic()
    rows = tuple(_row(*entry) for entry in SET)
    return [Table(
        title=f"Cycle engine against RTL: {sum(entry[2] for entry in SET)} random programs",
        columns=("arch", "programs", "cycles", "different", "stepped", "RTL Mcycles/s", "engine Mcycles/s", "ratio"),
        rows=rows,
        note="Different: programs of which the cycle count, a counter or the completion of an instruction differs, with or "
             "without skipping. Latency 1 to 300, bandwidth 0.3 to 4 times the bus, stalls in a third. "
             f"{time.monotonic() - start:.0f} s.",
    ), Table(
        title="Cycle engine with skipping against itself without, on programs in which much recurs",
        columns=("arch", "programs", "cycles", "different", "stepped"),
        rows=tuple(_skipping(*entry) for entry in _LARGE),
        note="Every second program waits for other instructions in one place of six.",
    )]
