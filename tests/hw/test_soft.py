"""Products of look-up tables."""

import random

import pytest
from amaranth import Module, Signal, signed, unsigned
from amaranth.sim import Simulator

from hw.soft import product


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize(("left", "right"), [(signed(16), unsigned(16)), (signed(16), signed(16)), (unsigned(5), unsigned(3)),
                                             (signed(4), signed(4)), (unsigned(7), signed(5))])
def test_product(left, right, spare):
    m, a, b = Module(), Signal(left), Signal(right)
    p = Signal(signed(40))
    m.d.comb += p.eq(product(a, b, spare=spare))
    rng = random.Random(1)

    def values(shape):
        low, high = (-(1 << (shape.width - 1)), (1 << (shape.width - 1)) - 1) if shape.signed else (0, (1 << shape.width) - 1)
        return [low, high, 0, *(rng.randint(low, high) for _ in range(20))]

    async def bench(ctx):
        for x in values(left):
            for y in values(right):
                ctx.set(a, x)
                ctx.set(b, y)
                await ctx.delay(1e-9)
                assert ctx.get(p) == x * y
    simulator = Simulator(m)
    simulator.add_testbench(bench)
    simulator.run()
