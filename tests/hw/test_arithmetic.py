"""Clipping, rounding and products in pieces against integers."""

import random

import pytest
from amaranth import Module, Signal, signed, unsigned
from amaranth.sim import Simulator

from hw.arithmetic import fold, parts, rounded, saturate


def values(shape, rng, count=20):
    low, high = (-(1 << (shape.width - 1)), (1 << (shape.width - 1)) - 1) if shape.signed else (0, (1 << shape.width) - 1)
    some = [rng.randint(low, high) for _ in range(2 * count)]
    return [low, high, 0, 1, *some[count:], *(value >> 9 for value in some[:count])]


def evaluate(inputs, output, cases):
    """What a combinational expression gives for each tuple of inputs."""
    m, o, found = Module(), Signal(signed(96)), []
    m.d.comb += o.eq(output)

    async def bench(ctx):
        for case in cases:
            for signal, value in zip(inputs, case, strict=True):
                ctx.set(signal, value)
            await ctx.delay(1e-9)
            found.append(ctx.get(o))
    simulator = Simulator(m)
    simulator.add_testbench(bench)
    simulator.run()
    return found


@pytest.mark.parametrize("width", [18, 33, 49])
@pytest.mark.parametrize("bits", [8, 16, 17])
def test_clipping_and_rounding(width, bits):
    a, limit = Signal(signed(width)), 1 << (bits - 1)
    edges = [scale * edge + d for edge in (-limit, limit) for scale in (1, 2) for d in range(-4, 5)]
    cases = values(signed(width), random.Random(width))
    cases += [edge for edge in edges if -(1 << (width - 1)) <= edge < 1 << (width - 1)]
    clip = [max(-limit, min(limit - 1, x)) for x in cases]
    assert evaluate([a], saturate(a, bits), [(x,) for x in cases]) == clip
    assert evaluate([a], rounded(a, bits), [(x,) for x in cases]) == [max(-limit, min(limit - 1, (x + 1) >> 1)) for x in cases]


@pytest.mark.parametrize("options", [{}, {"bits": 27}, {"spare": True}], ids=str)
@pytest.mark.parametrize(("left", "right"), [(signed(32), signed(16)), (unsigned(41), unsigned(16)), (signed(26), signed(26)),
                                             (signed(24), unsigned(16)), (unsigned(16), unsigned(22)), (signed(16), signed(16))])
def test_parts(left, right, options):
    a, b = Signal(left), Signal(right)
    terms = parts(a, b, **options)
    while len(terms) > 1:
        half = fold(terms)
        assert len(half) == (len(terms) + 1) // 2
        terms = half
    rng = random.Random(1)
    cases = [(x, y) for x in values(left, rng, 6) for y in values(right, rng, 6)]
    assert terms[0][1] == 0
    assert evaluate([a, b], terms[0][0], cases) == [x * y for x, y in cases]
