"""`nmforge synth`: what a preset takes of its device, by open tools."""

from __future__ import annotations

import time
from typing import Any

from rich.table import Table

from hw.arch import Arch
from hw.devices import SPARE, Device, device_of
from hw.verilog import TOP_NAME, verilog
from nmforge.console import out
from nmforge.errors import BadInputError, unknown
from sim.place import place_and_route
from sim.synth import TARGETS, Progress, Resources, synthesise

__all__ = ["measure", "print_synth"]

_KINDS = ("luts", "ffs", "dsps", "brams", "urams")


def measure(arch: Arch, target: str, *, place: bool, progress: Progress, timeout_s: float | None = None) -> dict[str, Any]:
    """Map a preset and, for ecp5, place and route it; everything as JSON values.

    Raises
    ------
    BadInputError
        Unknown target, or `place` for one that has no open place and route.
    ToolMissingError, SynthesisError
        See `sim.synth.synthesise` and `sim.place.place_and_route`.
    """
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    if place and target != "ecp5":
        raise BadInputError(f"--place-and-route needs --target ecp5: no open tool places for {target}")
    start = time.monotonic()
    progress(f"generating {arch.name}")
    text = verilog(arch)
    found = synthesise(text, top=TOP_NAME, target=target, timeout_s=timeout_s, progress=progress)
    placed = None
    if place:
        placed = place_and_route(text, top=TOP_NAME, clock_mhz=arch.clock_mhz, timeout_s=timeout_s, progress=progress).to_dict()
    device = device_of(arch.name)
    facts = TARGETS[target]
    return {
        "arch": arch.name, "parameters": arch.to_dict(), "macs": arch.macs, "target": target, "family": facts.title,
        "names": {"luts": facts.lut, "dsps": facts.dsp, "brams": facts.bram}, "yosys": found.version,
        "resources": {kind: getattr(found, kind) for kind in ("luts", "lut_rams", *_KINDS[1:])}, "levels": found.levels,
        "device": _shares(found, device) if device is not None and device.target == target else None,
        "units": [unit for unit in found.to_dict()["units"] if unit["count"]], "mapping_s": found.seconds, "place": placed,
        "wall_s": round(time.monotonic() - start, 2), "vendor_tool": None,
    }  # fmt: skip


def _shares(found: Resources, device: Device) -> dict[str, Any]:
    """Share of the device; `fits` with what must stay free."""
    shares = {kind: getattr(found, kind) / getattr(device, kind) for kind in _KINDS if getattr(device, kind)}
    return {
        "name": device.name, "board": device.board, "available": {kind: getattr(device, kind) for kind in _KINDS},
        "share": {kind: round(share, 4) for kind, share in shares.items()}, "spare": SPARE,
        "fits": all(share <= 1 - SPARE for share in shares.values()),
    }  # fmt: skip


def print_synth(result: dict[str, Any]) -> None:
    """The same for people."""
    resources, device, names = result["resources"], result["device"], result["names"]
    where = f", {device['name']} ({device['board']})" if device else ""
    table = Table("", "used", "per MAC", *(["available", "share"] if device else []), title_justify="left",
                  title=f"{result['arch']}, {result['macs']} MACs, {result['family']}{where}")
    for column in table.columns[1:]:
        column.justify = "right"
    labels = {"luts": names["luts"], "lut_rams": "  of them RAM", "ffs": "flip-flops", "dsps": names["dsps"],
              "brams": names["brams"], "urams": "URAM"}
    for kind, label in labels.items():
        used = resources[kind]
        if kind == "urams" and not used:
            continue
        row = [label, f"{used:,g}" if isinstance(used, float) else f"{used:,}", f"{used / result['macs']:.2f}"]
        if device:
            known = device["share"].get(kind)
            row += [f"{device['available'][kind]:,}", f"{known:.1%}"] if known is not None else ["", ""]
        table.add_row(*row)
    out().print(table)
    out().print(_units(result))
    if device:
        out().print("fits with 20 % to spare" if device["fits"] else "does NOT fit with 20 % to spare", soft_wrap=True)
    if result["place"]:
        _print_place(result["place"])
    how = "" if result["place"] else "mapped cells before place and route; "
    out().print(f"{how}no vendor tool was run", soft_wrap=True)


def _units(result: dict[str, Any]) -> Table:
    table = Table("module (without those inside it)", "count", "LUT", "RAM", "FF", "DSP", "BRAM", "levels", title_justify="left",
                  title="Each module once")
    for column in table.columns[1:]:
        column.justify = "right"
    for unit in sorted(result["units"], key=lambda unit: -unit["count"] * unit["luts"]):
        table.add_row(unit["name"].removeprefix("nmforge_"), f"{unit['count']:,}", *(
            f"{unit[kind]:,}" for kind in ("luts", "lut_rams", "ffs", "dsps")), f"{unit['brams']:g}", str(unit["levels"]))
    return table


def _print_place(place: dict[str, Any]) -> None:
    console = out()
    how = f"{place['seconds']:.0f} s, seed {place['seed']}"
    console.print(f"placed and routed on {place['device']}: {place['fmax_mhz']:.1f} MHz ({how})", soft_wrap=True)
    used = ", ".join(f"{kind} {count:,}/{place['available'][kind]:,}" for kind, count in place["used"].items() if count)
    console.print(f"used: {used}", soft_wrap=True)
    console.print("critical path: " + ", ".join(f"{name} {ns:.2f} ns" for name, ns in place["modules"]), soft_wrap=True)
