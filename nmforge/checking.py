"""What `nmforge verify` does: check the weights of any checkpoint against N:M patterns."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors import SafetensorError, safe_open

from algo.compressed import read_compressed
from algo.layers import HEADS
from algo.nm import NM
from algo.verify import WeightCheck, check_weights, read_weights
from nmforge.arguments import parse_table
from nmforge.console import out
from nmforge.errors import BadInputError

__all__ = ["check", "print_check"]

DENSE = ("*embed*", *(f"{glob}.weight" for glob in HEADS))
"""Weights that one pattern for all leaves out."""


def check(path: Path, pattern: str | None) -> dict[str, Any]:
    """Check a checkpoint; JSON values.

    Parameters
    ----------
    path
        What `algo.verify.read_weights` reads, a folder of nmforge, or a compressed checkpoint.
    pattern
        ``"2:4"`` or ``"*.up.*=1:8,*=dense"``, globs of weight names; None: what the checkpoint itself says.

    Raises
    ------
    BadInputError
        No patterns given or recorded, or none matches.
    FileNotFoundError, ValueError
        The checkpoint cannot be read.
    """
    weights, recorded = _read(path)
    if pattern is None:
        if not recorded:
            raise BadInputError(f"{path} does not say which patterns its weights have: give --pattern, such as 2:4")
        table = recorded
    else:
        table = parse_table(pattern)
        if list(table) == ["*"]:
            table = dict.fromkeys((g for g in DENSE if any(fnmatchcase(name, g) for name in weights)), NM("dense")) | table
    rows = check_weights(weights, table, str(path))
    broken = sum(row.broken for row in rows)
    if not rows:
        raise BadInputError(f"no weight in {path} is checked: {pattern or 'its patterns'} leave all dense")
    return {"path": str(path), "ok": broken == 0, "violations": broken, "weights": [_row(row) for row in rows]}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, NM]]:
    """Weights by name, and the patterns that the checkpoint records for them."""
    file = path if path.suffix == ".safetensors" else None
    if file is not None and file.is_file() and _is_compressed(file):
        state, patterns, _ = read_compressed(file)
        return state, patterns
    weights = read_weights(path)
    described = path / "model.json" if path.is_dir() else path.with_name("model.json")
    if path.name != "model.safetensors" and not path.is_dir() or not described.is_file():
        return weights, {}
    layers = json.loads(described.read_text()).get("patterns", {})
    names = {name: NM(nm) for layer, nm in layers.items() for name in weights
             if name.startswith(f"{layer}." if layer else "") and name.rpartition(".")[0] == layer and weights[name].ndim > 1}
    return weights, names


def _is_compressed(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return '"compressed"' in (opened.metadata() or {}).get("nmforge", "")
    except SafetensorError:
        return False  # the reader says what is wrong


def _row(row: WeightCheck) -> dict[str, Any]:
    first = dict(zip(("row", "group", "nonzeros"), row.first, strict=True)) if row.first else None
    return {"name": row.name, "shape": list(row.shape), "pattern": str(row.pattern), "groups": row.groups,
            "violations": row.broken, "density": round(row.density, 6), "first": first}


def print_check(result: dict[str, Any]) -> None:
    """The same for people: each weight, where its first violation is, and a verdict."""
    table = Table("weight", "shape", "pattern", "non-zeros", "groups", "violations", "first", title_justify="left")
    for row in result["weights"]:
        first = row["first"]
        where = f"row {first['row']}, group {first['group']}: {first['nonzeros']}" if first else ""
        table.add_row(row["name"], " x ".join(map(str, row["shape"])), row["pattern"], f"{row['density']:.1%}",
                      f"{row['groups']:,}", f"{row['violations']:,}", where)
    out().print(table)
    count = len(result["weights"])
    verdict = "every group obeys its pattern" if result["ok"] else f"{result['violations']:,} groups break their pattern"
    out().print(f"{count} weights: {verdict}", soft_wrap=True)
