"""Position decoder against its words, bit by bit; the feeder as a whole is tested with the array."""

import random

import pytest
from amaranth.sim import Simulator

from hw.feeder import PositionDecoder, index_bits


def decode(word, *, bitmap, bits=1, steps):
    """Positions that the decoder gives for one word; it is frozen now and then."""
    dut, found, rng = PositionDecoder(), [], random.Random(word)

    async def bench(ctx):
        given = {"word": word, "load": 1, "advance": 1, "bitmap": bitmap, "bit": 0, "mask": (1 << bits) - 1}
        for name, value in given.items():
            ctx.set(getattr(dut, name), value)
        await ctx.tick()
        ctx.set(dut.load, 0)
        ctx.set(dut.advance, 0)
        for step in range(steps):
            while rng.random() < 0.3:
                await ctx.tick()
            found.append(ctx.get(dut.position))
            ctx.set(dut.advance, 1)
            ctx.set(dut.bit, (step + 1) * bits % 32)
            await ctx.tick()
            ctx.set(dut.advance, 0)
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return found


@pytest.mark.parametrize("seed", range(20))
def test_bitmap_gives_set_bits_in_order(seed):
    rng = random.Random(seed)
    word = rng.getrandbits(32) & (rng.getrandbits(32) if seed % 2 else 0xFFFFFFFF) | 1 << rng.randrange(32)
    positions = [p for p in range(32) if word >> p & 1]
    assert decode(word, bitmap=1, steps=len(positions)) == positions


@pytest.mark.parametrize("m", [2, 3, 4, 5, 8, 9, 16, 17, 32])
def test_index_gives_fields_in_order(m):
    bits = index_bits(m)
    positions = [random.Random(m).randrange(m) for _ in range(32 // bits)]
    word = sum(p << (i * bits) for i, p in enumerate(positions))
    assert decode(word, bitmap=0, bits=bits, steps=len(positions)) == positions
