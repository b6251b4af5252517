"""Every kind of network through all engines: RTL = ISA engine = integer reference, byte for byte, and cycle engine = RTL.

``python -m benchmarks.must_run [ROW ...] [--minutes M] [--fresh | --page]``: each row is measured in a process of its own and
kept in its own file, those of the co-design table (`nmforge.zoo`) beside its other measurements, the others in
``benchmarks/results/must_run/``. What is there is not measured again, with ``--fresh`` what was measured of other sources is.
``python -m benchmarks must_run`` measures what is missing and writes the table of docs/bit-exact.md.

Weights are random, pruned by magnitude. Networks are of their real sizes and run whole, from the first byte to the last; of
LLaMA-7B one layer does. How near results are to the float network's stands beside what the float network itself makes of noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from algo.checkpoint import write_json
from algo.sparsify import finalize, sparsify
from benchmarks import DOCS, RESULTS, Table, environment, write_page
from benchmarks.llama import ARCH as WIDE
from benchmarks.llama import layer_of
from models import create_model
from nmforge.agreement import float_agreement
from nmforge.generation import Generator
from nmforge.zoo import (
    DENSE,
    TRANSFORMER,
    ZOO,
    inputs_of,
    measure,
    measure_network,
    pattern_label,
    peak_bytes,
    point_file,
    sources,
)
from sim.simulate import simulate

__all__ = ["ROWS", "Row", "run", "run_missing"]

ARCH = "sta1024"
TOKENS, PROMPT, STEPS = 128, 32, 16
"""Tokens of the text networks, of the prompt that the small LLaMA continues, and by how many steps."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network with one pattern. ``file``: where its measurement is kept; ``measure`` makes it, JSON values."""

    label: str
    pattern: str
    subject: str
    file: Path
    measure: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        """By which it is chosen."""
        return self.file.stem.removesuffix("-rtl")

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """The measurement, if it is there and of a run like today's."""
        if not self.file.is_file():
            return None
        found = json.loads(self.file.read_text())
        return found if "error" in found or "cosine" in found else None


def _of_table(model: str, *patterns: str) -> Iterable[Row]:
    """A network of the co-design table."""
    system = ZOO[model]
    shape = inputs_of(system)[0].shape
    subject = f"{shape[2]} x {shape[3]}" if len(shape) == 4 else f"n = {shape[1]}"
    for pattern in patterns:
        yield Row(
            label=system.label, pattern=pattern, subject=subject, file=point_file(RESULTS / "zoo", model, pattern, rtl=True),
            measure=lambda pattern=pattern: measure(system, pattern, ARCH, rtl=True),
        )  # fmt: skip


def _library(label: str, name: str, subject: str, make: Callable[[], tuple[nn.Module, Any]]) -> Row:
    """A class of a library, as it comes."""

    def found() -> dict[str, Any]:
        torch.manual_seed(0)
        module, inputs = make()
        return measure_network(module.eval(), inputs, ARCH, rtl=True)

    return Row(label=label, pattern=DENSE, subject=subject, file=_kept(name, DENSE), measure=found)


def _kept(name: str, pattern: str) -> Path:
    return point_file(RESULTS / "must_run", name, pattern)


def _ids() -> torch.Tensor:
    return torch.randint(1, 1000, (1, TOKENS))


def _encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(512, 8, batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), torch.randn(1, TOKENS, 512)


def _transformers(name: str, label: str, subject: str = f"n = {TOKENS}") -> Iterable[Row]:
    """A class of transformers and its configuration's defaults: with one layer, and with all."""
    for layers in (1, None):
        file, title = f"transformers_{name.lower()}", f"transformers {label}"
        yield _library(title + ", one layer", f"{file}_layer", subject, _class(name, layers)) if layers else _library(
            title, file, subject, _class(name, layers)
        )


