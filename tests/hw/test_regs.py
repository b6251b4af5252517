# amaranth: UnusedElaboratable=no

import random
import re
from pathlib import Path

import pytest
from amaranth.sim import Simulator

from hw.arch import PRESETS
from hw.regs import (
    COUNTERS_AT,
    REGISTERS,
    Access,
    Registers,
    register_addresses,
    registers_markdown,
)
from hw.top import COUNTERS as TOP_COUNTERS

TINY = PRESETS["tiny"]
AT = register_addresses(["cycles", "beats"])
OKAY, SLVERR = 0, 2
COUNTERS = ("cycles", "beats")


class Host:
    """AXI4-Lite master with random pauses on every channel; checks that responses stay until taken."""

    def __init__(self, ctx, bus, stall=0.0, seed=0):
        self.ctx, self.bus, self.stall, self.random = ctx, bus, stall, random.Random(seed)

    async def pause(self):
        while self.random.random() < self.stall:
            await self.ctx.tick()

    async def write(self, address, value, strobe=0xF):
        """Return BRESP."""
        ctx, bus = self.ctx, self.bus
        first = self.random.choice(["aw", "w", "both"])
        ctx.set(bus.awaddr, address)
        ctx.set(bus.wdata, value)
        ctx.set(bus.wstrb, strobe)
        todo = {"aw", "w"}
        ctx.set(bus.awvalid, first != "w")
        ctx.set(bus.wvalid, first != "aw")
        while todo:
            _clk, _rst, awv, awr, wv, wr = await ctx.tick().sample(
                bus.awvalid, bus.awready, bus.wvalid, bus.wready
            )
            if awv and awr:
                todo.discard("aw")
            if wv and wr:
                todo.discard("w")
            ctx.set(bus.awvalid, "aw" in todo and (first != "w" or "w" not in todo or awv))
            ctx.set(bus.wvalid, "w" in todo and (first != "aw" or "aw" not in todo or wv))
        return (await self.response(bus.bvalid, bus.bready, bus.bresp))[0]

    async def read(self, address):
        """Return (RDATA, RRESP)."""
        ctx, bus = self.ctx, self.bus
        await self.pause()
        ctx.set(bus.araddr, address)
        ctx.set(bus.arvalid, 1)
        await ctx.tick().until(bus.arready)
        ctx.set(bus.arvalid, 0)
        return await self.response(bus.rvalid, bus.rready, bus.rdata, bus.rresp)

    async def response(self, valid, ready, *payload):
        ctx, held = self.ctx, None
        while True:
            ctx.set(ready, self.random.random() >= self.stall)
            _clk, _rst, v, r, *values = await ctx.tick().sample(valid, ready, *payload)
            assert held is None or (v and values == held)
            held = values if v else None
            if v and r:
                ctx.set(ready, 0)
                return tuple(values)


def run(bench, stall=0.0, arch=TINY):
    dut = Registers(arch, counters=COUNTERS)
    pulses = []

    async def watch(ctx):
        async for _clk, _rst, start, reset in ctx.tick().sample(dut.start, dut.soft_reset):
            if start:
                pulses.append("start")
            if reset:
                pulses.append("soft_reset")

    async def main(ctx):
        await bench(ctx, dut, Host(ctx, dut.bus, stall), pulses)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_process(watch)
    sim.add_testbench(main)
    sim.run()


async def pulse(ctx, signal):
    ctx.set(signal, 1)
    await ctx.tick()
    ctx.set(signal, 0)


@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_constants_and_contents(stall):
    async def bench(ctx, dut, host, pulses):
        assert await host.read(AT["ID"]) == (int.from_bytes(b"NMF1", "little"), OKAY)
        assert await host.read(AT["VERSION"]) == (0x10000, OKAY)
        assert await host.read(AT["CAP0"]) == (4 | 4 << 8 | 8 << 16 | 32 << 24, OKAY)
        assert await host.read(AT["CAP1"]) == (64 | 32 << 16, OKAY)
        assert await host.read(AT["CAP2"]) == (32 | 64 << 16, OKAY)
        assert await host.read(AT["CAP3"]) == (2, OKAY)
        assert await host.read(AT["WATCHDOG"]) == (1 << 20, OKAY)
        for name, port in (
            ("PROG_ADDR", dut.prog_addr),
            ("PROG_INSTRS", dut.prog_instrs),
            ("WATCHDOG", dut.watchdog),
        ):
            assert await host.write(AT[name], 0xDEADBEEF) == OKAY
            assert ctx.get(port) == 0xDEADBEEF
            assert await host.write(AT[name], 0x11223344, strobe=0b0101) == OKAY
            assert await host.read(AT[name]) == (0xDE22BE44, OKAY)
        assert pulses == []

    run(bench, stall)


def test_bad_accesses():
    async def bench(ctx, dut, host, pulses):
        known = set(AT.values())
        for address in range(0, 0x200, 4):
            value, response = await host.read(address)
            assert response == (OKAY if address in known else SLVERR)
            if address not in known:
                assert value == 0
        assert await host.read(0xFFC) == (0, SLVERR)
        read_only = {register.address for register in REGISTERS if register.access is Access.READ}
        for address in (*read_only, COUNTERS_AT, 0x34, 0xFFC):
            assert await host.write(address, 0xFFFFFFFF) == SLVERR
        assert await host.read(AT["ID"]) == (int.from_bytes(b"NMF1", "little"), OKAY)
        assert await host.read(AT["ERROR"]) == (0, OKAY)

    run(bench)


