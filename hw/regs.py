"""Control and status registers on AXI4-Lite, declared once.

`REGISTERS` and the counters' names give the RTL, the constants of the driver (`register_addresses`) and the
page `docs/registers.md` (`registers_markdown`).
"""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amaranth.hdl import Cat, Const, Module, ResetSignal, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import Arch
from hw.axi import AXI4LiteSignature, Response
from hw.isa import INSTRUCTION_BYTES, ErrorCode
from hw.isa_check import MAX_M

__all__ = [
    "ADDR_WIDTH",
    "COUNTERS_AT",
    "REGISTERS",
    "VERSION",
    "Access",
    "Register",
    "RegisterField",
    "Registers",
    "register_addresses",
    "registers_markdown",
]

ADDR_WIDTH = 12
"""Address bits of the AXI4-Lite slave: 4 KiB."""

COUNTERS_AT = 0x100
"""Address of the first performance counter; counter k is at ``COUNTERS_AT + 8 * k`` (low word) and 4
above."""

VERSION = 0x0001_0000
"""Version of register map and instruction set: major in the upper half, minor in the lower."""


class Access(enum.Enum):
    """What a bus access may do to a register; a write to a READ register is answered with SLVERR."""

    READ = "read"
    READ_WRITE = "read, write"
    CLEAR = "read, write 1 to clear"


@dataclass(frozen=True)
class RegisterField:
    """Bits of a register, lowest first; ``self_clearing`` bits are pulses and read as 0."""

    name: str
    bits: int
    doc: str
    self_clearing: bool = False


@dataclass(frozen=True)
class Register:
    """One 32-bit register; without fields it is one number."""

    name: str
    address: int
    access: Access
    doc: str
    fields: tuple[RegisterField, ...] = ()
    reset: int = 0

    def field_offset(self, name: str) -> int:
        """Lowest bit of a field.

        Raises
        ------
        KeyError
            No such field.
        """
        offset = 0
        for field in self.fields:
            if field.name == name:
                return offset
            offset += field.bits
        raise KeyError(name)

    def mask(self, name: str) -> int:
        """Mask of a field in place."""
        bits = next((field.bits for field in self.fields if field.name == name), 0)
        return ((1 << bits) - 1) << self.field_offset(name)


REGISTERS: tuple[Register, ...] = (
    Register("ID", 0x00, Access.READ, 'identity: the bytes "NMF1"', reset=int.from_bytes(b"NMF1", "little")),
    Register("VERSION", 0x04, Access.READ, "version of register map and instruction set", (
        RegisterField("minor", 16, "compatible additions"),
        RegisterField("major", 16, "incompatible changes"),
    ), reset=VERSION),
    Register("CAP0", 0x08, Access.READ, "capabilities", (
        RegisterField("rows", 8, "token rows"),
        RegisterField("lanes", 8, "lanes"),
        RegisterField("bus_bytes", 8, "data width of the AXI4 master in bytes"),
        RegisterField("m_max", 8, "largest M of an N:M pattern"),
    )),
    Register("CAP1", 0x0C, Access.READ, "capabilities", (
        RegisterField("lane_depth", 16, "columns that fit the ring buffer of a lane"),
        RegisterField("row_depth", 16, "columns of one bank of the row unit"),
    )),
    Register("CAP2", 0x10, Access.READ, "capabilities", (
        RegisterField("psum_depth", 16, "columns of partial sums kept on chip"),
        RegisterField("instruction_bytes", 16, "bytes of an instruction"),
    )),
    Register("CAP3", 0x14, Access.READ, "capabilities", (
        RegisterField("counters", 8, "number of performance counters"),
    )),
    Register("CTRL", 0x18, Access.READ_WRITE, "control", (
        RegisterField("start", 1, "run the program; clears STATUS and ERROR; ignored while busy",
                      self_clearing=True),
        RegisterField("soft_reset", 1, "stop and forget the program; a start in the same write is ignored",
                      self_clearing=True),
        RegisterField("irq_enable", 1, "let STATUS.irq drive the interrupt line"),
    )),
    Register("STATUS", 0x1C, Access.CLEAR, "status", (
        RegisterField("busy", 1, "a program runs (not clearable)"),
        RegisterField("done", 1, "the program reached HALT"),
        RegisterField("error", 1, "the program was stopped; see ERROR"),
        RegisterField("irq", 1, "done or error came up since this bit was cleared"),
    )),
    Register("ERROR", 0x20, Access.READ, "why the program was stopped (values below)", (
        RegisterField("code", 8, "error code"),
    )),
    Register("ERROR_ADDR", 0x24, Access.READ, "byte address of the offending instruction"),
    Register("PROG_ADDR", 0x28, Access.READ_WRITE, "byte address of the program, a multiple of 64"),
    Register("PROG_INSTRS", 0x2C, Access.READ_WRITE, "number of instructions of the program"),
    Register("WATCHDOG", 0x30, Access.READ_WRITE,
             "stop with TIMEOUT after so many cycles without progress; 0: never", reset=1 << 20),
)
"""The register map below `COUNTERS_AT`."""


