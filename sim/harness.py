"""One simulated design with its memory: the C++ harness as a Python object. Whole runs stay inside C++."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from sim.memory import MemoryModel
from sim.verilator import Build, build

__all__ = ["Harness", "HarnessError", "ProtocolError", "Statistics", "WriteLog", "WriteTimes", "check_writeable"]

_SLICE = 200_000
"""Cycles per call into C++: between slices Python sees Ctrl-C and reports progress."""

_PATIENCE = 100_000
"""Cycles that one register access may take."""

_INTERRUPT, _SLICE_OVER, _NO_ANSWER, _PROTOCOL = 1, 0, -1, -2


class HarnessError(RuntimeError):
    """The simulated design did not do what the harness needs."""


class ProtocolError(HarnessError):
    """The design broke a rule of AXI; the message names rule and cycle."""


class _Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64)
                for name in ("latency", "bytes_per_cycle", "stall_threshold", "seed", "log_writes")]


class _Statistics(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64)
                for name in ("cycle", "started", "finished", "read_bursts", "read_bytes", "write_bursts", "write_bytes",
                             "hazards", "hazard_cycle", "hazard_read", "hazard_write")]


class _Run(ctypes.Structure):
    _fields_ = [("address", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


class _Time(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint64), ("cycle", ctypes.c_uint64)]


@dataclass(frozen=True)
class Statistics:
    """What the harness counted since it was opened.

    `cycle` is now; `started` is the cycle that follows the last accepted register write, `finished` the first one after it
    with the interrupt raised (0: not yet). `hazards` counts reads and writes in flight together that share more
    than one beat; the other three describe the first: cycle, read address, write address.
    """

    cycle: int
    started: int
    finished: int
    read_bursts: int
    read_bytes: int
    write_bursts: int
    write_bytes: int
    hazards: int
    hazard_cycle: int
    hazard_read: int
    hazard_write: int


@dataclass(frozen=True, eq=False)
class WriteLog:
    """Every byte written, in the order of the memory's responses: contiguous runs and their bytes one after the other.

    address, length : int64 (runs,). data : uint8 (sum of lengths,).
    """

    address: NDArray[np.int64]
    length: NDArray[np.int64]
    data: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class WriteTimes:
    """When the write bursts of a log were answered: `logged` bytes were in the log in absolute `cycle`. int64 (bursts,)."""

    logged: NDArray[np.int64]
    cycle: NDArray[np.int64]


class Harness:
    """A design with the accelerator's ports, and its memory.

    Use it as a context manager. After construction the design has been reset.

    Parameters
    ----------
    verilog : str
        Design with module `top`.
    memory : ndarray of uint8
        Contents, from address 0. The design reads and writes this very array. Its size must be a multiple of the bus width;
        an access beyond it is answered with SLVERR.
    bus_bytes : int
        Width of the master's data.
    model : MemoryModel
        Timing.
    log_writes : bool
        Keep a `WriteLog`.
    trace : bool
        Build with tracing, so that `trace` works.
    top : str
        Name of the module.
    progress : bool
        Report a build on stderr.

    Raises
    ------
    TypeError, ValueError
        A bad argument.
    ToolMissingError, BuildError
        As `sim.verilator.build`.
    """

    def __init__(
        self,
        verilog: str,
        memory: NDArray[np.uint8],
        *,
        bus_bytes: int,
        model: MemoryModel | None = None,
        log_writes: bool = False,
        trace: bool = False,
        top: str = "nmforge_top",
        progress: bool = True,
    ) -> None:
        if not isinstance(memory, np.ndarray) or memory.dtype != np.uint8 or memory.ndim != 1:
            raise TypeError("memory must be a one-dimensional array of uint8")
        if not memory.flags.c_contiguous or not memory.flags.writeable:
            raise ValueError("memory must be contiguous and writeable")
        if bus_bytes not in (8, 16, 32, 64, 128):
            raise ValueError(f"bus_bytes must be 8, 16, 32, 64 or 128, not {bus_bytes!r}")
        if len(memory) == 0 or len(memory) % bus_bytes:
            raise ValueError(f"memory must hold a multiple of {bus_bytes} bytes, not {len(memory)}")
        self.memory = memory
        self.build: Build = build(
            verilog, "harness.cpp", top=top, defines={"NM_BUS_BYTES": bus_bytes}, trace=trace, progress=progress
        )
        self._library = _load(self.build.library)
        config = _config(model or MemoryModel(), bus_bytes, log_writes)
        self._pointer: int | None = self._library.nm_open(
            ctypes.byref(config), memory.ctypes.data_as(ctypes.c_void_p), len(memory)
        )
        self._traced = trace

    def __enter__(self) -> "Harness":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the simulation and finish its trace. A second call does nothing."""
        if self._pointer is not None:
            self._library.nm_close(self._pointer)
            self._pointer = None

    def _handle(self) -> int:
        if self._pointer is None:
            raise HarnessError("the simulation is closed")
        return self._pointer

    def reset(self, cycles: int = 4) -> None:
        """Hold `rst` for so many cycles; the memory forgets what was in flight, not its contents."""
        self._library.nm_reset(self._handle(), cycles)

    def write(self, address: int, value: int) -> None:
        """Write a register.

        Raises
        ------
        ValueError
            Not a word address, or a value of more than 32 bits.
        HarnessError
            The design does not answer, or answers with an error.
        """
        _check_address(address)
        if not 0 <= value < 1 << 32:
            raise ValueError(f"a register has 32 bits: {value!r} does not fit")
        self._check(self._library.nm_write(self._handle(), address, value, _PATIENCE), "write", address)

    def read(self, address: int) -> int:
        """Read a register. Raises as `write`."""
        _check_address(address)
        word = ctypes.c_uint32()
        self._check(
            self._library.nm_read(self._handle(), address, ctypes.byref(word), _PATIENCE), "read", address
        )
        return word.value

    def _check(self, answer: int, what: str, address: int) -> None:
        if answer == 0:
            return
        if answer == _PROTOCOL:
            raise ProtocolError(self._error())
        problem = "was not answered" if answer == _NO_ANSWER else f"was answered with error {answer}"
        raise HarnessError(f"register {what} at 0x{address:x} {problem}")

    def _error(self) -> str:
        return str(self._library.nm_error(self._handle()).decode())

    @property
    def interrupt(self) -> bool:
        """The interrupt is raised."""
        return bool(self._library.nm_interrupt(self._handle()))

    def run(self, max_cycles: int, progress: Callable[[int], None] | None = None) -> bool:
        """Run until the interrupt rises, or for `max_cycles`. Returns whether it rose.

        Parameters
        ----------
        progress : callable
            Called with the cycles done, several times a second.

        Raises
        ------
        ProtocolError
            The design broke a rule of AXI.
        """
        done = 0
        while done < max_cycles:
            cycles = min(_SLICE, max_cycles - done)
            stop = self._library.nm_run(self._handle(), cycles)
            if stop == _PROTOCOL:
                raise ProtocolError(self._error())
            if stop == _INTERRUPT:
                return True
            done += cycles
            if progress is not None:
                progress(done)
        return False

    def trace(self, path: str | Path, start: int = 0, stop: int | None = None) -> None:
        """Write cycles `start` to `stop` (absolute, end excluded) to an FST file. Time 2c is the middle of cycle c, 2c + 1 the
        edge after it.

        Raises
        ------
        HarnessError
            Not built with ``trace=True``, or the file cannot be written.
        """
        if not self._traced:
            raise HarnessError("this simulation was built without traces: give trace=True")
        last = (1 << 64) - 1 if stop is None else stop
        check_writeable(path)
        self._library.nm_trace(self._handle(), str(path).encode(), start, last)

    def close_trace(self) -> None:
        """Finish the trace file."""
        self._library.nm_close_trace(self._handle())

    @property
    def statistics(self) -> Statistics:
        """Counts so far."""
        raw = _Statistics()
        self._library.nm_statistics(self._handle(), ctypes.byref(raw))
        return Statistics(**{field.name: getattr(raw, field.name) for field in fields(Statistics)})

    def write_log(self) -> WriteLog:
        """A copy of the log so far (empty without `log_writes`)."""
        runs, data = ctypes.c_void_p(), ctypes.c_void_p()
        count = self._library.nm_log_runs(self._handle(), ctypes.byref(runs))
        size = self._library.nm_log_bytes(self._handle(), ctypes.byref(data))
        table = _copy(runs, count * ctypes.sizeof(_Run)).view(np.int64).reshape(-1, 2)
        return WriteLog(table[:, 0].copy(), table[:, 1].copy(), _copy(data, size))

    def write_times(self) -> WriteTimes:
        """A copy of the bursts' times so far (empty without `log_writes`)."""
        times = ctypes.c_void_p()
        count = self._library.nm_log_times(self._handle(), ctypes.byref(times))
        table = _copy(times, count * ctypes.sizeof(_Time)).view(np.int64).reshape(-1, 2)
        return WriteTimes(table[:, 0].copy(), table[:, 1].copy())

    def clear_log(self) -> None:
        """Forget the log so far."""
        self._library.nm_clear_log(self._handle())


