"""What `nmforge report` shows of programs and of the co-design table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from compiler.dynamic import load
from compiler.memory import memory_map
from compiler.partitioned import PartitionedProgram
from hw.arch import Arch
from nmforge.console import out, progress_bars, write_bytes
from nmforge.dynamic import chosen
from nmforge.zoo_table import COLUMNS, cells, chosen_systems, collect, default_folder, drawing, heading, markdown, rows

__all__ = ["program_report", "zoo_report"]


def program_report(file: Path, picture: Path | None, *, shape: Mapping[str, int], quiet: bool) -> dict[str, Any]:
    """What of a program runs where, and what lies where in memory; with a picture of the memory, if one is wanted. shape: of a
    dynamic program, the size of dimensions; of others it is the largest."""
    loaded = load(file)
    _, program = chosen(loaded, shape)
    places = loaded.report() if not shape else program.report()
    parts = program.programs if isinstance(program, PartitionedProgram) else (program,)
    maps = [memory_map(part) for part in parts]
    if picture is not None:
        from sim.plots import memory_picture

        write_bytes(picture, memory_picture(max(maps, key=lambda found: found.end)))
    if not quiet:
        print(places)
        print(max(maps, key=lambda found: found.end))
    return {"program": str(file), **places.to_dict(), "memory": [found.to_dict() for found in maps]}


def zoo_report(
    only: Sequence[str], arch: Arch, cache: Path | None, *,
    as_markdown: bool, plot: Path | None, rtl: bool, fresh: bool, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """Measure what is missing of the co-design table, and show it."""
    folder, systems = cache or default_folder(), chosen_systems(only)
    with progress_bars() as progress:
        for with_rtl in (False, True) if rtl else (False,):
            title = "co-design table" + (", RTL" if with_rtl else "")
            task = progress.add_task(title, total=sum(len(system.patterns) for system in systems), note=systems[0].model)

            def done(model: str, pattern: str, task: Any = task) -> None:
                progress.update(task, advance=1, note=f"{model} {pattern}")

            collect(systems, arch, folder, fresh=fresh, rtl=with_rtl, done=done)
    table = rows(systems, arch, folder)
    if plot is not None:
        write_bytes(plot, drawing(table, arch.name))
    if as_markdown and not quiet:
        print(markdown(table), end="")
    elif not quiet:
        _show(table, arch)
    return {"arch": arch.name, "folder": str(folder), "rows": table}


def _show(table: Sequence[Mapping[str, Any]], arch: Arch) -> None:
    shown = Table(*COLUMNS, title=f"Co-design on {arch.name}", title_justify="left", box=SIMPLE_HEAD)
    for column in shown.columns[2:]:
        column.justify = "right"
    before = ""
    for row in table:
        new = row["label"] != before
        shown.add_row(*(heading(row) if new else ("",) * 6), *cells(row))
        before = row["label"]
    out().print(shown)
