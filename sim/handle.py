"""Any Verilog module as a Python object: set its inputs, tick its clock, look inside.

    dut = Dut(text, "counter")
    dut.io.enable = 1
    dut.clock.tick(3)
    print(dut.io.value, dut.internals.inner.state)

In the manner of PyVerilator, for debugging and for tests of small modules; whole programs run in `sim.simulate`.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sim.harness import HarnessError, check_writeable
from sim.verilator import Build, build

__all__ = ["Array", "Clock", "Dut", "Scope", "Signal"]

_INPUT, _OUTPUT = 1, 2  # Verilator's VLVD_IN, VLVD_OUT


@dataclass(frozen=True)
class Signal:
    """A signal's place: its name, bits, whether it may be set, and where Verilator keeps it.

    entries : 0, or the number of elements of a memory. low : index of the first. size : bytes of one element.
    """

    name: str
    bits: int
    direction: int
    size: int
    entries: int
    low: int
    address: int


class Scope:
    """Signals and sub-scopes as attributes, or by ``scope["name"]`` where the name is not an identifier.

    Reading settles the design first. Setting takes an int, masked to the signal's width (so -1 sets every bit).
    """

    _dut: "Dut"
    _name: str
    _signals: dict[str, Signal]
    _scopes: dict[str, "Scope"]

    def __init__(self, dut: "Dut", name: str) -> None:
        self.__dict__.update(_dut=dut, _name=name, _signals={}, _scopes={})

    def __getitem__(self, name: str) -> Any:
        if name in self._scopes:
            return self._scopes[name]
        signal = self._find(name)
        if signal.entries:
            return Array(self._dut, signal)
        self._dut.settle()
        return _get(signal, 0)

    def __setitem__(self, name: str, value: int) -> None:
        signal = self._find(name)
        if signal.entries:
            raise TypeError(f"{self._name}.{name} is a memory: set its elements")
        if self._name == "io" and signal.direction != _INPUT:
            raise ValueError(f"io.{name} is an output")
        self._dut.touch()
        _set(signal, 0, value, f"{self._name}.{name}")

    def _find(self, name: str) -> Signal:
        if name not in self._signals:
            raise AttributeError(f"{self._name} has no signal {name!r}; it has {', '.join(self) or 'none'}")
        return self._signals[name]

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __setattr__(self, name: str, value: int) -> None:
        self[name] = value

    def __iter__(self) -> Iterator[str]:
        return iter([*self._signals, *self._scopes])

    def __len__(self) -> int:
        return len(self._signals) + len(self._scopes)

    def __dir__(self) -> list[str]:
        return [*self._signals, *self._scopes]

    def __repr__(self) -> str:
        if self._dut.closed:
            return f"{self._name}(closed)"
        values = (f"{name}={_get(signal, 0):#x}" for name, signal in self._signals.items() if not signal.entries)
        return f"{self._name}({', '.join([*values, *self._scopes])})"

    def width(self, name: str) -> int:
        """Bits of a signal (of one element, if it is a memory)."""
        return self._find(name).bits


class Array:
    """A memory inside the design: ``dut.internals.ram[5]``, ``dut.internals.ram[5] = 1``, ``len``, iteration."""

    def __init__(self, dut: "Dut", signal: Signal) -> None:
        self._dut, self._signal = dut, signal

    def _index(self, index: int) -> int:
        position = index - self._signal.low
        if not 0 <= position < self._signal.entries:
            low, high = self._signal.low, self._signal.low + self._signal.entries - 1
            raise IndexError(f"{self._signal.name} has elements {low}..{high}, not {index!r}")
        return position

    def __getitem__(self, index: int) -> int:
        self._dut.settle()
        return _get(self._signal, self._index(index))

    def __setitem__(self, index: int, value: int) -> None:
        self._dut.touch()
        _set(self._signal, self._index(index), value, f"{self._signal.name}[{index}]")

    def __len__(self) -> int:
        return self._signal.entries

    def __iter__(self) -> Iterator[int]:
        return (self[self._signal.low + i] for i in range(len(self)))


class Clock:
    """The clock input."""

    def __init__(self, dut: "Dut", name: str, address: int) -> None:
        self._dut, self._name, self._address = dut, name, address

    def tick(self, cycles: int = 1) -> None:
        """Settle the inputs, then so many rising and falling edges."""
        if not isinstance(cycles, int) or cycles < 0:
            raise ValueError(f"cycles must be a natural number, not {cycles!r}")
        self._dut.tick(self._address, cycles)

    def __repr__(self) -> str:
        return f"Clock({self._name!r})"


class Dut:
    """A Verilated module.

    Parameters
    ----------
    verilog : str
        Text that holds the module and what it instantiates.
    top : str
        Name of the module.
    clock : str
        Its clock input; without such an input ``dut.clock`` raises.
    internals : bool
        Keep every signal visible (slower to simulate).
    trace : bool
        Build with tracing, so that `start_trace` works.
    progress : bool
        Report a build on stderr.

    Attributes
    ----------
    io : Scope
        The ports.
    internals : Scope
        The signals inside; instances are sub-scopes.
    clock : Clock

    Raises
    ------
    ToolMissingError, BuildError
        As `sim.verilator.build`.
    """

    def __init__(
        self,
        verilog: str,
        top: str,
        *,
        clock: str = "clk",
        internals: bool = True,
        trace: bool = False,
        progress: bool = True,
    ) -> None:
        flags = ("--public-flat-rw" if internals else "--public-flat",)
        self.build: Build = build(verilog, "dut.cpp", top=top, flags=flags, trace=trace, progress=progress)
        self._library = _load(self.build.library)
        self._pointer: int | None = self._library.dut_open()
        self._dirty, self._traced, self._clock_name = True, trace, clock
        self.io, self.internals = Scope(self, "io"), Scope(self, top)
        self._fill(top)

    def _fill(self, top: str) -> None:
        for line in self._library.dut_signals(self._pointer).decode().splitlines():
            path, name, *numbers = line.split("\t")
            signal = Signal(name, *(int(number) for number in numbers))
            parts = path.split(".")
            if parts == ["TOP", "TOP"]:
                self.io._signals[name] = signal
            elif parts[:2] == ["TOP", top]:
                self._scope(parts[2:])._signals[name] = signal

    def _scope(self, path: list[str]) -> Scope:
        scope = self.internals
        for part in path:
            scope = scope._scopes.setdefault(part, Scope(self, f"{scope._name}.{part}"))
        return scope

    def __enter__(self) -> "Dut":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the simulation and finish its trace. A second call does nothing."""
        if self._pointer is not None:
            self._library.dut_close(self._pointer)
            self._pointer = None

    @property
    def closed(self) -> bool:
        """The simulation has ended."""
        return self._pointer is None

    def _handle(self) -> int:
        if self._pointer is None:
            raise HarnessError("the simulation is closed")
        return self._pointer

    @property
    def clock(self) -> Clock:
        """The clock input, named at construction."""
        self._handle()
        return Clock(self, self._clock_name, self.io._find(self._clock_name).address)

    def eval(self) -> None:
        """Let the design settle. Reading a signal does so by itself."""
        self._library.dut_eval(self._handle())
        self._dirty = False

    def settle(self) -> None:
        """`eval` if something was set since the last one."""
        self._handle()
        if self._dirty:
            self.eval()

    def touch(self) -> None:
        """Note that something is about to be set."""
        self._handle()
        self._dirty = True

    def tick(self, clock: int, cycles: int) -> None:
        """Toggle the clock at that address; `Clock.tick` is the way to say it."""
        self.settle()
        self._library.dut_tick(self._handle(), clock, cycles)

    def start_trace(self, path: str | Path) -> None:
        """Write every settling from now on to an FST file.

        Raises
        ------
        HarnessError
            Not built with ``trace=True``, or the file cannot be written.
        """
        if not self._traced:
            raise HarnessError("this module was built without traces: give trace=True")
        check_writeable(path)
        self._library.dut_trace(self._handle(), str(path).encode())

    def stop_trace(self) -> None:
        """Finish the trace file."""
        self._library.dut_close_trace(self._handle())


def _get(signal: Signal, index: int) -> int:
    raw = ctypes.string_at(signal.address + index * signal.size, signal.size)
    return int.from_bytes(raw, "little") & ((1 << signal.bits) - 1)


def _set(signal: Signal, index: int, value: int, name: str) -> None:
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} takes an int, not {value!r}")
    masked = value.__index__() & ((1 << signal.bits) - 1)
    ctypes.memmove(signal.address + index * signal.size, masked.to_bytes(signal.size, "little"), signal.size)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    signatures: dict[str, tuple[type | None, tuple[type, ...]]] = {
        "dut_open": (pointer, ()),
        "dut_close": (None, (pointer,)),
        "dut_signals": (text, (pointer,)),
        "dut_eval": (None, (pointer,)),
        "dut_tick": (None, (pointer, pointer, ctypes.c_uint64)),
        "dut_trace": (None, (pointer, text)),
        "dut_close_trace": (None, (pointer,)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
