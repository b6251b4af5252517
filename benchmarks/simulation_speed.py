"""How fast the Verilator engine is: building it, cycles per second, and a whole BERT-base with every byte checked."""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import nmforge as nf
from benchmarks import Table
from compiler.program import Program
from hw.arch import PRESETS, get_arch
from hw.verilog import TOP_NAME, verilog
from models.bert import BertConfig, BertModel
from sim.verilator import build

__all__ = ["PATTERNS", "ROUNDS", "run"]

ARCH = "sta1024"
TOKENS = 128
PATTERNS = ("2:4", "dense")
"""Of the table of cycles per second."""

ROUNDS = 5
"""Runs of a layer, of which the median counts; the patterns take turns, so that they meet the same load."""

_Example = dict[str, torch.Tensor]


@contextmanager
def _empty_cache() -> Iterator[None]:
    """Generated Verilog and simulators in a folder of their own, which is gone afterwards."""
    before = os.environ.get("NMFORGE_CACHE")
    with tempfile.TemporaryDirectory(prefix="nmforge-speed-") as folder:
        os.environ["NMFORGE_CACHE"] = str(Path(folder))
        try:
            yield
        finally:
            if before is None:
                del os.environ["NMFORGE_CACHE"]
            else:
                os.environ["NMFORGE_CACHE"] = before


def _program(layers: int, pattern: str) -> tuple[Program, _Example]:
    """Layers of BERT-base with random weights, one sequence of `TOKENS` tokens."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(layers=layers, hidden=768, heads=12, intermediate=3072, vocabulary=100)).encoder.eval()
    if pattern != "dense":
        nf.sparsify(model, pattern, method="magnitude")
    torch.manual_seed(1)
    example = {"hidden_states": torch.randn(1, TOKENS, 768), "attention_mask": torch.ones(1, TOKENS, dtype=torch.int64)}
    return nf.compile(model, example, arch=ARCH), example


def _builds() -> Table:
    """From nothing: export of every preset, build of one."""
    rows: list[tuple[str | float, ...]] = []
    with _empty_cache():
        for name in PRESETS:
            start = time.monotonic()
            verilog(name)
            rows.append((f"Verilog of {name}", time.monotonic() - start))
        made = build(verilog(ARCH), "harness.cpp", top=TOP_NAME, defines={"NM_BUS_BYTES": get_arch(ARCH).bus_bytes},
                     progress=False)
        rows.append((f"simulator of {ARCH}", made.seconds))
        start = time.monotonic()
        build(verilog(ARCH), "harness.cpp", top=TOP_NAME, defines={"NM_BUS_BYTES": get_arch(ARCH).bus_bytes})
        rows.append((f"simulator of {ARCH}, from the cache", time.monotonic() - start))
    return Table("Builds from nothing", ("what", "seconds"), tuple(rows),
                 f"The C++ compiler uses all {os.cpu_count()} cores, the rest one.")


def _cycles() -> Table:
    programs = {pattern: _program(1, pattern) for pattern in PATTERNS}
    speeds: dict[str, list[float]] = {pattern: [] for pattern in PATTERNS}
    cycles = {}
    for _ in range(ROUNDS):
        for pattern, (program, example) in programs.items():
            done = nf.simulate(program, example, engine="verilator", check=False)
            speeds[pattern].append(done.cycles / done.wall_s)
            cycles[pattern] = done.cycles
    rows = tuple((pattern, cycles[pattern], statistics.median(found), min(found), max(found))
                 for pattern, found in speeds.items())
    return Table(f"Cycles per second of {ARCH}, one thread: one layer of BERT-base, {TOKENS} tokens",
                 ("pattern", "cycles", "median", "lowest", "highest"), rows, f"{ROUNDS} runs each.")


def _whole_model() -> Table:
    start = time.monotonic()
    program, example = _program(12, "2:4")
    compiled = time.monotonic()
    done = nf.simulate(program, example, engine="verilator", check=True)
    end = time.monotonic()
    if not done.bit_exact:
        raise RuntimeError(f"the simulation is not bit-exact: {done.mismatches[0]}")
    rows = (
        ("compile (quantise, lower, pack)", compiled - start), ("Verilator", done.wall_s),
        ("reference, ISA engine, comparison", done.check_s), ("simulate, all", end - compiled),
    )
    return Table(f"12 layers of BERT-base at 2:4, {TOKENS} tokens, {done.cycles:,} cycles, bit-exact", ("part", "seconds"), rows,
                 f"{done.bytes_checked:,} bytes compared. The simulator is built already.")


def run() -> list[Table]:
    """All tables."""
    return [_builds(), _cycles(), _whole_model()]
