"""Area and logic levels by Yosys: Verilog in, counts of LUTs, flip-flops, multipliers and memories out.

The design is cut into units (`sim.verilog_text`): a module that is instantiated more than once, or that is large, is mapped once,
by itself, and counted as often as it occurs. So a large array takes hardly longer than a small one, nothing is optimised across
the borders of units, and a unit whose text did not change comes from the cache. Counts are mapped cells before place and route;
they say nothing about clock frequency. Levels are those of `sim.levels`.
"""

import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hw.verilog import cache_dir
from sim.levels import Timing, analyse
from sim.verilator import ToolMissingError
from sim.verilog_text import Unit, VerilogModule, split, units

__all__ = ["TARGETS", "Progress", "Resources", "SynthesisError", "Target", "UnitResources", "map_units", "synthesise",
           "yosys_version"]

_PACKAGE = "pyosys"
_REQUIREMENT = "pyosys==0.70"

Progress = Callable[[str], None]
"""Called with a line of text when something was mapped."""


@dataclass(frozen=True)
class Target:
    """How a family is mapped.

    Attributes
    ----------
    title : str
        For people.
    library : tuple of str
        Yosys commands that load the family's primitives.
    commands : tuple of str
        Commands that map the module ``{top}``, as a block inside a larger design (no pads).
    lut, dsp, bram : str
        What is counted under these names.
    files : dict
        Files that the commands use.
    """

    title: str
    library: tuple[str, ...]
    commands: tuple[str, ...]
    lut: str
    dsp: str
    bram: str
    files: tuple[tuple[str, str], ...] = ()


# Yosys 0.70 packs registers and adders into the DSP48E1 only. The DSP48E2 has everything that one has, so for UltraScale+ the
# same pass runs on cells of the older type, whose 30-bit port A carries 27 bits, and the type is changed after it.
_DSP_MAP = r"""
module \$__MUL27X18 (input [26:0] A, input [17:0] B, output [44:0] Y);
  parameter A_SIGNED = 0; parameter B_SIGNED = 0; parameter A_WIDTH = 0; parameter B_WIDTH = 0; parameter Y_WIDTH = 0;
  wire [47:0] P;
  DSP48E1 #(.ACASCREG(0), .ADREG(0), .A_INPUT("DIRECT"), .ALUMODEREG(0), .AREG(0), .BCASCREG(0), .B_INPUT("DIRECT"), .BREG(0),
    .CARRYINREG(0), .CARRYINSELREG(0), .CREG(0), .DREG(0), .INMODEREG(0), .MREG(0), .OPMODEREG(0), .PREG(0),
    .USE_MULT("MULTIPLY"), .USE_SIMD("ONE48"), .USE_DPORT("FALSE")) _TECHMAP_REPLACE_ (
    .A({{3{A[26]}}, A}), .B(B), .C(48'b0), .D(25'b0), .P(P), .INMODE(5'b00000), .ALUMODE(4'b0000), .OPMODE(7'b0000101),
    .CARRYINSEL(3'b000), .ACIN(30'b0), .BCIN(18'b0), .PCIN(48'b0), .CARRYIN(1'b0));
  assign Y = P;
endmodule
"""
_DSP48E2 = (
    "memory_dff", "alumacc -macc-only", "maccmap -unmap", "opt_clean",
    "techmap -map +/mul2dsp.v -map dsp_map.v -D DSP_A_MAXWIDTH=27 -D DSP_B_MAXWIDTH=18 -D DSP_A_MINWIDTH=2 -D DSP_B_MINWIDTH=2 "
    "-D DSP_Y_MINWIDTH=9 -D DSP_SIGNEDONLY=1 -D DSP_NAME=$__MUL27X18",
    "select a:mul2dsp", "setattr -unset mul2dsp", "opt_expr -fine", "wreduce", "select -clear",
    "xilinx_dsp -family xc7", "chtype -set $mul t:$__soft_mul", "setparam -unset USE_DPORT t:DSP48E1",
    "chtype -set DSP48E2 t:DSP48E1",
)
_XILINX_LIBRARY = ("read_verilog -lib -specify +/xilinx/cells_sim.v", "read_verilog -lib +/xilinx/cells_xtra.v")