def _class(name: str, layers: int | None) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        import transformers

        config = getattr(transformers, f"{name}Config")(**({"use_cache": False} if name == "GPT2" else {}))
        if layers is not None:
            config.num_hidden_layers = layers
        module = getattr(transformers, name + {"GPT2": "LMHeadModel", "ViT": "ForImageClassification"}.get(name, "Model"))(config)
        if name == "ViT":
            return module, {"pixel_values": torch.randn(1, 3, 224, 224)}
        ids = _ids()
        return module, {"input_ids": ids} | ({} if name == "GPT2" else {"attention_mask": torch.ones_like(ids)})

    return make


def _layer(pattern: str, *, step: bool) -> Row:
    """A layer of LLaMA-7B with adapter."""

    def found() -> dict[str, Any]:
        module, inputs = layer_of("with prompt", pattern, step=step)
        return measure_network(module, inputs, WIDE, rtl=True, order="operator")

    name, subject = ("step", "one token, 256 places") if step else ("prompt", "128 tokens")
    return Row(label="LLaMA-7B + Adapter, one layer", pattern=pattern, subject=subject, file=_kept(f"llama_7b_{name}", pattern),
               measure=found)  # fmt: skip


def _generation(pattern: str) -> Row:
    """The small LLaMA with adapter continues a prompt on the RTL."""
    return Row(label="LLaMA + Adapter, small", pattern=pattern, subject=f"prompt of {PROMPT}, {STEPS} steps",
               file=_kept("llama_adapter_small_generation", pattern), measure=lambda: _generate(pattern))


