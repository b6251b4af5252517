"""The Verilator engine: the generated Verilog of an Arch, its memory, and a driver that speaks through the registers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hw.arch import Arch
from hw.isa import INSTRUCTION_BYTES, ErrorCode, Instruction
from hw.regs import REGISTERS, register_addresses
from hw.verilog import TOP_NAME, verilog
from sim.counters import COUNTER_NAMES
from sim.harness import Harness, Statistics
from sim.memory import MemoryModel
from sim.trace import Trace

__all__ = ["AcceleratorError", "CycleLimitError", "EngineRun", "VerilatorEngine"]

_REGISTERS = {register.name: register for register in REGISTERS}


class AcceleratorError(RuntimeError):
    """The accelerator stopped the program.

    Attributes
    ----------
    code : ErrorCode
    address : int
        Of the offending instruction.
    instruction : Instruction or None
        None where the bytes are no instruction.
    """

    def __init__(self, code: ErrorCode, address: int, raw: bytes) -> None:
        self.code, self.address = code, address
        try:
            self.instruction: Instruction | None = Instruction.decode(raw)
        except ValueError as error:
            self.instruction, text = None, f"no instruction: {error}"
        else:
            text = repr(self.instruction)
        super().__init__(f"the accelerator stopped with {code.name} at the instruction at {address:#x}: {text}")


class CycleLimitError(RuntimeError):
    """The program did not end within the given number of cycles."""


@dataclass(frozen=True)
class EngineRun:
    """What a program's run came to. cycles : from start to done, counted in RTL."""

    cycles: int
    counters: dict[str, int]
    statistics: Statistics


class VerilatorEngine:
    """An accelerator with its memory, reset and ready. Several programs may run one after the other.

    Use it as a context manager.

    Parameters
    ----------
    arch : Arch
    memory : ndarray of uint8
        The memory, from address 0, changed in place; a multiple of the bus width.
    model : MemoryModel
        Timing of the memory.
    log_writes, trace, progress
        As `Harness`.

    Raises
    ------
    ToolMissingError, BuildError
        As `sim.verilator.build`.
    """

    def __init__(
        self,
        arch: Arch,
        memory: NDArray[np.uint8],
        *,
        model: MemoryModel | None = None,
        log_writes: bool = False,
        trace: bool = False,
        progress: bool = True,
    ) -> None:
        self.arch = arch
        self.harness = Harness(
            verilog(arch), memory,
            bus_bytes=arch.bus_bytes, model=model, log_writes=log_writes, trace=trace,
            top=TOP_NAME, progress=progress,
        )
        self._addresses = register_addresses(COUNTER_NAMES)

    def __enter__(self) -> "VerilatorEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.harness.close()

    def write(self, register: str, value: int) -> None:
        """Write a register by name."""
        self.harness.write(self._addresses[register], value)

    def read(self, register: str) -> int:
        """Read a register by name."""
        return self.harness.read(self._addresses[register])

    def counters(self) -> dict[str, int]:
        """The performance counters. The low word latches the high one."""
        return {name: self.read(f"{name.upper()}_LO") | self.read(f"{name.upper()}_HI") << 32 for name in COUNTER_NAMES}

    def run(
        self,
        *,
        code_address: int,
        instructions: int,
        max_cycles: int,
        watchdog: int | None = None,
        trace: Trace | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> EngineRun:
        """Run a program to its end.

        Parameters
        ----------
        code_address, instructions
            Where the program is in the memory, and its length.
        max_cycles
            Give up after so many cycles.
        watchdog
            Cycles without progress that the accelerator itself allows; None keeps the register.
        trace
            What to record; the engine must have been made with ``trace=True``.
        progress
            Called with the cycles done, several times a second.

        Raises
        ------
        AcceleratorError
            The accelerator reports an error.
        CycleLimitError
            `max_cycles` are over. The accelerator has been reset; the memory is what it was at that moment.
        ProtocolError
            The accelerator broke a rule of AXI.
        """
        if watchdog is not None:
            self.write("WATCHDOG", watchdog)
        self.write("PROG_ADDR", code_address)
        self.write("PROG_INSTRS", instructions)
        self._start(trace)
        if not self.harness.run(max_cycles, progress):
            self.harness.reset()
            raise CycleLimitError(f"the program did not end within {max_cycles} cycles")
        statistics = self.harness.statistics
        self.harness.close_trace()
        self._raise_for_error()
        self.write("STATUS", _mask("STATUS", "irq"))
        counters = self.counters()
        return EngineRun(counters["cycles"], counters, statistics)

    def _start(self, trace: Trace | None) -> None:
        if trace is not None:
            now = self.harness.statistics.cycle
            stop = None if trace.stop is None else now + trace.stop
            self.harness.trace(Path(trace.path), now + trace.start, stop)
        self.write("CTRL", _mask("CTRL", "start") | _mask("CTRL", "irq_enable"))

    def _raise_for_error(self) -> None:
        if not self.read("STATUS") & _mask("STATUS", "error"):
            return
        code, address = ErrorCode(self.read("ERROR")), self.read("ERROR_ADDR")
        self.write("STATUS", _mask("STATUS", "irq"))
        raw = self.harness.memory[address : address + INSTRUCTION_BYTES].tobytes()
        raise AcceleratorError(code, address, raw)


def _mask(register: str, field: str) -> int:
    return _REGISTERS[register].mask(field)