def register_addresses(counters: Iterable[str] = ()) -> dict[str, int]:
    """Addresses by register name, for drivers; counter ``x`` gives ``X_LO`` and ``X_HI``."""
    addresses = {register.name: register.address for register in REGISTERS}
    for k, name in enumerate(counters):
        addresses[f"{name.upper()}_LO"] = COUNTERS_AT + 8 * k
        addresses[f"{name.upper()}_HI"] = COUNTERS_AT + 8 * k + 4
    return addresses


def registers_markdown(counters: Mapping[str, str]) -> str:
    """Text of ``docs/registers.md``; ``counters`` gives the meaning of each counter by name."""
    lines = [
        "# Registers", "",
        "Generated from `hw/regs.py`. AXI4-Lite, 32-bit data, addresses in bytes (lowest two bits ignored).",
        "Reading or writing another address, or writing a read-only register, is answered with SLVERR",
        "(and reads 0). Byte strobes are honoured.", "",
        "| address | name | access | reset | meaning |", "|---|---|---|---|---|",
    ]
    detail = []
    for register in REGISTERS:
        reset = "by preset" if register.name.startswith("CAP") else f"{register.reset:#x}"
        cells = (f"{register.address:#05x}", register.name, register.access.value, reset, register.doc)
        lines.append(f"| {' | '.join(cells)} |")
        for field in register.fields:
            low = register.field_offset(field.name)
            bits = f"{low}" if field.bits == 1 else f"{low + field.bits - 1}..{low}"
            doc = field.doc + (" (self-clearing)" if field.self_clearing else "")
            detail.append(f"| {register.name} | {bits} | {field.name} | {doc} |")
    meaning = [
        f"| {COUNTERS_AT + 8 * k:#05x} | {name.upper()}_LO, {name.upper()}_HI | {doc} |"
        for k, (name, doc) in enumerate(counters.items())
    ]
    codes = [f"| {code.value} | {code.name} |" for code in ErrorCode]
    return "\n".join([
        *lines, "", "## Fields", "", "| register | bits | field | meaning |", "|---|---|---|---|", *detail,
        "", "## Performance counters", "",
        "64 bits, read-only: the low word at the address given, the high word 4 above. Reading a low word",
        "latches its high word.",
        "", "| address | names | meaning |", "|---|---|---|", *meaning,
        "", "## Error codes", "", "| value | name |", "|---|---|", *codes, "",
    ])


