"""Utilisation and speed-up of whole encoder layers, for every preset, by the cycle engine; on one preset by the RTL, too."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from algo.sparsify import finalize, sparsify
from benchmarks import DOCS, Table, write_page
from benchmarks.workloads import WORKLOADS, Workload, compile_workload
from compiler.program import Program
from hw.arch import get_arch
from nmforge.api import compile
from sim.cycle import run_cycles
from sim.memory import MemoryModel
from sim.plots import columns
from sim.simulate import simulate

__all__ = ["MIXED", "PATTERNS", "gemv_program", "mixed", "run"]

PATTERNS = (None, "2:4", "2:8", "1:4", "1:8")
ODD = ("3:4", "5:7", "1:32")
SQUARE = ("sta256", "sta1024", "sta4096")
MIXED = {"*query": "2:4", "*key": "2:4", "*value": "1:4", "*up": "1:8", "*down": "2:8"}
Key = tuple[str, str, str | None]
NOTE = ("Memory: latency 64 cycles; shared: reads and writes together move the width of the bus a cycle; each way: reads and "
        "writes the width of the bus each, as the two data channels of AXI allow. Cycles from start to done, everything counted.")


def run() -> list[Table]:
    """Tables of utilisation, odd patterns, and matrix times vector."""
    programs = {(preset, name, pattern): compile_workload(workload, pattern, preset)
                for preset in SQUARE for name, workload in WORKLOADS.items() for pattern in PATTERNS}
    cycles = {key: (_cycles(program, 1), _cycles(program, 2)) for key, (program, _) in programs.items()}
    rows = []
    for (preset, name, pattern), (program, inputs) in programs.items():
        rtl = simulate(program, inputs, check=False).cycles if preset == "sta1024" else None
        shared, duplex = cycles[preset, name, pattern]
        dense = cycles[preset, name, None]
        ideal = programs[preset, name, None][0].ideal_cycles / program.ideal_cycles
        rows.append((f"{preset}, {WORKLOADS[name].title}", pattern or "dense", shared, rtl, program.ideal_cycles / shared,
                     program.ideal_cycles / duplex, dense[0] / shared, dense[1] / duplex, ideal))
    _plot(programs, cycles)
    names = ("preset, one layer of", "pattern", "cycles, shared", "RTL", "utilisation, shared", "utilisation, each way",
             "speed-up, shared", "speed-up, each way", "ideal")
    tables = [Table("Whole encoder layers", names, tuple(rows), NOTE), _whole_models(), _odd_patterns(), _gemv()]
    write_page(DOCS / "performance.md", "utilisation", tables)
    return tables


def _plot(programs: Mapping[Key, tuple[Program, object]], cycles: Mapping[Key, tuple[int, int]]) -> None:
    """How utilisation falls as patterns thin out and arrays grow, and where the cycles of sta1024 go."""
    patterns = (None, "2:4", "2:8", "1:8")
    shares = {f"{preset}, {pattern or 'dense'}": [programs[key][0].ideal_cycles / cycles[key][1] for key in programs
                                                  if (key[0], key[2]) == (preset, pattern)]
              for preset in SQUARE for pattern in patterns}
    picture = columns([w.title for w in WORKLOADS.values()], shares, label="utilisation (bus width each way)", limit=1.0)
    (DOCS / "utilisation.png").write_bytes(picture)
    runs = {f"{name} {pattern or 'dense'}": run_cycles(programs["sta1024", name, pattern][0], _memory("sta1024", 2))
            for name in WORKLOADS for pattern in patterns}
    waits = {"array works": "array_busy", "waits for weights": "array_wait_weights", "waits for columns": "array_wait_columns",
             "blocked by post-processing": "array_blocked"}
    parts = {title: [run.counters[counter] / run.cycles for run in runs.values()] for title, counter in waits.items()}
    parts["nothing to do"] = [1 - sum(run.counters[counter] for counter in waits.values()) / run.cycles for run in runs.values()]
    (DOCS / "waits.png").write_bytes(columns(list(runs), parts, label="cycles of the array, sta1024", stack=True, limit=1.0))


def _memory(preset: str, factor: int) -> MemoryModel:
    return MemoryModel(bytes_per_cycle=factor * get_arch(preset).bus_bytes)


def _cycles(program: Program, factor: int) -> int:
    return run_cycles(program, _memory(program.arch.name, factor)).cycles


def _whole_models() -> Table:
    """BERT-base, all layers."""
    whole, rows, dense = replace(WORKLOADS["bert-128"], layers=12), [], 0
    for pattern in PATTERNS:
        program, _ = compile_workload(whole, pattern, "sta1024")
        result = run_cycles(program)
        dense = dense or result.cycles
        share = program.ideal_cycles / result.cycles
        rows.append((pattern or "dense", result.cycles, share, dense / result.cycles, result.wall_s))
    names = ("pattern", "cycles, shared", "utilisation", "speed-up", "simulated in s")
    return Table("BERT-base, 12 layers, n = 128, sta1024", names, tuple(rows), NOTE)


def mixed(workload: Workload, preset: str) -> tuple[Program, float]:
    """A network with a pattern for each kind of layer, and its ideal speed-up over dense."""
    program, _ = compile_workload(workload, MIXED, preset)
    return program, program.macs / program.arch.macs / program.ideal_cycles


def _odd_patterns() -> Table:
    rows = []
    for name in ("bert-128", "minilm-128"):
        dense = _cycles(compile_workload(WORKLOADS[name], None, "sta1024")[0], 1)
        found = [(pattern, compile_workload(WORKLOADS[name], pattern, "sta1024")[0]) for pattern in ODD]
        for pattern, program in [*found, ("mixed", mixed(WORKLOADS[name], "sta1024")[0])]:
            cycles, ideal = _cycles(program, 1), program.macs / program.arch.macs / program.ideal_cycles
            rows.append((WORKLOADS[name].title, pattern, cycles, dense / cycles, ideal, dense / cycles / ideal))
    return Table("Odd and mixed patterns on sta1024, one layer",
                 ("network", "pattern", "cycles, shared", "speed-up", "ideal", "share of the ideal"), tuple(rows),
                 "Mixed: queries and keys 2:4, values 1:4, attention output dense, feed-forward 1:8 and 2:8. " + NOTE)


def gemv_program(features: int, pattern: str | None) -> tuple[Program, torch.Tensor]:
    """One token through a square linear layer, as in decoding."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(features, features)).eval(), torch.randn(1, 1, features)
    if pattern is not None:
        sparsify(model, pattern, method="magnitude")
        finalize(model)
    return compile(model, x, arch="gemv256", calibration=[x]), x


def _gemv() -> Table:
    rows = []
    for features in (2048, 4096):
        for pattern in (None, "2:4", "2:8", "1:8"):
            program, x = gemv_program(features, pattern)
            result = run_cycles(program)
            rtl = simulate(program, x, check=False).cycles if features == 2048 else None
            beats = sum(count for name, count in result.counters.items() if "beats" in name)
            rows.append((f"{features} x {features}", pattern or "dense", result.cycles, rtl, beats / result.cycles))
    names = ("matrix", "pattern", "cycles", "RTL", "share of the bandwidth")
    return Table("Matrix times vector (n = 1) on gemv256", names, tuple(rows),
                 "64 bytes a cycle, reads and writes together; latency 64 cycles.")
