"""Speed of the cycle engine against Verilator: BERT-base, 12 layers, on sta1024, every cycle of both compared."""

import time
from dataclasses import replace

import numpy as np

from benchmarks import Table
from benchmarks.workloads import WORKLOADS, compile_workload
from sim.cycle import run_cycles
from sim.engine import VerilatorEngine
from sim.memory import MemoryModel
from sim.model_io import quantise_inputs

__all__ = ["PATTERNS", "run"]

PATTERNS: tuple[str | None, ...] = (None, "2:4", "1:8")
"""N:M of the weights; None: dense."""

_TIMES = 7  # the best counts: the machine has other work


def _row(pattern: str | None) -> tuple[str | int | float | None, ...]:
    program, inputs = compile_workload(replace(WORKLOADS["bert-128"], layers=12), pattern, "sta1024")
    runs = [run_cycles(program) for _ in range(_TIMES)]
    best = min(runs, key=lambda one: one.wall_s)
    every = run_cycles(program, skip=False)
    image = program.memory_image(quantise_inputs(program, inputs))
    image = np.concatenate([image, np.zeros(-len(image) % program.arch.bus_bytes, np.uint8)])
    with VerilatorEngine(program.arch, image, model=MemoryModel()) as engine:
        start = time.perf_counter()
        rtl = engine.run(code_address=program.code_address, instructions=program.instruction_count, max_cycles=1 << 40)
        seconds = time.perf_counter() - start
    different = sum(run.counters != rtl.counters for run in (best, every))
    speed, slow = rtl.cycles / best.wall_s, rtl.cycles / seconds
    return (pattern or "dense", rtl.cycles, different, best.stepped / rtl.cycles, best.wall_s * 1e3, speed / 1e6,
            every.cycles_per_s / 1e6, slow / 1e6, speed / slow)


def run() -> list[Table]:
    """One row a pattern."""
    return [Table(
        title="BERT-base, 12 layers, n = 128, on sta1024: cycle engine and Verilator, one core",
        columns=("weights", "cycles", "different", "stepped", "engine ms", "engine Mcycles/s", "without skipping",
                 "RTL Mcycles/s", "ratio"),
        rows=tuple(_row(pattern) for pattern in PATTERNS),
        note="Different: runs of the engine, with and without skipping, of which a counter differs from the RTL's. Stepped: "
             "share of the cycles that were not skipped. Engine times include decoding the instructions.",
    )]
