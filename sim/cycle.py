"""The cycle engine: how many cycles a program takes on the RTL, to the cycle, without its data.

A control-only model in C++ (``sim/cpp/cycle``) has one class for each unit of `hw`, with the same handshakes, and the very
code that times the RTL's memory. When the state of the machine recurs, so does what follows: whole column tiles, row tiles,
heads and layers are skipped, exactly. docs/architecture.md says more.
"""

import ctypes
import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compiler.program import Program
from hw.arch import Arch
from hw.isa import INSTRUCTION_BYTES
from hw.lane import array_latency
from hw.top import EVENTS, READERS, reader_sizes, writer_beats
from hw.verilog import cache_dir
from sim.counters import COUNTER_NAMES
from sim.cxx import find_cxx, locked, printed_by, run_tool
from sim.cycle_check import check_code
from sim.cycle_header import machine_header
from sim.engine import CycleLimitError
from sim.memory import MemoryModel

__all__ = ["CycleRun", "run_code", "run_cycles"]

_CPP = Path(__file__).parent / "cpp"
# vector instructions would load what scalar ones have just stored: each time a stall
_FLAGS = ("-std=c++17", "-O3", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-march=native", "-fPIC", "-shared", "-fno-plt",
          "-fvisibility=hidden")

FIRST_CYCLE = 13
"""Number, by which the memory's stalls go, of the first cycle of the first program after a `VerilatorEngine` was opened."""

NO_LIMIT = (1 << 64) - 1


class _Arch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("rows", "lanes", "lane_depth", "row_depth", "bus_bytes")),
        ("out_bytes", ctypes.c_uint32 * len(READERS)), ("fifo_beats", ctypes.c_uint32 * len(READERS)),
        ("write_bytes", ctypes.c_uint32), ("writer_beats", ctypes.c_uint32), ("array_latency", ctypes.c_uint32),
        ("sums_depth", ctypes.c_uint32), ("results_depth", ctypes.c_uint32),
    ]  # fmt: skip


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("latency", "bytes_per_cycle", "stall_threshold", "seed")]


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("start_cycle", "max_cycles", "skip")]


class _Result(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("cycles", "simulated", "skips", "finished")),
        ("events", ctypes.c_uint64 * len(EVENTS)), ("read_beats", ctypes.c_uint64 * len(READERS)),
        ("write_beats", ctypes.c_uint64),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class CycleRun:
    """What a program's run comes to.

    Attributes
    ----------
    cycles : int
        From start to done, as the RTL counts them.
    counters : dict
        All performance counters, equal to the RTL's.
    storing, completed : ndarray of int64, (storing instructions,)
        Indices of the instructions that store, and the cycle, counted from the start, in which the last write of each was
        answered.
    stepped : int
        Cycles that were simulated one by one; the others were skipped as repetitions.
    wall_s : float
        Seconds, with decoding the instructions, without checking them.
    check_s : float
        Seconds for the checks.
    """

    cycles: int
    counters: dict[str, int]
    storing: NDArray[np.int64]
    completed: NDArray[np.int64]
    stepped: int
    wall_s: float
    check_s: float

    @property
    def cycles_per_s(self) -> float:
        """Speed of the simulation."""
        return self.cycles / self.wall_s


def run_cycles(
    program: Program, memory: MemoryModel | None = None, *, max_cycles: int | None = None, skip: bool = True
) -> CycleRun:
    """Time a program. Parameters and errors as `run_code`."""
    return run_code(
        program.code, program.arch, memory, address=program.code_address, max_cycles=max_cycles, skip=skip
    )