def _xilinx(family: str, dsp: Sequence[str] = ()) -> tuple[str, ...]:
    synth = f"synth_xilinx -family {family} -flatten -noiopad -noclkbuf -widemux 5 -top {{top}} -run"
    first = (f"{synth} prepare:map_dsp", *dsp, f"{synth} coarse:map_luts") if dsp else (f"{synth} prepare:map_luts",)
    # without splitnets, Yosys 0.70 stops at an assertion when a wire's name looks like a bit of another (issue 4349)
    return (*first, "splitnets", f"{synth} map_luts:")


TARGETS: dict[str, Target] = {
    "xcup": Target("Xilinx UltraScale+", _XILINX_LIBRARY, _xilinx("xcup", _DSP48E2), "LUT6", "DSP48E2", "RAMB36",
                   (("dsp_map.v", _DSP_MAP),)),
    "xc7": Target("Xilinx 7 series", _XILINX_LIBRARY, _xilinx("xc7"), "LUT6", "DSP48E1", "RAMB36"),
    "intel": Target("Intel Cyclone V", ("read_verilog -specify -lib -D cyclonev " + " ".join(
        f"+/intel_alm/common/{name}_sim.v" for name in ("alm", "dff", "dsp", "mem", "misc")),
        "read_verilog -specify -lib -D cyclonev -icells +/intel_alm/common/abc9_model.v",
        "read_verilog -lib +/intel/common/altpll_bb.v", "read_verilog -lib +/intel_alm/common/megafunction_bb.v"),
        ("synth_intel_alm -family cyclonev -noiopad -noclkbuf -top {top} -run coarse:",),
        "ALUT", "multiplier", "M10K"),
    "ecp5": Target("Lattice ECP5", ("read_verilog -lib -specify +/lattice/cells_sim_ecp5.v +/lattice/cells_bb_ecp5.v",),
                   ("synth_ecp5 -top {top} -run coarse:map_luts", "splitnets", "synth_ecp5 -top {top} -run map_luts:"),
                   "LUT4", "MULT18X18D", "DP16KD"),
}
"""Targets by name."""

# Runs in a process of its own, since Yosys ends the process on some errors. Maps unit after unit and says so on a pipe.
_RUNNER = """
import json, os, sys, time
from pyosys import libyosys as yosys
jobs = json.load(open(sys.argv[1]))
design, pipe = yosys.Design(), int(sys.argv[2])
for command in jobs["library"]:
    yosys.run_pass(command, design)
yosys.run_pass("design -save library", design)
for index, commands in enumerate(jobs["units"]):
    start = time.monotonic()
    yosys.run_pass("design -load library", design)
    for command in commands:
        yosys.run_pass(command, design)
    os.write(pipe, f"{index} {time.monotonic() - start:.2f}\\n".encode())
"""

_LUTS: dict[str, int] = {
    **{f"LUT{inputs}": 1 for inputs in range(1, 7)}, "INV": 1,
    "CCU2C": 2,  # an ECP5 carry cell occupies two LUT4
    **{f"MISTRAL_ALUT{inputs}": 1 for inputs in range(2, 7)}, "MISTRAL_NOT": 1, "MISTRAL_ALUT_ARITH": 1,
}
_LUT_RAMS: dict[str, int] = {  # LUTs that memories and shift registers occupy
    "RAM32X1S": 1, "RAM64X1S": 1, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1S": 2, "RAM128X1D": 4, "RAM256X1S": 4, "RAM256X1D": 8,
    "RAM512X1S": 8, "RAM32M": 4, "RAM64M": 4, "RAM32M16": 8, "RAM64M8": 8, "RAM64X8SW": 8, "RAM32X16DR8": 8,
    "SRL16E": 1, "SRLC16E": 1, "SRLC32E": 1,
    "TRELLIS_DPR16X4": 6,  # two slices of storage and one for the write port
    "MISTRAL_MLAB": 1,  # 32 x 1 bit; 20 of them and their 10 ALMs (20 ALUTs) are one MLAB
}
_FFS: dict[str, int] = dict.fromkeys(("FDRE", "FDSE", "FDCE", "FDPE", "TRELLIS_FF", "MISTRAL_FF"), 1)
_DSPS: dict[str, int] = dict.fromkeys(("DSP48E2", "DSP48E1", "MULT18X18D", "ALU54B", "MISTRAL_MUL9X9", "MISTRAL_MUL18X18",
                                       "MISTRAL_MUL27X27"), 1)
