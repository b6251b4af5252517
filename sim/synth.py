"""Area by Yosys: Verilog in, counts of LUTs, flip-flops, multipliers and memories out.

A module that is instantiated more than once is mapped once and counted as often as it occurs; everything else is flattened.
So a large array takes hardly longer than a small one, and nothing is optimised across the borders of repeated modules. Counts
are mapped cells before place and route; they say nothing about clock frequency.
"""

import contextlib
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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hw.verilog import cache_dir
from sim.verilator import ToolMissingError

__all__ = ["TARGETS", "Resources", "SynthesisError", "synthesise", "yosys_version"]

TARGETS: dict[str, str] = {
    "xcup": "synth_xilinx -family xcup -flatten -noiopad -noclkbuf",
    "ecp5": "synth_ecp5",
}
"""Target and its Yosys command: Xilinx UltraScale+ and Lattice ECP5, as a block inside a larger design (no pads)."""

_PACKAGE = "pyosys"
_REQUIREMENT = "pyosys==0.70"

# Runs in a process of its own, since Yosys ends the process on some errors. The argument is the script, one command a line.
_RUNNER = "import sys; from pyosys import libyosys as y; d = y.Design(); [y.run_pass(c, d) for c in sys.argv[1].splitlines()]"

_LUTS: dict[str, int] = {
    **{f"LUT{inputs}": 1 for inputs in range(1, 7)}, "INV": 1,
    "CCU2C": 2,  # an ECP5 carry cell occupies two LUT4
}
_LUT_RAMS: dict[str, int] = {  # LUTs that memories and shift registers occupy
    "RAM32X1S": 1, "RAM64X1S": 1, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1S": 2, "RAM128X1D": 4, "RAM256X1S": 4, "RAM256X1D": 8,
    "RAM512X1S": 8, "RAM32M": 4, "RAM64M": 4, "RAM32M16": 8, "RAM64M8": 8, "RAM64X8SW": 8, "RAM32X16DR8": 8,
    "SRL16E": 1, "SRLC16E": 1, "SRLC32E": 1,
    "TRELLIS_DPR16X4": 6,  # two slices of storage and one for the write port
}
_FFS: dict[str, int] = dict.fromkeys(("FDRE", "FDSE", "FDCE", "FDPE", "TRELLIS_FF"), 1)
_DSPS: dict[str, int] = dict.fromkeys(("DSP48E2", "MULT18X18D", "ALU54B"), 1)
_BRAMS: dict[str, float] = {"RAMB36E2": 1, "RAMB18E2": 0.5, "DP16KD": 1, "PDPW16KD": 1}

_MODULE = re.compile(r"^module (\w+) ?\(", re.MULTILINE)
_INSTANCE = re.compile(r"^ +(\w+) +(?:\w+|\\\S+) *\(", re.MULTILINE)


class SynthesisError(RuntimeError):
    """Yosys refused the design or gave no counts; the message ends with what it printed."""


@dataclass(frozen=True)
class Resources:
    """Mapped cells of a design.

    Attributes
    ----------
    luts : int
        Look-up tables (6 inputs for xcup, 4 for ecp5), those of `lut_rams` included. A carry cell of ecp5 is two.
    lut_rams : int
        Look-up tables used as memory or shift register.
    ffs, dsps : int
        Flip-flops; DSP48E2 or MULT18X18D.
    brams : float
        RAMB36 (a RAMB18 is half a one) or DP16KD.
    cells : dict
        Count of every primitive.
    target, version : str
        Target and Yosys version.
    seconds : float
        What the synthesis took, now or when it was put into the cache.
    """

    luts: int
    lut_rams: int
    ffs: int
    dsps: int
    brams: float
    cells: dict[str, int]
    target: str
    version: str
    seconds: float


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