def run_code(
    code: bytes,
    arch: Arch,
    memory: MemoryModel | None = None,
    *,
    address: int = 0,
    max_cycles: int | None = None,
    skip: bool = True,
) -> CycleRun:
    """Time the instructions of a program.

    Parameters
    ----------
    code : bytes
        The instructions, 64 bytes each.
    memory : MemoryModel
        Timing of the memory. With stalls, every cycle is simulated.
    address : int
        Of the first instruction: for messages, and where the fetch begins.
    max_cycles : int
        Give up after so many.
    skip : bool
        False simulates every cycle; the result is the same.

    Raises
    ------
    ValueError
        `code` holds no whole number of instructions.
    AcceleratorError
        The RTL would stop at a malformed instruction, or at the end without HALT. That an access leaves the memory is not
        noticed.
    CycleLimitError
        `max_cycles` are over.
    ToolMissingError, BuildError
        The C++ compiler is missing, or fails.
    """
    if not code or len(code) % INSTRUCTION_BYTES:
        raise ValueError(f"code must hold instructions of {INSTRUCTION_BYTES} bytes, not {len(code)} bytes")
    begin = time.perf_counter()
    storing = check_code(code, arch, address)
    check_s = time.perf_counter() - begin
    memory, library = memory or MemoryModel(), _library()
    options = _Options(FIRST_CYCLE, NO_LIMIT if max_cycles is None else max_cycles, skip and not memory.stall_probability)
    completed, result = np.zeros(len(storing), np.uint64), _Result()
    raw, config = np.frombuffer(code, np.uint8), _arch(arch)
    start = time.perf_counter()
    handle = library.nm_cycle_open(ctypes.byref(config), _pointer(raw), len(code) // INSTRUCTION_BYTES)
    try:
        library.nm_cycle_run(
            handle, ctypes.byref(config), ctypes.byref(_memory(memory, arch)), ctypes.byref(options), _pointer(completed),
            len(completed), ctypes.byref(result),
        )  # fmt: skip
    finally:
        library.nm_cycle_close(handle)
    seconds = time.perf_counter() - start
    if not result.finished:
        raise CycleLimitError(f"the program did not end within {max_cycles} cycles")
    return CycleRun(
        result.cycles, _counters(result), storing, completed.astype(np.int64), result.simulated, seconds, check_s
    )


def _counters(result: _Result) -> dict[str, int]:
    values = (result.cycles, *result.events, *result.read_beats, result.write_beats)
    return dict(zip(COUNTER_NAMES, map(int, values), strict=True))


def _arch(arch: Arch) -> _Arch:
    sizes = reader_sizes(arch)
    numbers = ctypes.c_uint32 * len(READERS)
    return _Arch(
        arch.rows, arch.lanes, arch.lane_depth, arch.row_depth, arch.bus_bytes,
        numbers(*(size for size, _ in sizes.values())), numbers(*(beats for _, beats in sizes.values())),
        arch.rows, writer_beats(arch), array_latency(arch), arch.sums_depth, arch.results_depth,
    )  # fmt: skip


def _memory(model: MemoryModel, arch: Arch) -> _Memory:
    return _Memory(model.latency, model.bandwidth(arch.bus_bytes), round(model.stall_probability * (1 << 32)), model.seed)


def _pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build()))
    pointer, number = ctypes.c_void_p, ctypes.c_uint64
    library.nm_cycle_open.restype, library.nm_cycle_open.argtypes = pointer, (pointer, pointer, number)
    library.nm_cycle_close.restype, library.nm_cycle_close.argtypes = None, (pointer,)
    library.nm_cycle_run.restype = None
    library.nm_cycle_run.argtypes = (pointer, pointer, pointer, pointer, pointer, number, pointer)
    return library


def _build() -> Path:
    """Compile the model, or find it in the cache."""
    compiler, header = find_cxx(), machine_header()
    sources = [path.read_text() for path in (_CPP / "cycle.cpp", _CPP / "timing.hpp", *sorted((_CPP / "cycle").glob("*.hpp")))]
    version = printed_by(compiler, "--version") + printed_by(compiler, "-march=native", "-Q", "--help=target")
    key = hashlib.sha256(json.dumps([header, sources, version, _FLAGS]).encode()).hexdigest()[:24]
    library = cache_dir() / "cycle" / f"{key}.so"
    with locked(library):
        if not library.is_file():
            with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as name:
                work = Path(name)
                (work / "machine.hpp").write_text(header)
                run_tool([compiler, *_FLAGS, f"-I{work}", str(_CPP / "cycle.cpp"), "-o", "cycle.so"], work)
                os.replace(work / "cycle.so", library)
    return library
