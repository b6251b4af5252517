"""The same layer elsewhere: PyTorch on this CPU, and SCALE-Sim on the same matrix products."""

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks import DOCS, Table, write_page
from benchmarks.workloads import WORKLOADS, build, compile_workload
from hw.arch import get_arch
from hw.verilog import cache_dir
from sim.cycle import run_cycles

__all__ = ["gemms", "run", "systolic_cycles"]

PRESET, ROUNDS = "sta1024", 15
SCALE_SIM = "scalesim==3.0.0"
"""Needs numpy < 2, so it gets an environment of its own."""

_CONFIG = """[general]
run_name = nmforge
[architecture_presets]
ArrayHeight: {rows}
ArrayWidth: {lanes}
IfmapSramSzkB: 1024
FilterSramSzkB: 1024
OfmapSramSzkB: 256
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Bandwidth : {bus}
Dataflow : os
MemoryBanks: 1
ReadRequestBuffer: 32
WriteRequestBuffer: 32
[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport : false
SparseRep : ellpack_block
OptimizedMapping : false
BlockSize : 8
RandomNumberGeneratorSeed : 40
[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""


def run() -> list[Table]:
    """Time on the CPU, and cycles of a systolic array."""
    tables = [_cpu(), _scale_sim()]
    write_page(DOCS / "performance.md", "comparison", tables)
    return tables


def _cpu() -> Table:
    model, inputs = build(WORKLOADS["bert-128"])
    int8 = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    rows, clock = [], get_arch(PRESET).clock_mhz
    with torch.no_grad():
        for threads in (1, torch.get_num_threads()):
            torch.set_num_threads(threads)
            for name, network in (("float32", model), ("int8, dynamic", int8)):
                rows.append((f"PyTorch {torch.__version__}, {name}, {threads} threads", _milliseconds(network, inputs), None))
    for pattern in (None, "2:4", "2:8", "1:8"):
        cycles = run_cycles(compile_workload(WORKLOADS["bert-128"], pattern, PRESET)[0]).cycles
        rows.append((f"{PRESET} at {clock} MHz (assumed), {pattern or 'dense'}", cycles / clock / 1000, cycles))
    return Table("One layer of BERT-base, 128 tokens", ("on", "ms", "cycles"), tuple(rows), f"CPU: median of {ROUNDS} runs.")


def _milliseconds(network: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        network(**inputs)
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def gemms() -> dict[str, tuple[int, int, int, int]]:
    """Matrix products of the layer: how often, rows, columns, reduction."""
    w = WORKLOADS["bert-128"]
    head = w.hidden // w.heads
    return {"projections": (4, w.length, w.hidden, w.hidden), "scores": (w.heads, w.length, w.length, head),
            "values": (w.heads, w.length, head, w.length), "up": (1, w.length, w.intermediate, w.hidden),
            "down": (1, w.length, w.hidden, w.intermediate)}


def systolic_cycles(rows: int, cols: int, k: int, side: int) -> int:
    """Cycles of an output-stationary systolic array that fills and drains for every fold: what SCALE-Sim counts."""
    return -(-rows // side) * -(-cols // side) * (k + 2 * side - 2)


def _scale_sim() -> Table:
    arch, counted = get_arch(PRESET), {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "array.cfg").write_text(_CONFIG.format(rows=arch.rows, lanes=arch.lanes, bus=arch.bus_bytes))
        lines = ["Layer, M, N, K,", *(f"{layer},{m},{n},{k}," for layer, (_, m, n, k) in gemms().items())]
        (work / "gemm.csv").write_text("\n".join(lines) + "\n")
        options = ("-c", "array.cfg", "-t", "gemm.csv", "-l", "gemm.csv", "-i", "gemm", "-p", "out")
        subprocess.run([str(_environment()), "-m", "scalesim.scale", *options], cwd=work, check=True, capture_output=True)
        with next((work / "out").rglob("COMPUTE_REPORT.csv")).open() as file:
            for row, layer in zip(csv.DictReader(file, skipinitialspace=True), gemms(), strict=True):
                name = next(key for key in row if "Total Cycles" in key and "prefetch" not in key)
                counted[layer] = int(float(row[name]))
    rows = [(layer, count, cycles, count * cycles, count * m * n * k / arch.macs / (count * cycles))
            for (layer, (count, m, n, k)), cycles in zip(gemms().items(), counted.values(), strict=True)]
    total = sum(row[3] for row in rows)
    ideal = sum(count * m * n * k for count, m, n, k in gemms().values()) / arch.macs
    ours = run_cycles(compile_workload(WORKLOADS["bert-128"], None, PRESET)[0]).cycles
    rows += [("all products, SCALE-Sim", None, None, total, ideal / total),
             ("whole layer, nmforge", None, None, ours, ideal / ours)]
    names = ("product", "count", "cycles of one", "cycles", "utilisation")
    return Table(f"SCALE-Sim 3.0, {arch.rows} x {arch.lanes}, output stationary, dense", names, tuple(rows),
                 "SCALE-Sim counts matrix products alone; nmforge's figure has softmax, norms, GELU and all traffic in it.")


def _environment() -> Path:
    """Python of an environment that has SCALE-Sim, made if it is new."""
    python = cache_dir() / "scale-sim" / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "numpy<2", SCALE_SIM], check=True)
    return python
