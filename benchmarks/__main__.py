"""``python -m benchmarks [NAME ...] [--slow]``: run benchmarks, print their tables, keep their results."""

import argparse
import importlib
import sys
import time

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks import RESULTS, Table, save

FAST: tuple[str, ...] = ("utilisation", "cycle_speed", "simulation_speed", "datapaths", "sparse_cost")
"""Modules that take a few minutes each."""

SLOW: tuple[str, ...] = (
    "accuracy", "comparison", "compile_time", "convolutions", "cycle_set", "dynamic", "fisher", "llama", "must_run", "placement",
    "silicon", "sparse_training",
    "train_classifiers", "train_detr", "train_group_rcnn", "train_llama", "train_llama_by_heart",
    "train_masks",
)
"""Modules that run only when named, or with ``--slow``."""


def _show(console: Console, table: Table) -> None:
    shown = RichTable(title=table.title, caption=table.note or None, box=box.SIMPLE_HEAD, title_justify="left",
                      caption_justify="left")
    for column in table.columns:
        shown.add_column(column, justify="left" if column == table.columns[0] else "right")
    for row in table.rows:
        shown.add_row(*("" if cell is None else f"{cell:,.2f}" if isinstance(cell, float) else
                        f"{cell:,}" if isinstance(cell, int) else cell for cell in row))
    console.print(shown)


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks, or the fast ones."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*FAST, *SLOW))}; default: the fast ones")
    parser.add_argument("--slow", action="store_true", help="run all, the slow ones too")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - {*FAST, *SLOW})
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join((*FAST, *SLOW))}")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    for name in given.names or (FAST + SLOW if given.slow else FAST):
        start = time.monotonic()
        tables = importlib.import_module(f"benchmarks.{name}").run()
        for table in tables:
            _show(console, table)
        path = save(name, tables, time.monotonic() - start).relative_to(RESULTS.parent.parent)
        console.print(f"{name}: {time.monotonic() - start:.0f} s, written to {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