def check_writeable(path: str | Path) -> None:
    """Raise `HarnessError` if a trace cannot go there: Verilator's writer would not say."""
    try:
        with open(path, "wb"):
            pass
    except OSError as error:
        raise HarnessError(f"cannot write the trace to {path}: {error.strerror}") from error


def _copy(pointer: ctypes.c_void_p, size: int) -> NDArray[np.uint8]:
    return np.frombuffer(ctypes.string_at(pointer, size) if size else b"", np.uint8)


def _check_address(address: int) -> None:
    if not isinstance(address, int) or not 0 <= address < 4096 or address % 4:
        raise ValueError(f"a register address is a multiple of 4 below 4096, not {address!r}")


def _config(model: MemoryModel, bus_bytes: int, log_writes: bool) -> _Config:
    return _Config(
        latency=model.latency,
        bytes_per_cycle=model.bandwidth(bus_bytes),
        stall_threshold=round(model.stall_probability * (1 << 32)),
        seed=model.seed,
        log_writes=int(log_writes),
    )


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, number, text = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p
    signatures: dict[str, tuple[type | None, tuple[type, ...]]] = {
        "nm_open": (pointer, (pointer, pointer, number)),
        "nm_close": (None, (pointer,)),
        "nm_reset": (None, (pointer, number)),
        "nm_run": (ctypes.c_int, (pointer, number)),
        "nm_write": (ctypes.c_int, (pointer, ctypes.c_uint32, ctypes.c_uint32, number)),
        "nm_read": (ctypes.c_int, (pointer, ctypes.c_uint32, pointer, number)),
        "nm_interrupt": (ctypes.c_int, (pointer,)),
        "nm_trace": (None, (pointer, text, number, number)),
        "nm_close_trace": (None, (pointer,)),
        "nm_statistics": (None, (pointer, pointer)),
        "nm_error": (text, (pointer,)),
        "nm_log_runs": (number, (pointer, pointer)),
        "nm_log_bytes": (number, (pointer, pointer)),
        "nm_log_times": (number, (pointer, pointer)),
        "nm_clear_log": (None, (pointer,)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
