import random

import pytest
from amaranth.hdl import unsigned
from amaranth.sim import Simulator

from hw.stream_util import StreamHold, StreamSkid


@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_hold(stall):
    dut = StreamHold(unsigned(8))
    rng = random.Random(1)
    words, got = [rng.getrandbits(8) for _ in range(50)], []
    cycles = 0

    async def source(ctx):
        for word in words:
            while rng.random() < stall:
                await ctx.tick()
            ctx.set(dut.i.payload, word)
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
            ctx.set(dut.i.valid, 0)

    async def sink(ctx):
        nonlocal cycles
        while len(got) < len(words):
            ctx.set(dut.o.ready, rng.random() >= stall)
            _clk, _rst, valid, ready, payload = await ctx.tick().sample(
                dut.o.valid, dut.o.ready, dut.o.payload
            )
            cycles += 1
            if valid and ready:
                got.append(payload)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(source)
    sim.add_testbench(sink)
    sim.run()
    assert got == words
    if not stall:
        assert cycles == 2 * len(words)


def test_ready_does_not_depend_on_the_sink():
    dut = StreamHold(unsigned(8))

    async def bench(ctx):
        ctx.set(dut.i.valid, 1)
        await ctx.tick()
        for ready in (0, 1):
            ctx.set(dut.o.ready, ready)
            assert ctx.get(dut.o.valid)
            assert not ctx.get(dut.i.ready)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()


@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_skid(stall):
    """Nothing is lost, nothing waits when nobody stalls, and ready is a register."""
    dut, rng = StreamSkid(unsigned(8)), random.Random(2)
    words, got, cycles = [rng.getrandbits(8) for _ in range(60)], [], 0

    async def source(ctx):
        for word in words:
            while rng.random() < stall:
                await ctx.tick()
            ctx.set(dut.i.payload, word)
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
            ctx.set(dut.i.valid, 0)

    async def sink(ctx):
        nonlocal cycles
        while len(got) < len(words):
            before = ctx.get(dut.i.ready)
            ctx.set(dut.o.ready, rng.random() >= stall)
            assert ctx.get(dut.i.ready) == before
            _clk, _rst, valid, ready, payload = await ctx.tick().sample(dut.o.valid, dut.o.ready, dut.o.payload)
            cycles += 1
            if valid and ready:
                got.append(payload)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(source)
    sim.add_testbench(sink)
    sim.run()
    assert got == words
    assert stall or cycles <= len(words) + 1
