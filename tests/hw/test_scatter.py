"""Scatter and Gather are inverses, whatever stalls in between."""

import random

from amaranth import Module, unsigned
from amaranth.lib import wiring
from amaranth.sim import Simulator

from hw.scatter import Gather, Scatter


def test_round_trip():
    rows, sets = 4, 12
    m = Module()
    m.submodules.scatter = scatter = Scatter(unsigned(8), rows=rows)
    m.submodules.gather = gather = Gather(unsigned(8), rows=rows)
    wiring.connect(m, scatter.o, gather.i)
    rng = random.Random(0)
    sent = [[rng.randrange(256) for _ in range(rows)] for _ in range(sets)]
    seen = []

    async def put(ctx):
        for values in sent:
            for port, value in zip(scatter.data, values, strict=True):
                ctx.set(port, value)
            ctx.set(scatter.valid, 1)
            await ctx.tick().until(scatter.ready)
            ctx.set(scatter.valid, 0)

    async def get(ctx):
        while len(seen) < sets:
            ctx.set(gather.ready, rng.randrange(2))
            _, _, valid, ready, *values = await ctx.tick().sample(gather.valid, gather.ready, *gather.data)
            if valid and ready:
                seen.append(values)

    sim = Simulator(m)
    sim.add_clock(1e-6)
    sim.add_testbench(put)
    sim.add_testbench(get)
    sim.run()
    assert seen == sent