def synthesise(verilog_text: str, *, top: str, target: str = "xcup", timeout_s: float | None = None) -> Resources:
    """Map a design to a target and count its cells. Cached by the text, the command and Yosys' version.

    Parameters
    ----------
    verilog_text : str
        All modules.
    top : str
        The module to synthesise.
    target : str
        A key of `TARGETS`.
    timeout_s : float, optional
        Give up after so many seconds.

    Raises
    ------
    ValueError
        Unknown target, or no module named `top`.
    ToolMissingError
        Yosys is not installed.
    SynthesisError
        Yosys reported an error, printed no counts, or ran longer than `timeout_s`.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown synthesis target {target!r}; known targets: {', '.join(TARGETS)}")
    if f"module {top}(" not in verilog_text and f"module {top} (" not in verilog_text:
        raise ValueError(f"the Verilog has no module {top!r}")
    version = yosys_version()
    script = _script(verilog_text, top, TARGETS[target])
    key = hashlib.sha256("\0".join((version, script, verilog_text)).encode()).hexdigest()[:24]
    path = cache_dir() / "synth" / f"{top}-{target}-{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # a missing or damaged entry is made again
        return Resources(**json.loads(path.read_text()))
    start = time.monotonic()
    cells = _run(verilog_text, script, timeout_s)
    found = _resources(cells, target, version, round(time.monotonic() - start, 2))
    _store(path, found)
    return found


def _script(verilog_text: str, top: str, command: str) -> str:
    """Yosys commands, one a line."""
    # without splitnets, Yosys 0.70 stops at an assertion when a wire's name looks like a bit of another (issue 4349)
    return "\n".join((
        "read_verilog design.v", *(f"setattr -mod -set keep_hierarchy 1 {name}" for name in _repeated(verilog_text)),
        f"{command} -top {top} -run :map_luts", "splitnets", f"{command} -top {top} -run map_luts:",
        "check -assert", "tee -q -o stat.json stat -json",
    ))


def _run(verilog_text: str, script: str, timeout_s: float | None) -> dict[str, int]:
    """Counts by cell type, submodules multiplied out."""
    with tempfile.TemporaryDirectory(prefix="nmforge-synth-") as name:
        folder = Path(name)
        (folder / "design.v").write_text(verilog_text)
        with (folder / "log").open("w") as log:
            try:
                done = subprocess.run([sys.executable, "-c", _RUNNER, script], cwd=folder, stdin=subprocess.DEVNULL,
                                      stdout=log, stderr=subprocess.STDOUT, timeout=timeout_s, check=False)
            except subprocess.TimeoutExpired:
                raise SynthesisError(f"Yosys took more than {timeout_s:g} s") from None
        stat = folder / "stat.json"
        if done.returncode != 0 or not stat.is_file():
            raise SynthesisError(f"Yosys failed and printed last:\n{_tail(folder / 'log')}")
        return _primitives(json.loads(stat.read_text()))


def _repeated(verilog_text: str) -> list[str]:
    """Names of the modules that have more than one instance."""
    modules = set(_MODULE.findall(verilog_text))
    instances = Counter(_INSTANCE.findall(verilog_text))
    return sorted(name for name in modules if instances[name] > 1)


def _primitives(stat: Mapping) -> dict[str, int]:
    """The totals of `stat -json` without the instances of the design's own modules and without notes on flattened ones."""
    modules = {name.lstrip("\\") for name in stat["modules"]} | {"$scopeinfo"}
    return {name: count for name, count in stat["design"]["num_cells_by_type"].items() if name not in modules}


def _tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors="replace").splitlines()
    errors = [line for line in text if line.startswith("ERROR")]
    return "\n".join([*text[-lines:], *(line for line in errors if line not in text[-lines:])])


def _resources(cells: dict[str, int], target: str, version: str, seconds: float) -> Resources:
    def total(weights: Mapping[str, float]) -> float:
        return sum(weights.get(name, 0) * count for name, count in cells.items())

    unmapped = sorted(name for name in cells if name.startswith("$"))
    if unmapped:
        raise SynthesisError(f"Yosys left cells unmapped for {target}: {', '.join(unmapped)}")
    memories = int(total(_LUT_RAMS))
    return Resources(
        luts=int(total(_LUTS)) + memories, lut_rams=memories, ffs=int(total(_FFS)), dsps=int(total(_DSPS)),
        brams=total(_BRAMS), cells=dict(sorted(cells.items())), target=target, version=version, seconds=seconds,
    )


def _store(path: Path, found: Resources) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(asdict(found), file)
    os.replace(file.name, path)