_BRAMS: dict[str, float] = {"RAMB36E2": 1, "RAMB18E2": 0.5, "RAMB36E1": 1, "RAMB18E1": 0.5, "DP16KD": 1, "PDPW16KD": 1,
                            "MISTRAL_M10K": 1}
_URAMS: dict[str, int] = {"URAM288": 1, "URAM288_BASE": 1}


class SynthesisError(RuntimeError):
    """Yosys refused the design or gave no counts; the message ends with what it printed."""


@dataclass(frozen=True)
class UnitResources:
    """One unit, without the units inside it.

    Attributes
    ----------
    name, count : str, int
        Module, and how often it occurs.
    luts, lut_rams, ffs, dsps, brams, urams :
        As in `Resources`, of one occurrence.
    levels, path :
        Longest chain of logic between registers that lies in this unit and those inside it: levels, and the nets at its ends.
    """

    name: str
    count: int
    luts: int
    lut_rams: int
    ffs: int
    dsps: int
    brams: float
    urams: int
    levels: int
    path: tuple[str, ...]


@dataclass(frozen=True)
class Resources:
    """Mapped cells of a design.

    Attributes
    ----------
    luts : int
        Look-up tables (6 inputs; 4 for ecp5), those of `lut_rams` included. A carry cell of ecp5 is two.
    lut_rams : int
        Look-up tables used as memory or shift register.
    ffs, dsps, urams : int
        Flip-flops; DSP blocks (see `Target.dsp`); UltraRAM blocks.
    brams : float
        Block RAMs (see `Target.bram`); a RAMB18 is half a one.
    levels : int
        Longest chain of logic between two registers, see `sim.levels`.
    cells : dict
        Count of every primitive.
    target, version : str
        Target and Yosys version.
    seconds : float
        What mapping took, now or when it was put into the cache.
    units : tuple of UnitResources
        What the counts are made of.
    """

    luts: int
    lut_rams: int
    ffs: int
    dsps: int
    brams: float
    urams: int
    levels: int
    cells: dict[str, int]
    target: str
    version: str
    seconds: float
    units: tuple[UnitResources, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def yosys_version() -> str:
    """Version of the Yosys that `synthesise` uses.

    Raises
    ------
    ToolMissingError
        It is not installed.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        raise ToolMissingError(
            f"Yosys is not installed for {sys.executable}: run `{sys.executable} -m pip install {_REQUIREMENT}` or `make setup`"
        )
    return importlib.metadata.version(_PACKAGE)


def synthesise(verilog_text: str, *, top: str, target: str = "xcup", timeout_s: float | None = None,
               progress: Progress | None = None) -> Resources:
    """Map a design to a target and count its cells. Units are cached by their text, the commands and Yosys' version.

    Parameters
    ----------
    verilog_text : str
        All modules.
    top : str
        The module to synthesise.
    target : str
        A key of `TARGETS`.
    timeout_s : float, optional
        Give up after so many seconds; what was mapped until then is kept.
    progress : callable, optional
        Called with a line of text after each unit.

    Raises
    ------
    ValueError
        Unknown target, or no module named `top`.
    ToolMissingError
        Yosys is not installed.
    SynthesisError
        Yosys reported an error, left something unmapped, or ran longer than `timeout_s`.
    """
    mapped = map_units(verilog_text, top=top, target=target, timeout_s=timeout_s, progress=progress)
    counts = _occurrences(mapped, top)
    timings: dict[str, Timing] = {}
    rows, cells, seconds = [], Counter[str](), 0.0
    for name, netlist in mapped.items():
        timings[name] = analyse(netlist, timings)
        own = Counter(kind for kind in _cell_types(netlist) if kind not in mapped)
        _refuse_unmapped(own, name, target)
        found = timings[name]
        rows.append(UnitResources(name=name, count=counts[name], levels=found.levels, path=found.path, **_total(own)))
        seconds += netlist["seconds"]
        for kind, number in own.items():
            cells[kind] += number * counts[name]
    return Resources(cells=dict(sorted(cells.items())), target=target, version=yosys_version(), seconds=round(seconds, 2),
                     levels=max(row.levels for row in rows), units=tuple(rows), **_total(cells))


def map_units(verilog_text: str, *, top: str, target: str, timeout_s: float | None = None,
              progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Mapped netlist (Yosys' JSON, with ``seconds``) of each unit, those inside it first. Errors as `synthesise`."""
    if target not in TARGETS:
        raise ValueError(f"unknown synthesis target {target!r}; known targets: {', '.join(TARGETS)}")
    modules = split(verilog_text)
    if top not in modules:
        raise ValueError(f"the Verilog has no module {top!r}")
    version = yosys_version()
    found = units(modules, top)
    jobs = {unit.name: _Job(unit, modules, target, version) for unit in found}
    missing = [job for job in jobs.values() if not job.path.is_file()]
    if missing:
        _run(missing, TARGETS[target], timeout_s, progress)
    return {name: job.read() for name, job in jobs.items()}


class _Job:
    """Mapping of one unit: its sources, the commands, and where the result is kept."""

    def __init__(self, unit: Unit, modules: Mapping[str, VerilogModule], target: str, version: str) -> None:
        self.name = unit.name
        text = "\n".join([*(_stub(modules[child].text) for child in unit.children), unit.text])
        self.text, self._numbers = _renumber(text)
        self.commands = tuple(command.format(top=unit.name) for command in TARGETS[target].commands)
        key = hashlib.sha256("\0".join((version, repr(TARGETS[target]), *self.commands, self.text)).encode()).hexdigest()[:24]
        short = re.sub(r"[^\w.]", "_", unit.name)
        self.path = cache_dir() / "synth" / f"{short}-{target}-{key}.json.gz"

    def read(self) -> dict[str, Any]:
        """The mapped netlist, with the names of this design."""
        try:
            text = gzip.decompress(self.path.read_bytes()).decode()
            found: dict[str, Any] = json.loads(_LOCAL.sub(lambda match: f"${self._numbers[int(match[1])]}", text))
        except (OSError, EOFError, ValueError):
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise SynthesisError(f"the cached result {self.path} was damaged and is removed: run again") from None
        return found

    def script(self, index: int) -> list[str]:
        return [f"read_verilog unit{index}.v", f"hierarchy -check -top {self.name}", *self.commands, "check -assert",
                f"select -module {self.name}", f"write_json -selected unit{index}.json"]


_GLOBAL, _LOCAL = re.compile(r"\$(\d+)"), re.compile(r"\$n(\d+)n")


def _renumber(text: str) -> tuple[str, list[str]]:
    """A text without the numbers that names get from the design around it, and these in the order of the new ones.

    So the same module has the same text, and is mapped once, in all variants of a design.
    """
    numbers: dict[str, int] = {}
    return _GLOBAL.sub(lambda match: f"$n{numbers.setdefault(match[1], len(numbers))}n", text), list(numbers)


_PORT = re.compile(r"^\s*(?:input|output|inout)\b[^;()]*;", re.MULTILINE)


def _stub(text: str) -> str:
    """A module's ports alone, as a black box."""
    header, _, body = text.partition(";")
    return f"(* blackbox *)\n{header};\n" + "\n".join(_PORT.findall(body)) + "\nendmodule\n"


def _run(jobs: Sequence[_Job], target: Target, timeout_s: float | None, progress: Progress | None) -> None:
    """Map what is not in the cache, in one process, and put it there unit by unit."""
    with tempfile.TemporaryDirectory(prefix="nmforge-synth-") as name:
        folder = Path(name)
        for file, text in target.files:
            (folder / file).write_text(text)
        for index, job in enumerate(jobs):
            (folder / f"unit{index}.v").write_text(job.text)
        (folder / "jobs.json").write_text(json.dumps(
            {"library": target.library, "units": [job.script(index) for index, job in enumerate(jobs)]}))
        reader, writer = os.pipe()
        with (folder / "log").open("w") as log:
            process = subprocess.Popen([sys.executable, "-c", _RUNNER, "jobs.json", str(writer)], cwd=folder, pass_fds=(writer,),
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            os.close(writer)
            try:
                done = _follow(reader, process, folder, jobs, timeout_s, progress)
            finally:
                os.close(reader)
                process.kill()
                process.wait()
        if done < len(jobs):
            raise SynthesisError(f"Yosys failed in module {jobs[done].name} and printed last:\n{_tail(folder / 'log')}")


def _follow(reader: int, process: subprocess.Popen, folder: Path, jobs: Sequence[_Job], timeout_s: float | None,
            progress: Progress | None) -> int:
    """Keep the result of each unit when it is done; how many there were."""
    import select

    end, done, rest = None if timeout_s is None else time.monotonic() + timeout_s, 0, b""
    while True:
        wait = None if end is None else end - time.monotonic()
        if wait is not None and (wait <= 0 or not select.select([reader], [], [], wait)[0]):
            process.kill()
            raise SynthesisError(f"Yosys took more than {timeout_s:g} s; {done} of {len(jobs)} modules are mapped and kept")
        block = os.read(reader, 4096)
        if not block:
            return done
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            seconds = float(line.split()[1])
            _keep(jobs[done], folder / f"unit{done}.json", seconds)
            done += 1
            if progress is not None:
                progress(f"mapped {done}/{len(jobs)}: {jobs[done - 1].name}, {seconds:.1f} s")


def _keep(job: _Job, file: Path, seconds: float) -> None:
    module = json.loads(file.read_text())["modules"][job.name]
    file.unlink()
    cells = {name: cell for name, cell in module["cells"].items() if cell["type"] != "$scopeinfo"}  # notes on flattened modules
    for cell in cells.values():
        cell.pop("attributes", None)
    names = {name: {"bits": net["bits"]} for name, net in module["netnames"].items()
             if not net.get("hide_name") and not name.startswith(("$", "_"))}
    content = {"ports": module["ports"], "cells": cells, "netnames": names, "seconds": seconds}
    job.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=job.path.parent, delete=False) as whole:
        whole.write(gzip.compress(json.dumps(content).encode(), compresslevel=1, mtime=0))
    os.replace(whole.name, job.path)


def _cell_types(netlist: Mapping[str, Any]) -> list[str]:
    return [cell["type"].lstrip("\\") for cell in netlist["cells"].values()]


def _occurrences(mapped: Mapping[str, Mapping[str, Any]], top: str) -> Counter[str]:
    """How often each unit occurs below `top`."""
    counts = Counter({top: 1})
    for name, netlist in reversed(list(mapped.items())):
        for kind in _cell_types(netlist):
            if kind in mapped:
                counts[kind] += counts[name]
    return counts


def _total(cells: Mapping[str, int]) -> dict[str, Any]:
    def total(weights: Mapping[str, float]) -> float:
        return sum(weights.get(name, 0) * count for name, count in cells.items())

    memories = int(total(_LUT_RAMS))
    return {"luts": int(total(_LUTS)) + memories, "lut_rams": memories, "ffs": int(total(_FFS)), "dsps": int(total(_DSPS)),
            "brams": total(_BRAMS), "urams": int(total(_URAMS))}


def _refuse_unmapped(cells: Mapping[str, int], unit: str, target: str) -> None:
    unmapped = sorted(name for name in cells if name.startswith("$"))
    if unmapped:
        raise SynthesisError(f"Yosys left cells of {unit} unmapped for {target}: {', '.join(unmapped)}")


def _tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors="replace").splitlines()
    errors = [line for line in text if "ERROR" in line]
    return "\n".join([*text[-lines:], *(line for line in errors if line not in text[-lines:])])
