"""The co-design table: measure what is not measured yet, each network in a process of its own, and show it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hw.arch import Arch
from nmforge.errors import BadInputError, unknown
from nmforge.zoo import DENSE, ZOO, System, inputs_of, pattern_label, point_file, settings, sources

__all__ = [
    "COLUMNS", "cells", "chosen_systems", "collect", "default_folder", "drawing", "heading", "markdown", "recall", "rows",
]  # fmt: skip

Done = Callable[[str, str], None]
"""Called with model and pattern when a measurement is there."""


def default_folder() -> Path:
    """Where measurements are kept: with the benchmarks of a checkout, else under ``out``."""
    kept = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
    return kept / "zoo" if kept.is_dir() else Path("out/zoo")


def chosen_systems(only: Sequence[str]) -> list[System]:
    """The systems of these models, in the order of the table; none: all.

    Raises
    ------
    BadInputError
        A name that is not in the table; the message offers near ones.
    """
    for name in only:
        if name not in ZOO:
            raise unknown("network of the table", name, ZOO)
    return [system for name, system in ZOO.items() if not only or name in only]


def recall(folder: Path, system: System, pattern: str, arch: str, *, rtl: bool = False) -> dict[str, Any] | None:
    """A kept measurement, if it is one of this row; None if it is missing, damaged, or of other settings."""
    try:
        found: dict[str, Any] = json.loads(point_file(folder, system.model, pattern, rtl=rtl).read_text())
        return found if found["system"] == settings(system) and found["arch"] == arch else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def collect(systems: Iterable[System], arch: Arch, folder: Path, *, fresh: bool = False, rtl: bool = False, done: Done) -> None:
    """Measure what is not kept yet, and with ``fresh`` what was measured of other sources; a measurement that failed is tried
    again. Interrupted, what is finished is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for system in systems:
        missing = []
        for pattern in system.patterns:
            kept = recall(folder, system, pattern, arch.name, rtl=rtl)
            if kept is None or "error" in kept or (fresh and kept.get("sources") != sources()):
                missing.append(pattern)
            else:
                done(system.model, pattern)
        if missing:
            _measure(system, missing, arch, folder, rtl, done)


def _measure(system: System, patterns: list[str], arch: Arch, folder: Path, rtl: bool, done: Done) -> None:
    request = {"system": asdict(system), "patterns": patterns, "arch": arch.name, "folder": str(folder), "rtl": rtl}
    command = [sys.executable, "-m", "nmforge.zoo", json.dumps(request)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stderr is not None
            for line in child.stdout:
                done(system.model, json.loads(line)["pattern"])
            said = child.stderr.read()
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        last = (said.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise BadInputError(f"measuring {system.model} ended early, what was finished is kept: {last}")


# -- rows -------------------------------------------------------------------------------------------------------------


def rows(systems: Iterable[System], arch: Arch, folder: Path) -> list[dict[str, Any]]:
    """One row a network and pattern that has been measured, JSON values: the measurement, ``label``, ``input``, ``speedup`` over
    dense, ``ideal_speedup``, and ``rtl``: whether a recorded run of the RTL had the same cycles and every byte right (None: no
    run, or one of other sources)."""
    found = []
    for system in systems:
        dense = recall(folder, system, DENSE, arch.name)
        for pattern in system.patterns:
            point = recall(folder, system, pattern, arch.name)
            if point is None:
                continue
            row = {"label": system.label, "input": _input(system), "note": system.note, **point}
            if dense and "error" not in dense and "error" not in point:
                row["speedup"] = dense["cycles"] / point["cycles"]
                row["ideal_speedup"] = dense["effective_macs"] / point["effective_macs"]
            found.append(row | {"rtl": _checked(point, recall(folder, system, pattern, arch.name, rtl=True))})
    return found


def _checked(point: Mapping[str, Any], rtl: Mapping[str, Any] | None) -> bool | None:
    if rtl is None or "error" in rtl or "error" in point or rtl["sources"] != point["sources"]:
        return None
    return bool(rtl["bit_exact"] and rtl["cycles"] == point["cycles"] and rtl["memory"] == point["memory"])


def _input(system: System) -> str:
    return ", ".join("x".join(map(str, item.shape[1:])) for item in inputs_of(system))


def _networks(table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Rows by label and pattern."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in table:
        found.setdefault(row["label"], {})[pattern_label(row["pattern"])] = row
    return found


# -- as text ----------------------------------------------------------------------------------------------------------

COLUMNS = ("network", "input", "parameters", "MACs", "on the host", "stages", "weights", "stored", "cycles", "speed-up (ideal)",
           "utilisation", "RTL")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row as text, without the columns that say what network it is."""
    if "error" in row:
        return (pattern_label(row["pattern"]), "", "", f"fails: {row['error'][:60]}", "", "")
    speed = f"{row['speedup']:.2f} ({row['ideal_speedup']:.2f})" if row.get("speedup") and row["pattern"] != DENSE else ""
    mark = {None: "", True: "equal", False: "DIFFERS"}[row["rtl"]]
    return (
        pattern_label(row["pattern"]), _bytes(row["weight_bytes"]), f"{row['cycles']:,}", speed, f"{row['utilisation']:.3f}", mark
    )  # fmt: skip


def heading(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a network's first row says of the network."""
    share = row.get("host_share")
    macs = f"{row['macs_network'] / 1e9:.3g} G" if "macs_network" in row else ""
    millions = f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else ""
    return (
        row["label"], row["input"], millions, macs, "" if share is None else f"{share:.1%}", str(row.get("stages", ""))
    )  # fmt: skip


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, a line for each network and pattern."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---" + "|---:" * (len(COLUMNS) - 3) + "|---|"]
    for patterns in _networks(table).values():
        for number, row in enumerate(patterns.values()):
            lines.append("| " + " | ".join((*(heading(row) if number == 0 else ("",) * 6), *cells(row))) + " |")
    notes = dict.fromkeys(f"{row['label']}: {row['note']}" for row in table if row["note"])
    return "\n".join([*lines, "", *(f"* {note}" for note in notes)]).rstrip() + "\n"


def drawing(table: Sequence[Mapping[str, Any]], arch: str) -> bytes:
    """Speed-up over dense of each network and pattern, beside utilisation; a PNG file."""
    from sim.plots import beside

    good = {
        label: patterns
        for label, patterns in _networks([row for row in table if "error" not in row]).items() if DENSE in patterns
    }  # fmt: skip
    kinds = [kind for kind in (DENSE, "2:4", "1:8", "mix") if any(kind in patterns for patterns in good.values())]
    value = lambda name: {
        kind: [patterns[kind][name] if kind in patterns else None for patterns in good.values()] for kind in kinds
    }  # fmt: skip
    return beside(
        list(good), {f"speed-up over dense, {arch}": value("speedup"), "utilisation of the multipliers": value("utilisation")},
        shares=("utilisation of the multipliers",),
    )  # fmt: skip


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"

