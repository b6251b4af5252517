"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from compiler.shapes import sizes_text
from nmforge.console import out
from sim.simulate import Run

__all__ = ["print_models", "print_run", "print_summary"]


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the headline figures and where everything is."""
    console = out()
    console.print(_table(summary))
    for name, path in summary["files"].items():
        console.print(f"{name:<8} {path}", soft_wrap=True)


def _table(summary: Mapping[str, Any]) -> Table:
    title = f"{summary['model']['name']} at {summary['pattern']} on {summary['arch']['name']}"
    table = Table("", "dense", "sparse", title=title, title_justify="left")
    accuracy, runs = summary["accuracy"], summary["runs"]
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("accuracy, float", f"{accuracy['float_dense']:.1%}", f"{accuracy['float_sparse']:.1%}")
    table.add_row("accuracy, int8", "", f"{accuracy['int8_sparse']:.1%}")
    table.add_row("weights", _megabytes(summary["bytes"]["dense_int8"]), _megabytes(summary["bytes"]["compressed"]))
    if summary["cycles"]["sparse"] is not None:
        _add_times(table, summary)
    exact = {kind: "[green]yes[/]" if runs[kind]["bit_exact"] else "[red]NO[/]" for kind in ("dense", "sparse")}
    table.add_row("bit-exact", exact["dense"], exact["sparse"])
    table.add_row("bytes checked", *(f"{summary['bytes_checked'][kind]:,}" for kind in ("dense", "sparse")))
    table.add_row("wall time", "", f"{summary['wall_s']:.0f} s")
    return table


def _add_times(table: Table, summary: Mapping[str, Any]) -> None:
    cycles, utilisation, accelerator = summary["cycles"], summary["utilisation"], summary["accelerator"]
    table.add_row("cycles", f"{cycles['dense']:,}", f"{cycles['sparse']:,}")
    table.add_row("utilisation", f"{utilisation['dense']:.3f}", f"{utilisation['sparse']:.3f}")
    table.add_row("speed-up (ideal)", "1.00x", f"{summary['sparse_speedup']:.2f}x ({summary['ideal_speedup']:.2f}x)")
    table.add_row(
        f"a sentence at {accelerator['clock_mhz_assumed']} MHz (assumed)",
        f"{1e6 * accelerator['seconds_per_sentence_dense']:.0f} us", f"{1e6 * accelerator['seconds_per_sentence']:.0f} us",
    )  # fmt: skip
    cpu = summary["cpu"]
    table.add_row(f"a sentence on this CPU, {cpu['threads']} threads", f"{1e6 * cpu['seconds_per_sentence']:.0f} us", "")
    if summary["simulator"]["cycles_per_s"]:
        table.add_row("simulation", "", f"{summary['simulator']['cycles_per_s']:,.0f} cycles/s")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def print_models(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what `nmforge.catalogue.catalogue` gives."""
    table = Table(title="Models", title_justify="left", box=SIMPLE_HEAD)
    for column in ("name", "family", "params", "MACs", "activations", "input", "arXiv"):
        table.add_column(column, justify="right" if column in ("params", "MACs", "activations") else "left", no_wrap=True)
    for row in rows:
        shapes = ", ".join("x".join(map(str, shape)) for shape in row["input_shape"].values())
        numbers = (_scaled(row[quantity]) for quantity in ("params", "macs", "activations"))
        table.add_row(row["name"], row["family"], *numbers, shapes, row["paper"] or "")
    console = out()
    console.width = max(console.width, 112)  # figures are not cut off on a narrow terminal
    console.print(table)


def _scaled(value: int | None) -> str:
    """1,234,567 as 1.23 M; nothing for None."""
    if value is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)


def print_run(run: Run) -> None:
    """Print what a simulation came to."""
    table = Table(show_header=False, title=f"{run.engine} on {run.arch.name}", title_justify="left")
    if run.sizes:
        table.add_row("shape", sizes_text(run.sizes))
    if run.cycles is not None:
        table.add_row("cycles", f"{run.cycles:,}")
        table.add_row("utilisation", f"{run.utilisation:.3f}")
        table.add_row("simulated", f"{run.wall_s:.2f} s, {run.cycles_per_s:,.0f} cycles/s")
    exact = {True: "[green]yes[/]", False: "[red]no[/]", None: "not checked"}[run.bit_exact]
    table.add_row("bit-exact", f"{exact}, {run.bytes_checked:,} bytes" if run.bit_exact is not None else exact)
    if run.outputs_sha256 is not None:
        table.add_row("outputs", f"sha256 {run.outputs_sha256[:16]}...")
    table.add_row("simulator", run.simulator)
    out().print(table)
