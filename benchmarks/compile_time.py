"""Compile time against the size of the network: BERT of 1 to 12 layers, ResNet-18 of more and more pixels.

CPU time of one process, so that what else the machine does does not count; all of `nf.compile`, the cycle engine's choice of an
order included.
"""

import resource
import time
import warnings
from typing import Any

import torch
from torch import nn

import nmforge as nf
from benchmarks import DOCS, Table, write_page
from sim.plots import against

__all__ = ["LAYERS", "PIXELS", "run"]

LAYERS = (1, 2, 4, 8, 12)
PIXELS = (32, 64, 96, 128)


def _bert(layers: int) -> tuple[nn.Module, Any]:
    ids = torch.randint(1, 1000, (1, 128))
    return nf.create_model("bert_base", layers=layers), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _resnet(pixels: int) -> tuple[nn.Module, Any]:
    return nf.create_model("resnet18"), torch.randn(1, 3, pixels, pixels)


def _point(model: nn.Module, inputs: Any) -> tuple[int, int, float]:
    """MACs, instructions and CPU seconds."""
    nf.sparsify(model, "2:4", method="magnitude")
    nf.finalize(model)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = nf.compile(model, inputs, arch="sta1024", calibration=[inputs])
    return program.macs, program.instruction_count, time.process_time() - start


def run() -> list[Table]:
    """One row a network, and a picture in docs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    _point(nn.Linear(64, 64), torch.randn(32, 64))  # what is imported, and built, at the first use
    rows, lines = [], {}
    for name, make, sizes in (("BERT-base, layers", _bert, LAYERS), ("ResNet-18, pixels a side", _resnet, PIXELS)):
        for size in sizes:
            macs, count, seconds = _point(*make(size))
            rows.append((name, size, macs, count, round(seconds, 1), seconds / count * 1e3))
            lines.setdefault(name.split(",")[0], []).append((count, seconds))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (DOCS / "compile-time.png").write_bytes(against(lines, x="instructions", y="CPU seconds"))
    found = [Table(
        "Compile time on sta1024", ("network", "size", "MACs", "instructions", "CPU seconds", "ms an instruction"), tuple(rows),
        f"2:4, random weights; torch with one thread. Most memory of the process: {peak:.2f} GiB.",
    )]  # fmt: skip
    write_page(DOCS / "compiler.md", "compile_time", found)
    return found
