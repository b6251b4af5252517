"""The FIFO against Amaranth's, cycle by cycle."""

import random

import pytest
from amaranth import Module
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.sim import Simulator

from hw.queue import Fifo


@pytest.mark.parametrize("depth", [2, 3, 8, 9, 33])
@pytest.mark.parametrize("fullness", [0.3, 0.5, 0.7])
def test_behaves_as_amaranths(depth, fullness):
    m, rng = Module(), random.Random(depth)
    m.submodules.dut = dut = Fifo(width=8, depth=depth)
    m.submodules.model = model = SyncFIFOBuffered(width=8, depth=depth)
    levels = set()

    async def bench(ctx):
        for cycle in range(600):
            likely = fullness if cycle % 200 < 100 else 1 - fullness
            for name, value in (("w_data", rng.getrandbits(8)), ("w_en", rng.random() < likely), ("r_en", rng.random() > likely)):
                ctx.set(getattr(dut, name), value)
                ctx.set(getattr(model, name), value)
            for name in ("w_rdy", "r_rdy", "level"):
                assert ctx.get(getattr(dut, name)) == ctx.get(getattr(model, name)), (cycle, name)
            if ctx.get(model.r_rdy):
                assert ctx.get(dut.r_data) == ctx.get(model.r_data)
            levels.add(ctx.get(model.level))
            assert ctx.get(dut.empty) == (ctx.get(model.level) == 0)
            await ctx.tick()

    simulator = Simulator(m)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert 0 in levels and (depth in levels or fullness == 0.5)
