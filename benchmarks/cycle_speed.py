"""Speed of the cycle engine against Verilator: BERT-base, 12 layers, on sta1024, every cycle of both compared."""

import statistics
import time
from dataclasses import replace

import numpy as np

from benchmarks import Table
from benchmarks.utilisation import MIXED
from benchmarks.workloads import WORKLOADS, compile_workload
from compiler.program import Program
from sim.cycle import CycleRun, run_cycles
from sim.cycle_check import check_code
from sim.engine import VerilatorEngine
from sim.memory import MemoryModel
from sim.model_io import quantise_inputs

__all__ = ["PATTERNS", "run"]

PATTERNS: dict[str, str | dict[str, str] | None] = {
    "dense": None, "2:4": "2:4", "mixed": MIXED, "2:8": "2:8", "1:4": "1:4", "1:8": "1:8",
}  # fmt: skip
"""N:M of the weights."""

_TIMES = 10  # runs of the engine before the RTL's, and as many after it; the median counts


def _row(name: str) -> tuple[str | int | float | None, ...]:
    program, inputs = compile_workload(replace(WORKLOADS["bert-128"], layers=12), PATTERNS[name], "sta1024")
    every = run_cycles(program, skip=False)
    image = program.memory_image(quantise_inputs(program, inputs))
    image = np.concatenate([image, np.zeros(-len(image) % program.arch.bus_bytes, np.uint8)])
    runs = [_timed(program) for _ in range(_TIMES)]
    with VerilatorEngine(program.arch, image, model=MemoryModel()) as engine:
        start = time.process_time()
        rtl = engine.run(code_address=program.code_address, instructions=program.instruction_count, max_cycles=1 << 40)
        rtl_s = time.process_time() - start
    runs += [_timed(program) for _ in range(_TIMES)]
    different = sum(found.counters != rtl.counters for found in (every, *(found for found, _, _ in runs)))
    engine_s, checks_s = (statistics.median(times) for times in list(zip(*runs))[1:])
    return (name, rtl.cycles, different, runs[0][0].stepped / rtl.cycles, engine_s * 1e3, checks_s * 1e3,
            rtl.cycles / engine_s / 1e6, rtl.cycles / rtl_s / 1e6, rtl_s / engine_s)


def _timed(program: Program) -> tuple[CycleRun, float, float]:
    """A run, the seconds of CPU time that it took without its checks, and those of the checks."""
    start = time.process_time()
    check_code(program.code, program.arch, program.code_address)
    checked = time.process_time()
    found = run_cycles(program)
    checks = checked - start
    return found, time.process_time() - checked - checks, checks


def run() -> list[Table]:
    """One row a pattern."""
    return [Table(
        title="BERT-base, 12 layers, n = 128, on sta1024: cycle engine and Verilator, one core",
        columns=("weights", "cycles", "different", "stepped", "engine ms", "checks ms", "engine Mcycles/s", "RTL Mcycles/s",
                 "ratio"),
        rows=tuple(_row(name) for name in PATTERNS),
        note="Different: runs of the engine, with and without skipping, of which a counter differs from the RTL's. Stepped: "
             "share of the cycles that were not skipped. CPU time of one thread; the engine's is the median of runs before and "
             "after the RTL's, with decoding the instructions, without checking them.",
    )]