def _generate(pattern: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = create_model("llama_adapter_small").eval()
    with torch.no_grad():  # as large as after training; those of the first step make attention that attends to nothing
        for weight in model.base.parameters():
            if weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
        for gate in model.gates:
            gate.normal_()
    if pattern != DENSE:
        sparsify(model.base.layers, pattern, method="magnitude")
        finalize(model.base.layers)
    prompts = torch.randint(0, model.base.config.vocabulary, (5, PROMPT)).tolist()
    start = time.process_time()
    generator = Generator(model, length=PROMPT, places=PROMPT + STEPS, calibration=prompts[1:], arch=ARCH)
    seconds = time.process_time() - start
    found = generator.generate(prompts[0], new_tokens=STEPS + 1, engine="verilator")
    expected = generator.generate(prompts[0], new_tokens=STEPS + 1, engine="reference")
    parts = generator.prefill, generator.step
    cycles = [simulate(part, engine="cycle").cycles for part in parts]
    embedded = generator.embed(prompts[0])
    outputs = simulate(generator.prefill, embedded, engine="reference").outputs
    return {
        "sources": sources(), "arch": ARCH, "pattern": pattern, "programs": 2, "host_share": 0.0,
        "macs": {"accelerator": sum(part.macs * times for part, times in zip(parts, (1, STEPS)))},
        "compile_cpu_s": round(seconds, 1), "peak_rss_bytes": peak_bytes(), "cycles": sum(map(int, found.cycles)),
        "bit_exact": found.bit_exact, "bytes_checked": found.bytes_checked, "tokens": found.tokens,
        "results_equal": found.tokens == expected.tokens,
        "counters_equal": found.cycles == [cycles[0], *[cycles[1]] * STEPS],
        **float_agreement(generator.prefill_module, embedded, outputs),
    }  # fmt: skip


_LIBRARIES = tuple(zip(
    _transformers("DistilBert", "DistilBertModel"), _transformers("Bert", "BertModel"),
    _transformers("ViT", "ViTForImageClassification", "224 x 224"), _transformers("GPT2", "GPT2LMHeadModel"), strict=True,
))  # fmt: skip

ROWS: tuple[Row, ...] = (
    *_of_table("resnet18", DENSE, "2:4"), *_of_table("regnet_x_400mf", "2:4"), *_of_table("odconv_resnet18_4x", DENSE, "2:4"),
    *_of_table("mobilenet_v2", DENSE, "2:4"), *_of_table("minilm_l6", DENSE, "2:4"), *_of_table("deit_tiny", DENSE, "2:4"),
    _generation(DENSE), _generation("2:4"), *_of_table("bert_base", "1:8", TRANSFORMER), *_of_table("dgnet_resnet50", "2:4"),
    _library("nn.TransformerEncoder", "torch_encoder", "6 layers of 512, n = 128", _encoder),
    *_of_table("ceit_tiny", DENSE, "2:4"), *_of_table("swin_tiny", "2:4"), *_LIBRARIES[0], *_of_table("group_rcnn_r50", "2:4"),
    *_of_table("deformable_detr_r50", "2:4"), *_of_table("bert_base", "2:4"), _layer("2:4", step=True),
    *_of_table("pft_r50", "2:4"), _layer("2:4", step=False), *_LIBRARIES[1],
)  # fmt: skip
"""Cheapest first."""


def run_missing(rows: Iterable[Row], *, minutes: float = float("inf"), fresh: bool = False) -> None:
    """Measure the rows that are not there, each in its own process, as long as time is left."""
    end = time.monotonic() + 60 * minutes
    for row in rows:
        kept = row.result
        if kept is None or "error" in kept or (fresh and kept["sources"] != sources()):
            if time.monotonic() > end:
                break
            print(f"{row.name} ...", flush=True)
            subprocess.run([sys.executable, "-m", "benchmarks.must_run", "--here", row.name], check=True)


def _measure_here(row: Row) -> None:
    """In this process; a network that fails says so in its file and costs no other."""
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        found = row.measure()
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        found = {"sources": sources(), "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    found |= {"seconds": round(time.monotonic() - start, 1), "environment": environment()}
    row.file.parent.mkdir(parents=True, exist_ok=True)
    write_json(row.file, found)
    print({name: value for name, value in found.items() if name != "environment"}, flush=True)


def run() -> list[Table]:
    """Measure what is missing; the table, also on its page."""
    run_missing(ROWS)
    return write_tables()


def write_tables() -> list[Table]:
    """The table of the rows that are there, on its page."""
    found = [_table()]
    write_page(DOCS / "bit-exact.md", "must_run", found)
    return found


def _table() -> Table:
    columns = ("network", "input", "weights", "M MACs", "programs", "MACs on the host (%)", "cycles", "cycle engine = RTL",
               "bytes compared", "RTL = ISA = reference", "cosine to float", "of float with noise")
    there = [row for row in ROWS if row.result is not None]
    earlier = sum((row.result or {})["sources"] != sources() for row in there)
    note = f"{earlier} rows are of earlier sources of compiler or accelerator: `--fresh` measures them again." if earlier else ""
    return Table("Networks through all engines", columns, tuple(map(_cells, there)), note)


def _cells(row: Row) -> tuple[str | int | float | None, ...]:
    found, pattern = row.result or {}, pattern_label(row.pattern)
    if "error" in found:
        return (row.label, row.subject, pattern, *(None,) * 5, None, f"fails: {found['error'][:80]}", None, None)
    return (
        row.label, row.subject, pattern, round(found["macs"]["accelerator"] / 1e6), found["programs"],
        f"{100 * found['host_share']:.1f}", found["cycles"], _word(found["counters_equal"]), found["bytes_checked"],
        _word(found["bit_exact"] and found["results_equal"]), f"{found['cosine']:.4f}", f"{found['cosine_noisy']:.4f}",
    )  # fmt: skip


def _word(equal: bool) -> str:
    return "equal" if equal else "DIFFERENT"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rows without the page."""
    rows = {row.name: row for row in ROWS}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.must_run", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(rows)}")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start none later than that")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured of other sources")
    parser.add_argument("--here", action="store_true", help="measure the rows in this process, whatever is there")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page of what is there")
    given = parser.parse_args(arguments)
    if given.page:
        write_tables()
        return 0
    for name in given.rows:
        if name not in rows:
            parser.error(f"unknown row {name!r}; the rows are {', '.join(rows)}")
    chosen = [rows[name] for name in given.rows] or list(ROWS)
    if given.here:
        for row in chosen:
            _measure_here(row)
        os._exit(0)  # taking a large network's objects apart at the end takes as long as compiling it
    else:
        run_missing(chosen, minutes=given.minutes, fresh=given.fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
