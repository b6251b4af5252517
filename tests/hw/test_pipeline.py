"""A pipeline delivers every value once, in order, whatever stalls."""

import random

import pytest
from amaranth import Module, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator

from hw.pipeline import Pipeline


class Square(wiring.Component):
    """Two stages: x * x, then plus x."""

    i: In(stream.Signature(unsigned(8)))
    o: Out(stream.Signature(unsigned(17)))

    def __init__(self, stages=2):
        self.stages = stages
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        pipe = Pipeline(m, self.i, self.o)
        x = pipe.stage(x=self.i.payload, square=self.i.payload * self.i.payload)
        x = pipe.stage(total=x.square + x.x)
        m.d.comb += self.o.payload.eq(x.total)
        pipe.finish(self.stages)
        return m


def test_stalls():
    dut = Square()
    rng = random.Random(0)
    sent = [rng.randrange(256) for _ in range(100)]
    seen = []

    async def put(ctx):
        for value in sent:
            while rng.random() < 0.3:
                await ctx.tick()
            ctx.set(dut.i.payload, value)
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
            ctx.set(dut.i.valid, 0)

    async def get(ctx):
        while len(seen) < len(sent):
            ctx.set(dut.o.ready, rng.randrange(2))
            _, _, valid, ready, payload = await ctx.tick().sample(dut.o.valid, dut.o.ready, dut.o.payload)
            if valid and ready:
                seen.append(payload)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(put)
    sim.add_testbench(get)
    sim.run()
    assert seen == [value * value + value for value in sent]


def test_number_of_stages():
    with pytest.raises(ValueError, match="the pipeline has 2 stages, not 3"):
        Square(stages=3).elaborate(None)
