import random

import pytest
from amaranth.hdl import Module, Signal, unsigned
from amaranth.sim import Simulator

from hw.stream_util import Columns, StreamBuffer, StreamHold, StreamSkid


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


@pytest.mark.parametrize(("kind", "latency"), [(StreamSkid, 0), (StreamBuffer, 1)])
@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_skid_and_buffer(kind, latency, stall):
    """Nothing is lost, nothing waits when nobody stalls, and ready is a register."""
    dut, rng = kind(unsigned(8)), random.Random(2)
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
    assert stall or cycles <= len(words) + 1 + latency


def test_outputs_of_a_buffer_are_registers():
    dut, rng = StreamBuffer(unsigned(8)), random.Random(3)

    async def bench(ctx):
        for _ in range(50):
            before = ctx.get(dut.i.ready), ctx.get(dut.o.valid), ctx.get(dut.o.payload)
            ctx.set(dut.i.valid, rng.randrange(2))
            ctx.set(dut.i.payload, rng.getrandbits(8))
            ctx.set(dut.o.ready, rng.randrange(2))
            assert (ctx.get(dut.i.ready), ctx.get(dut.o.valid), ctx.get(dut.o.payload)) == before
            await ctx.tick()

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()


def test_columns():
    """Index, first and last of every column of commands of all lengths, with pauses."""
    m, count, move, rng = Module(), Signal(16), Signal(), random.Random(4)
    columns = Columns(m, count, move)

    async def bench(ctx):
        for length in [1, 1, 2, 3, 1, 2, 2, 5, 300, 1]:
            ctx.set(count, length)
            for index in range(length):
                while rng.random() < 0.3:
                    await ctx.tick()
                seen = ctx.get(columns.index), ctx.get(columns.first), ctx.get(columns.last)
                assert seen == (index, index == 0, index == length - 1)
                ctx.set(move, 1)
                await ctx.tick()
                ctx.set(move, 0)

    sim = Simulator(m)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()
