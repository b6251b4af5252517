"""What the presets take of their devices, by open tools: resources, price of N:M support, products per DSP block.

Writes ``docs/silicon.png``. No vendor tool is run.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from sys import stderr

from benchmarks import Table, write_page
from hw.arch import PRESETS, Arch
from hw.devices import SPARE, device_of
from hw.verilog import TOP_NAME, verilog
from sim.plots import points
from sim.synth import TARGETS, Resources, synthesise

__all__ = ["FAMILIES", "run"]

FAMILIES = ("xc7", "intel", "ecp5")
"""Other families to which the smallest preset is mapped."""

PLOT = Path(__file__).parent.parent / "docs" / "silicon.png"

PAGE = PLOT.with_suffix(".md")

_HEAD = ("LUT", "of them RAM", "FF", "DSP", "block RAM")


def _say(line: str) -> None:
    print(line, file=stderr, flush=True)


def _map(arch: Arch, target: str) -> Resources:
    return synthesise(verilog(arch), top=TOP_NAME, target=target, progress=lambda line: _say(f"{arch.name} {target}: {line}"))


def _counts(found: Resources) -> tuple[float, ...]:
    return found.luts, found.lut_rams, found.ffs, found.dsps, found.brams


def _presets() -> tuple[Table, dict[str, Resources]]:
    found, rows = {}, []
    for name, arch in PRESETS.items():
        device = device_of(name)
        assert device is not None  # a test says so
        found[name] = here = _map(arch, device.target)
        shares = [here.luts / device.luts, here.ffs / device.ffs, here.dsps / device.dsps, here.brams / device.brams]
        rows.append((f"{name}, {arch.macs} MACs", device.name, *_counts(here), *(f"{share:.1%}" for share in shares),
                     "yes" if max(shares) <= 1 - SPARE else "NO", here.luts / arch.macs, here.levels, here.seconds))
    return Table(
        title="Presets on their devices",
        columns=("preset", "device", *_HEAD, "LUT %", "FF %", "DSP %", "RAM %", "20 % spare", "LUT/MAC", "levels", "mapping s"),
        rows=tuple(rows),
        note="Mapped cells before place and route. Levels: longest chain of logic between registers (sim/levels.py). Mapping s: "
             "what Yosys took for all modules, when each was mapped.",
    ), found


def _options(title: str, change: Callable[[Arch], Arch], what: str, names: tuple[str, ...]) -> Table:
    rows = []
    for name in names:
        arch, device = PRESETS[name], device_of(name)
        assert device is not None
        here, other = _map(arch, device.target), _map(change(arch), device.target)
        for label, counts in ((name, here), (f"{name}, {what}", other)):
            rows.append((label, *_counts(counts), counts.luts / arch.macs, counts.dsps / arch.macs, None))
        rows[-1] = (*rows[-1][:-1], (here.luts - other.luts) / arch.macs)
    return Table(title=title, columns=("design", *_HEAD, "LUT/MAC", "DSP/MAC", "preset minus this, LUT/MAC"), rows=tuple(rows))


def _families() -> Table:
    rows = [(f"tiny, {TARGETS[target].title}", *_counts(found), found.levels)
            for target in FAMILIES if (found := _map(PRESETS["tiny"], target))]
    return Table(title="The smallest preset on other families", columns=("preset, family", *_HEAD, "levels"), rows=tuple(rows))


def _modules(found: dict[str, Resources], name: str) -> Table:
    units = sorted(found[name].units, key=lambda unit: -unit.count * unit.luts)
    return Table(
        title=f"Modules of {name} (each without the modules inside it)",
        columns=("module", "count", *_HEAD, "levels", "from", "to"),
        rows=tuple((unit.name.removeprefix("nmforge_"), unit.count, unit.luts, unit.lut_rams, unit.ffs, unit.dsps, unit.brams,
                    unit.levels, unit.path[0] if unit.path else "", unit.path[-1] if unit.path else "") for unit in units),
    )


def _plot(found: dict[str, Resources]) -> None:
    names = [name for name in ("sta256", "sta1024", "sta4096") if name in found]
    series = {"LUT": [found[name].luts for name in names], "DSP48E2": [found[name].dsps for name in names],
              "RAMB36": [found[name].brams for name in names]}
    PLOT.write_bytes(points([PRESETS[name].macs for name in names], series, label="multiply-accumulates per cycle"))


def run() -> list[Table]:
    """All tables."""
    presets, found = _presets()
    _plot(found)
    large = ("sta256", "sta1024")
    tables = [
        presets,
        _options("Price of N:M support", lambda arch: replace(arch, sparse=False), "dense only", (*large, "sta4096")),
        _options("Products per DSP block", lambda arch: replace(arch, packing=not arch.packing), "the other kind", large),
        _families(), _modules(found, "sta1024"),
    ]
    write_page(PAGE, "silicon", tables)
    return tables
