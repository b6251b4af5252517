"""What N:M costs on the CPU: a training step of a BERT-base layer, sparse against dense in turns, and packing BERT-base."""

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from algo.compress import pack, unpack
from algo.mask import magnitude_mask
from algo.nm import NM
from algo.sparsify import Method, advance, sparsify
from benchmarks import DOCS, Table, write_page
from models.registry import create_model

__all__ = ["run"]

TURNS = 9
STEPS: tuple[tuple[str, Method], ...] = (("2:4", "sr-ste"), ("1:4", "sr-ste"), ("2:8", "sr-ste"), ("1:8", "sr-ste"),
                                         ("1:16", "sr-ste"), ("2:4", "s-ste"), ("2:4", "fixed"), ("2:4", "gradual"))
PACKED = ("2:4", "2:8", "1:8", "8:16", "8:32")


def run() -> list[Table]:
    """Both tables, on the page too."""
    tables = [_steps(), _packing()]
    write_page(DOCS / "sparse-training.md", "sparse_cost", tables)
    return tables


def _steps() -> Table:
    torch.manual_seed(0)
    bert = create_model("bert_base", layers=1).train()
    x, mask = torch.randint(1000, 2000, (8, 128)), torch.ones(8, 128, dtype=torch.int64)
    dense, rows = _stepper(bert, x, mask), []
    for pattern, method in STEPS:
        model = copy.deepcopy(bert)
        sparsify(model, {"encoder.*": pattern}, method=method)
        advance(model, 1, 2)
        sparse = _stepper(model, x, mask)
        pairs = [(_seconds(dense), _seconds(sparse)) for _ in range(TURNS + 1)][1:]
        ratio = median(b / a for a, b in pairs)
        rows.append((method, pattern, 1000 * median(a for a, _ in pairs), 1000 * median(b for _, b in pairs), ratio))
    return Table("A training step of one BERT-base layer, 8 x 128 tokens, AdamW, CPU",
                 ("method", "pattern", "dense, ms", "sparse, ms", "ratio"), tuple(rows),
                 f"Embeddings are in the step, frozen. Medians of {TURNS} turns, dense and sparse one after the other; "
                 f"{torch.get_num_threads()} threads.")


def _stepper(model: nn.Module, x: Tensor, mask: Tensor) -> Callable[[], None]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("encoder" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(x, mask).square().mean().backward()
        optimizer.step()

    return step


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _packing() -> Table:
    """All linear weights of BERT-base, float32, as `algo.compressed` packs them: 12 layers of the same shapes."""
    torch.manual_seed(0)
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    rows = []
    for pattern in PACKED:
        nm = NM(pattern)
        weights = [torch.randn(shape) for shape in shapes]
        matrices = [(w * magnitude_mask(w, nm)).numpy() for w in weights]
        for format in ("index", "bitmap", "rank"):
            packed = [pack(m, nm, format) for m in matrices]  # type: ignore[arg-type]
            times = [12 * median(_seconds(work) for _ in range(3)) for work in (
                lambda: [pack(m, nm, format) for m in matrices],  # type: ignore[arg-type]  # noqa: B023
                lambda: [unpack(p) for p in packed])]  # noqa: B023
            share = sum(p.nbytes for p in packed) / sum(m.nbytes for m in matrices)
            rows.append((pattern, format, *times, share))
    return Table("Packing the 85 M weights of BERT-base's 12 layers, float32, one process",
                 ("pattern", "format", "pack, s", "unpack, s", "bytes, of dense"), tuple(rows),
                 "One layer is timed (median of 3) and counted 12 times.")
