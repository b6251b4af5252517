"""What several lengths in one program cost: BERT-base at 2:4 for 32, 64 and 128 tokens, beside a program for each length alone.

CPU time of one process; all of `nf.compile`, the cycle engine's choice of an order included.
"""

import resource
import time
import warnings
from typing import Any

import torch
from torch import nn

import nmforge as nf
from benchmarks import Table

__all__ = ["LENGTHS", "run"]

LENGTHS = (32, 64, 128)
ARCH = "sta1024"


def _tokens(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 1000, (1, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _compiled(model: nn.Module, inputs: Any, **options: Any) -> tuple[Any, float]:
    """The program, and CPU seconds."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = nf.compile(model, inputs, arch=ARCH, **options)
    return program, time.process_time() - start


def _cycles(program: Any) -> int:
    return int(nf.simulate(program, engine="cycle").cycles or 0)


def run() -> list[Table]:
    """A row a length, then the program of all."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    _compiled(nn.Linear(64, 64), torch.randn(32, 64))  # what is imported, and built, at the first use
    model = nf.create_model("bert_base")
    nf.sparsify(model, "2:4", method="magnitude")
    nf.finalize(model)
    batches = [_tokens(length) for length in LENGTHS]
    both = {name: {1: LENGTHS} for name in batches[0]}
    dynamic, seconds = _compiled(model, batches[-1], calibration=batches, dynamic=both)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sizes, whole = dynamic.report().variants, len(dynamic.to_bytes())
    rows: list[tuple[str | int | float | None, ...]] = []
    for batch, length, row in zip(batches, LENGTHS, sizes, strict=True):
        alone, alone_s = _compiled(model, batch, calibration=[batch])
        rows.append((
            f"n = {length}", row.code_bytes, _cycles(dynamic.for_inputs(batch)), _cycles(alone), len(alone.to_bytes()),
            round(alone_s, 1),
        ))  # fmt: skip
        del alone
    rows.append(("all in one", sum(row.code_bytes for row in sizes), None, None, whole, round(seconds, 1)))
    columns = ("BERT-base, 2:4, batch 1", "code bytes", "cycles in all in one", "cycles alone", "file bytes", "CPU seconds")
    note = f"{ARCH}, random weights, token numbers in; torch with one thread. Most memory, all compiled: {peak:.2f} GiB."
    return [Table("Several lengths in one program", columns, tuple(rows), note)]