class Registers(wiring.Component):
    """AXI4-Lite slave with the registers of `REGISTERS` and 64-bit performance counters.

    Address and data of a write may come in any order; one read and one write at a time. From the later of AW
    and W to BVALID: 2 cycles; from AR to RVALID: 2 cycles. `start` and `soft_reset` are pulses, one cycle
    before BVALID.

    Parameters
    ----------
    arch : Arch
        Given in the capability registers.
    counters : sequence of str
        Names of the counters.

    Members
    -------
    bus : ``In(AXI4LiteSignature(12))``
    irq : ``Out(1)``
        Level: ``STATUS.irq`` and ``CTRL.irq_enable``.
    start, soft_reset : ``Out(1)``
        Pulses. `start` comes only while `busy` is low.
    prog_addr, prog_instrs, watchdog : ``Out(32)``
        Contents of the registers.
    busy : ``In(1)``
        A program runs. Should rise in the cycle after `start`.
    done : ``In(1)``
        Pulse: the program has ended.
    error : ``In(1)``
        Pulse: the program was stopped; with `error_code`, `error_addr`, which stay for another cycle.
    error_code : ``In(ErrorCode)``
    error_addr : ``In(32)``
    counters : ``In(StructLayout)``
        Values of the counters, 64 bits each, by name.
    """

    def __init__(self, arch: Arch, *, counters: Sequence[str] = ()) -> None:
        if not isinstance(arch, Arch):
            raise TypeError(f"arch must be an Arch, not {arch!r}")
        names = tuple(counters)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"counter name must be a str, not {name!r}")
            if not name.isidentifier():
                raise ValueError(f"counter name must be an identifier, not {name!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"counters must have different names, not {names!r}")
        if len(names) > 128:
            raise ValueError(f"counters must be at most 128, not {len(names)!r}")
        self.arch = arch
        self.names = names
        super().__init__({
            "bus":         In(AXI4LiteSignature(ADDR_WIDTH)),
            "irq":         Out(1),
            "start":       Out(1),
            "soft_reset":  Out(1),
            "prog_addr":   Out(32),
            "prog_instrs": Out(32),
            "watchdog":    Out(32),
            "busy":        In(1),
            "done":        In(1),
            "error":       In(1),
            "error_code":  In(8),
            "error_addr":  In(32),
            "counters":    In(data.StructLayout(dict.fromkeys(names, 64))),
        })

    @property
    def capabilities(self) -> dict[str, int]:
        """Contents of the CAP registers' fields."""
        arch = self.arch
        return {
            "rows": arch.rows, "lanes": arch.lanes, "bus_bytes": arch.bus_bytes, "m_max": MAX_M,
            "lane_depth": arch.lane_depth, "row_depth": arch.row_depth, "psum_depth": arch.psum_depth,
            "instruction_bytes": INSTRUCTION_BYTES, "counters": len(self.names),
        }

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        state = {
            register.name: Signal(32, name=register.name.lower(), init=register.reset)
            for register in REGISTERS
            if register.access is not Access.READ or register.name in ("ERROR", "ERROR_ADDR")
        }
        self._write(m, state)
        self._events(m, state)
        self._read(m, state)
        m.d.comb += [
            self.prog_addr.eq(state["PROG_ADDR"]),
            self.prog_instrs.eq(state["PROG_INSTRS"]),
            self.watchdog.eq(state["WATCHDOG"]),
        ]
        return m

    def _write(self, m: Module, state: dict[str, Signal]) -> None:
        """Take AW and W in any order; then write and answer."""
        bus = self.bus
        have_addr = Signal()
        have_data = Signal()
        addr = Signal(ADDR_WIDTH - 2)
        value = Signal(32)
        strobe = Signal(4)
        write = Signal()
        control = Signal()  # the address is CTRL's: what starts a program is known early
        ctrl = next(register for register in REGISTERS if register.name == "CTRL")
        m.d.comb += [
            # not ready in reset, which ends a cycle after the reset input
            bus.awready.eq(~have_addr & ~ResetSignal()),
            bus.wready.eq(~have_data & ~ResetSignal()),
            write.eq(have_addr & have_data & ~bus.bvalid),
        ]
        with m.If(bus.awvalid & bus.awready):
            m.d.sync += [have_addr.eq(1), addr.eq(bus.awaddr[2:]), control.eq(bus.awaddr[2:] == ctrl.address >> 2)]
        with m.If(bus.wvalid & bus.wready):
            m.d.sync += [have_data.eq(1), value.eq(bus.wdata), strobe.eq(bus.wstrb)]
        with m.If(bus.bready):
            m.d.sync += bus.bvalid.eq(0)
        enabled = Cat(bit.replicate(8) for bit in strobe)
        command = {field.name: write & control & (value & enabled)[ctrl.field_offset(field.name)] for field in ctrl.fields}
        m.d.comb += [self.soft_reset.eq(command["soft_reset"]),
                     self.start.eq(command["start"] & ~command["soft_reset"] & ~self.busy)]
        with m.If(write):
            m.d.sync += [have_addr.eq(0), have_data.eq(0), bus.bvalid.eq(1), bus.bresp.eq(Response.SLVERR)]
            with m.Switch(addr):
                for register in REGISTERS:
                    if register.access is not Access.READ:
                        with m.Case(register.address >> 2):
                            m.d.sync += bus.bresp.eq(Response.OKAY)
                            self._write_one(m, register, state[register.name], value & enabled, enabled)

    def _write_one(
        self, m: Module, register: Register, current: Signal, value: Value, enabled: Value
    ) -> None:
        if register.access is Access.CLEAR:
            m.d.sync += current.eq(current & ~value)
        elif not register.fields:
            m.d.sync += current.eq((current & ~enabled) | value)
        elif register.name == "CTRL":
            bit = register.field_offset("irq_enable")
            with m.If(enabled[bit]):
                m.d.sync += current[bit].eq(value[bit])

    def _events(self, m: Module, state: dict[str, Signal]) -> None:
        """Let start, done and error change STATUS, ERROR and ERROR_ADDR; they win over a write."""
        register = next(register for register in REGISTERS if register.name == "STATUS")
        done, error, irq = (state["STATUS"][register.field_offset(name)] for name in ("done", "error", "irq"))
        control = next(register for register in REGISTERS if register.name == "CTRL")
        failed = Signal()  # a cycle late: the end of a program comes at the end of long paths
        m.d.sync += failed.eq(self.error)
        with m.If(failed):
            m.d.sync += [state["ERROR"].eq(self.error_code), state["ERROR_ADDR"].eq(self.error_addr)]
        with m.If(self.start):
            m.d.sync += [done.eq(0), error.eq(0), irq.eq(0), state["ERROR"].eq(0), state["ERROR_ADDR"].eq(0)]
        with m.If(self.done):
            m.d.sync += [done.eq(1), irq.eq(1)]
        with m.If(self.error):
            m.d.sync += [error.eq(1), irq.eq(1)]
        m.d.comb += self.irq.eq(irq & state["CTRL"][control.field_offset("irq_enable")])

    def _read(self, m: Module, state: dict[str, Signal]) -> None:
        """Answer reads; the low word of a counter latches its high word."""
        bus = self.bus
        have_addr = Signal()
        addr = Signal(ADDR_WIDTH - 2)
        high = Signal(32)
        m.d.comb += bus.arready.eq(~have_addr & ~ResetSignal() & ~bus.rvalid)
        with m.If(bus.arvalid & bus.arready):
            m.d.sync += [have_addr.eq(1), addr.eq(bus.araddr[2:])]
        with m.If(bus.rready):
            m.d.sync += bus.rvalid.eq(0)
        with m.If(have_addr):
            m.d.sync += [have_addr.eq(0), bus.rvalid.eq(1), bus.rdata.eq(0), bus.rresp.eq(Response.OKAY)]
            with m.Switch(addr):
                for register in REGISTERS:
                    with m.Case(register.address >> 2):
                        m.d.sync += bus.rdata.eq(self._value(register, state))
                for k, name in enumerate(self.names):
                    with m.Case((COUNTERS_AT >> 2) + 2 * k):
                        value = self.counters[name]
                        m.d.sync += [bus.rdata.eq(value[:32]), high.eq(value[32:])]
                    with m.Case((COUNTERS_AT >> 2) + 2 * k + 1):
                        m.d.sync += bus.rdata.eq(high)
                with m.Default():
                    m.d.sync += bus.rresp.eq(Response.SLVERR)

    def _value(self, register: Register, state: dict[str, Signal]) -> Value:
        """What a read of the register gives."""
        if register.name == "STATUS":
            return Cat(self.busy, state["STATUS"][1:])
        if register.name in state:
            return state[register.name]
        if register.name.startswith("CAP"):
            return Cat(Const(self.capabilities[field.name], field.bits) for field in register.fields)
        return Const(register.reset, 32)
