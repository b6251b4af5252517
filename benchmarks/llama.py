"""LLaMA-7B with adapter, layer by layer: cycles of a prompt and of a step, by the cycle engine.

One layer is in memory at a time, with random weights of the wanted pattern: what is stored and how long it takes does not
depend on their values. Layers of one kind have one program. The array is that of sta1024, with a row unit and partial sums for
4096 columns.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from algo.checkpoint import write_json
from algo.sparsify import finalize, sparsify
from benchmarks import DOCS, RESULTS, Table, environment, write_page
from compiler.compile import compile_model
from compiler.program import Program
from hw.arch import PRESETS
from models.llama import CONFIGS, Llama
from models.llama_adapter import AdapterConfig, LlamaAdapter
from nmforge.generation import FlatStep, Prefill, Step
from sim.simulate import simulate

__all__ = ["ARCH", "LENGTH", "PATTERNS", "PLACES", "compile_all", "layer_of", "run"]

ARCH = replace(PRESETS["sta1024"], name="sta1024_4096", row_depth=4096, psum_depth=4096)
WHOLE = RESULTS / "llama_whole.json"
LENGTH, PLACES = 128, 256
PATTERNS = ("dense", "2:4")
CONFIG = replace(CONFIGS["llama_7b"], layers=1, vocabulary=32)
LAYERS = {"plain": 2, "with prompt": 30}
"""How many layers of each kind the adapter's paper has."""


def layer_of(kind: str, pattern: str, *, step: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A layer and its inputs for a prompt, or for one token with a cache."""
    torch.manual_seed(0)
    model: Llama | LlamaAdapter = Llama(CONFIG)
    if pattern != "dense":
        sparsify(model.layers, pattern, method="magnitude")
        finalize(model.layers)
    if kind == "with prompt":
        model = LlamaAdapter(model, AdapterConfig(length=10, layers=1))
        nn.init.normal_(model.gates[0])
    inner = CONFIG.hidden // CONFIG.groups
    if step:
        module: nn.Module = FlatStep(Step(model, head=False)).eval()
        turn = module.step.angles(torch.tensor([LENGTH]))  # type: ignore[union-attr,operator]
        place = (torch.arange(PLACES) == LENGTH).float()[None, :, None]
        keep = (torch.arange(PLACES) <= LENGTH)[None]
        cache = [torch.randn(1, PLACES, inner) * keep[..., None] for _ in range(2)]
        return module, (torch.randn(1, 1, CONFIG.hidden), *turn, place, keep, *cache)
    return Prefill(model, LENGTH, head=False).eval(), (torch.randn(1, LENGTH, CONFIG.hidden),)


def _head(rows: int) -> Program:
    """The logits of some tokens, dense in all patterns."""
    hidden = CONFIG.hidden
    module = nn.Linear(hidden, CONFIGS["llama_7b"].vocabulary, bias=False).eval()
    x = (torch.randn(1, rows, hidden),)
    return _compiled(module, x)


def _whole(program: object) -> Program:
    if not isinstance(program, Program):
        raise TypeError(f"a layer must be one program, not a {type(program).__name__}")
    return program


def run() -> list[Table]:
    """Cycles of layers and of the whole, for each pattern, and what compiling all layers takes; also on their page."""
    torch.set_num_threads(1)
    rows: list[tuple[str | int | float | None, ...]] = []
    head, _, _ = _measured(_head(1))
    for pattern in PATTERNS:
        for step in (False, True):
            found, seconds = {}, {}
            for kind in LAYERS:
                module, inputs = layer_of(kind, pattern, step=step)
                start = time.process_time()
                program = _compiled(module, inputs)
                seconds[kind] = time.process_time() - start
                del module
                found[kind] = _measured(program)
            total = head + sum(count * found[kind][0] for kind, count in LAYERS.items())
            cycles, utilisation, size = found["with prompt"]
            phase = f"step, {PLACES} places" if step else f"prompt of {LENGTH}"
            rows.append((
                pattern, phase, cycles, utilisation, size, total, total / ARCH.clock_mhz / 1e3, round(seconds["with prompt"], 1),
                _peak(),
            ))  # fmt: skip
            print(rows[-1], flush=True)
    columns = ("weights", "phase", "cycles of a layer", "utilisation", "bytes of its program", "cycles, 32 layers and head",
               "ms at 200 MHz", "CPU s to compile it", "peak GiB")
    note = f"{ARCH.name}: sta1024 with row_depth = psum_depth = 4096; the head, dense, for one token: {head:,} cycles."
    tables = [Table("LLaMA-7B with adapter", columns, tuple(rows), note), *([_whole_table()] if WHOLE.is_file() else [])]
    write_page(DOCS / "compiler.md", "llama", tables)
    return tables


def compile_all(pattern: str) -> None:
    """Compile the prompt's programs of all 32 layers one after the other; kept in `WHOLE`, goes on where it was stopped.

    Each layer has weights of its own: making and pruning new ones takes longer than compiling, so they are those of the layer
    before with the output channels of every matrix moved on by one.
    """
    torch.set_num_threads(1)
    kept = json.loads(WHOLE.read_text()) if WHOLE.is_file() else {}
    seconds, size = (kept["cpu_seconds"], kept["bytes"]) if kept.get("pattern") == pattern else ([], 0)
    kinds = [kind for kind, count in LAYERS.items() for _ in range(count)]
    made: tuple[nn.Module, tuple[Tensor, ...]] | None = None
    for number in range(len(seconds), len(kinds)):
        if made is None or kinds[number] != kinds[number - 1]:
            made = layer_of(kinds[number], pattern, step=False)
        module, inputs = made
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_(weight.roll(1, 0))
        start = time.process_time()
        size += _compiled(module, inputs).memory_bytes
        seconds.append(round(time.process_time() - start, 2))
        gc.collect()
        print(f"layer {number + 1} of {len(kinds)}: {seconds[-1]} CPU s", flush=True)
        write_json(WHOLE, {"pattern": pattern, "layers": number + 1, "cpu_seconds": seconds, "bytes": size,
                           "peak_gib": round(_peak(), 2), "environment": environment()})  # fmt: skip


def _whole_table() -> Table:
    found = json.loads(WHOLE.read_text())
    row = (found["pattern"], found["layers"], found["bytes"], round(sum(found["cpu_seconds"]) / 60, 1), found["peak_gib"])
    return Table("All layers compiled", ("weights", "layers", "bytes of the programs", "CPU min to compile", "peak GiB"), (row,),
                 f"For a prompt of {LENGTH}, every layer with weights of its own (`python -m benchmarks.llama --all 2:4`). "
                 "CPU time of one process with one thread, making and pruning the weights left out.")  # fmt: skip


def _compiled(module: nn.Module, inputs: tuple[Tensor, ...]) -> Program:
    return _whole(compile_model(module, inputs, arch=ARCH, calibration=[inputs], host="forbid", order="operator"))


def _measured(program: Program) -> tuple[int, float, int]:
    run = simulate(program, engine="cycle")
    result = int(run.cycles or 0), float(run.utilisation or 0), program.memory_bytes
    del program, run
    gc.collect()
    return result


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama", description=__doc__)
    parser.add_argument("--all", metavar="N:M", required=True, help="compile all layers with this pattern, and time that")
    compile_all(parser.parse_args().all)