@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_control(stall):
    async def bench(ctx, dut, host, pulses):
        assert await host.write(AT["CTRL"], 1) == OKAY
        assert pulses == ["start"]
        ctx.set(dut.busy, 1)
        assert await host.read(AT["STATUS"]) == (1, OKAY)
        await host.write(AT["CTRL"], 1)
        assert pulses == ["start"]
        await host.write(AT["CTRL"], 3)
        assert pulses == ["start", "soft_reset"]
        ctx.set(dut.busy, 0)
        await host.write(AT["CTRL"], 3)
        assert pulses == ["start", "soft_reset", "soft_reset"]
        await host.write(AT["CTRL"], 7, strobe=0b1110)
        assert len(pulses) == 3
        assert await host.read(AT["CTRL"]) == (0, OKAY)
        await host.write(AT["CTRL"], 4)
        assert await host.read(AT["CTRL"]) == (4, OKAY)

    run(bench, stall)


def test_interrupt_and_error():
    async def bench(ctx, dut, host, pulses):
        await pulse(ctx, dut.done)
        assert not ctx.get(dut.irq)
        assert await host.read(AT["STATUS"]) == (0b1010, OKAY)
        await host.write(AT["CTRL"], 4)
        assert ctx.get(dut.irq)
        await host.write(AT["STATUS"], 0b1000)
        assert not ctx.get(dut.irq)
        assert await host.read(AT["STATUS"]) == (0b0010, OKAY)
        ctx.set(dut.error_code, 5)
        ctx.set(dut.error_addr, 0x12340)
        await pulse(ctx, dut.error)
        await ctx.tick()
        ctx.set(dut.error_code, 0)
        assert ctx.get(dut.irq)
        assert await host.read(AT["STATUS"]) == (0b1110, OKAY)
        assert await host.read(AT["ERROR"]) == (5, OKAY)
        assert await host.read(AT["ERROR_ADDR"]) == (0x12340, OKAY)
        await host.write(AT["STATUS"], 0b1111, strobe=0b1110)
        assert await host.read(AT["STATUS"]) == (0b1110, OKAY)
        await host.write(AT["STATUS"], 0b1100)
        assert not ctx.get(dut.irq)
        assert await host.read(AT["STATUS"]) == (0b0010, OKAY)
        await host.write(AT["CTRL"], 5)
        assert await host.read(AT["STATUS"]) == (0, OKAY)
        assert await host.read(AT["ERROR"]) == (0, OKAY)
        assert await host.read(AT["ERROR_ADDR"]) == (0, OKAY)

    run(bench)


def test_counters_latch():
    async def bench(ctx, dut, host, pulses):
        ctx.set(dut.counters, {"cycles": 0x1_FFFFFFFF, "beats": 7 << 32 | 9})
        assert await host.read(AT["CYCLES_LO"]) == (0xFFFFFFFF, OKAY)
        ctx.set(dut.counters, {"cycles": 0x2_00000000, "beats": 7 << 32 | 9})
        assert await host.read(AT["CYCLES_HI"]) == (1, OKAY)
        assert await host.read(AT["CYCLES_LO"]) == (0, OKAY)
        assert await host.read(AT["CYCLES_HI"]) == (2, OKAY)
        assert await host.read(AT["BEATS_LO"]) == (9, OKAY)
        assert await host.read(AT["BEATS_HI"]) == (7, OKAY)

    run(bench)


@pytest.mark.parametrize("name", [register.name for register in REGISTERS])
def test_table(name):
    register = next(register for register in REGISTERS if register.name == name)
    assert register.address % 4 == 0
    assert [r.address for r in REGISTERS].count(register.address) == 1
    assert sum(field.bits for field in register.fields) <= 32
    assert register.address < COUNTERS_AT


def test_fields():
    status = next(register for register in REGISTERS if register.name == "STATUS")
    assert [status.mask(name) for name in ("busy", "done", "error", "irq")] == [1, 2, 4, 8]
    with pytest.raises(KeyError, match="nothing"):
        status.mask("nothing")


def test_markdown():
    text = registers_markdown(dict.fromkeys(COUNTERS, "how many"))
    assert "| 0x108 | BEATS_LO, BEATS_HI | how many |" in text
    for register in REGISTERS:
        assert f"| {register.address:#05x} | {register.name} |" in text
    assert "| 7 | END |" in text


def test_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "registers.md"
    assert page.read_text() == registers_markdown(dict(TOP_COUNTERS)), "write registers_markdown() there"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"arch": "tiny"}, TypeError, "arch must be an Arch, not 'tiny'"),
        ({"counters": [1]}, TypeError, "counter name must be a str, not 1"),
        ({"counters": ["a b"]}, ValueError, "counter name must be an identifier, not 'a b'"),
        ({"counters": ["a", "a"]}, ValueError, "counters must have different names, not ('a', 'a')"),
    ],
)
def test_init_wrong(kwargs, error, message):
    kwargs = {"arch": TINY} | kwargs
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Registers(kwargs.pop("arch"), **kwargs)
