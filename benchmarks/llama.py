"""LLaMA-7B with adapter, layer by layer: cycles of a prompt and of a step, by the cycle engine.

One layer is in memory at a time, with random weights of the wanted pattern: what is stored and how long it takes does not
depend on their values. Layers of one kind have one program. The array is that of sta1024, with a row unit and partial sums for
4096 columns.
"""

from __future__ import annotations

import gc
import resource
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from algo.sparsify import finalize, sparsify
from benchmarks import Table
from compiler.compile import compile_model
from compiler.program import Program
from hw.arch import PRESETS
from models.llama import CONFIGS, Llama, LlamaConfig
from models.llama_adapter import AdapterConfig, LlamaAdapter
from nmforge.generation import FlatStep, Prefill, Step
from sim.simulate import simulate

__all__ = ["ARCH", "LENGTH", "PATTERNS", "PLACES", "layer_of", "layer_program", "run"]

ARCH = replace(PRESETS["sta1024"], name="sta1024_4096", row_depth=4096, psum_depth=4096)
LENGTH, PLACES = 128, 256
PATTERNS = ("dense", "2:4")
CONFIG = replace(CONFIGS["llama_7b"], layers=1, vocabulary=32)
LAYERS = {"plain": 2, "with prompt": 30}
"""How many layers of each kind the adapter's paper has."""


def layer_of(
    kind: str, pattern: str, *, step: bool, config: LlamaConfig = CONFIG
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A layer and its inputs for a prompt, or for one token with a cache."""
    torch.manual_seed(0)
    model: Llama | LlamaAdapter = Llama(config)
    if pattern != "dense":
        sparsify(model.layers, pattern, method="magnitude")
        finalize(model.layers)
    if kind == "with prompt":
        model = LlamaAdapter(model, AdapterConfig(length=10, layers=1))
        nn.init.normal_(model.gates[0])
    inner = config.hidden // config.groups
    if step:
        module: nn.Module = FlatStep(Step(model, head=False)).eval()
        turn = module.step.angles(torch.tensor([LENGTH]))  # type: ignore[union-attr,operator]
        place = (torch.arange(PLACES) == LENGTH).float()[None, :, None]
        keep = (torch.arange(PLACES) <= LENGTH)[None]
        cache = [torch.randn(1, PLACES, inner) * keep[..., None] for _ in range(2)]
        return module, (torch.randn(1, 1, config.hidden), *turn, place, keep, *cache)
    return Prefill(model, LENGTH, head=False).eval(), (torch.randn(1, LENGTH, config.hidden),)


def layer_program(kind: str, pattern: str, *, step: bool) -> Program:
    """The program of such a layer."""
    module, inputs = layer_of(kind, pattern, step=step)
    return _whole(compile_model(module, inputs, arch=ARCH, calibration=[inputs], host="forbid", order="operator"))


def _head(rows: int) -> Program:
    """The logits of some tokens, dense in all patterns."""
    hidden = CONFIG.hidden
    module = nn.Linear(hidden, CONFIGS["llama_7b"].vocabulary, bias=False).eval()
    x = (torch.randn(1, rows, hidden),)
    return _whole(compile_model(module, x, arch=ARCH, calibration=[x], host="forbid", order="operator"))


def _whole(program: object) -> Program:
    if not isinstance(program, Program):
        raise TypeError(f"a layer must be one program, not a {type(program).__name__}")
    return program


def run() -> list[Table]:
    """Cycles of layers and of the whole, for each pattern."""
    rows: list[tuple[str | int | float | None, ...]] = []
    head, _, _ = _measured(_head(1))
    for pattern in PATTERNS:
        for step in (False, True):
            start, found = time.monotonic(), {kind: _measured(layer_program(kind, pattern, step=step)) for kind in LAYERS}
            total = head + sum(count * found[kind][0] for kind, count in LAYERS.items())
            cycles, utilisation, size = found["with prompt"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            phase = f"step, {PLACES} places" if step else f"prompt of {LENGTH}"
            rows.append((
                pattern, phase, cycles, utilisation, size, total, total / ARCH.clock_mhz / 1e3, time.monotonic() - start, peak,
            ))  # fmt: skip
            print(rows[-1], flush=True)
    columns = ("weights", "phase", "cycles of a layer", "utilisation", "bytes of its program", "cycles, 32 layers and head",
               "ms at 200 MHz", "seconds to compile and count", "peak GiB")
    note = f"{ARCH.name}: sta1024 with row_depth = psum_depth = 4096; the head, dense, for one token: {head:,} cycles"
    return [Table("LLaMA-7B with adapter", columns, tuple(rows), note)]


def _measured(program: Program) -> tuple[int, float, int]:
    run = simulate(program, engine="cycle")
    result = int(run.cycles or 0), float(run.utilisation or 0), program.memory_bytes
    del program, run
    gc.collect()
    return result
