# amaranth: UnusedElaboratable=no

import random
import re

import pytest
from amaranth.sim import Simulator

from hw.gearbox import Narrower, Widener


def simulate(dut, words, fields, unpack, *, stall, count):
    """Send `words` (tuples of payload fields) through `dut`; return what comes out and the cycles it took."""
    rng, received, cycles = random.Random(1), [], 0

    async def source(ctx):
        for word in words:
            while rng.random() < stall:
                await ctx.tick()
            for name, value in zip(fields, word, strict=True):
                ctx.set(dut.i.payload[name], value)
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
            ctx.set(dut.i.valid, 0)

    async def sink(ctx):
        nonlocal cycles
        while len(received) < count:
            ctx.set(dut.o.ready, rng.random() >= stall)
            _clk, _rst, valid, ready, *payload = await ctx.tick().sample(
                dut.o.valid, dut.o.ready, *unpack(dut.o.payload)
            )
            cycles += 1
            if valid and ready:
                received.append(tuple(payload))
        ctx.set(dut.o.ready, 1)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(source)
    sim.add_testbench(sink)
    sim.run()
    assert len(received) == count
    return received, cycles


@pytest.mark.parametrize("stall", [0.0, 0.4])
@pytest.mark.parametrize(("in_bytes", "out_bytes"), [(8, 4), (32, 4), (16, 1)])
def test_narrower(in_bytes, out_bytes, stall):
    dut = Narrower(in_bytes=in_bytes, out_bytes=out_bytes)
    rng = random.Random(2)
    words = []
    for _ in range(60):
        first = rng.randrange(dut.ratio)
        words.append((rng.getrandbits(8 * in_bytes), first, rng.randrange(first, dut.ratio)))
    expected = dut.compute(words)
    got, cycles = simulate(
        dut, words, ("data", "first", "last"), lambda p: [p], stall=stall, count=len(expected)
    )
    assert [word for (word,) in got] == expected
    if not stall:
        assert cycles <= len(expected) + 1


@pytest.mark.parametrize("stall", [0.0, 0.4])
@pytest.mark.parametrize(("in_bytes", "out_bytes"), [(8, 4), (32, 4), (16, 1)])
def test_narrower_in_pairs(in_bytes, out_bytes, stall):
    dut = Narrower(in_bytes=in_bytes, out_bytes=out_bytes, pairs=True)
    rng, words, wides = random.Random(2), [], []
    for _ in range(60):
        wide = rng.randrange(2)
        first = rng.randrange(dut.ratio) & ~wide
        last = rng.randrange(first, dut.ratio) | wide
        words.append((rng.getrandbits(8 * in_bytes), first, last, wide))
        wides += [wide] * ((last - first) // (1 + wide) + 1)
    expected = dut.compute(words)
    got, cycles = simulate(dut, words, ("data", "first", "last", "wide"), lambda p: [p.data, p.wide], stall=stall,
                           count=len(expected))
    assert [wide for _, wide in got] == wides
    assert [word if wide else word % (1 << 8 * out_bytes) for word, wide in got] == expected
    if not stall:
        assert cycles <= len(expected) + 1


def check_filled(got, expected, in_bytes, ratio):
    """Masks are equal, and so is what they say was filled."""
    for (value, mask), (want, want_mask) in zip(got, expected, strict=True):
        assert mask == want_mask
        bytes_ = sum(((1 << 8 * in_bytes) - 1) << 8 * in_bytes * k for k in range(ratio) if mask >> k & 1)
        assert value & bytes_ == want & bytes_


@pytest.mark.parametrize("stall", [0.0, 0.4])
@pytest.mark.parametrize(("in_bytes", "out_bytes"), [(4, 8), (4, 32), (2, 4)])
def test_widener_in_pairs(in_bytes, out_bytes, stall):
    dut = Widener(in_bytes=in_bytes, out_bytes=out_bytes, pairs=True)
    rng, words, slot = random.Random(3), [], 0
    for _ in range(150):
        wide = 0 if slot % 2 else rng.randrange(2)
        last = rng.random() < 0.2
        words.append((rng.getrandbits(16 * in_bytes), slot, last, wide))
        slot = rng.randrange(dut.ratio) if last else (slot + 1 + wide) % dut.ratio
    expected = dut.compute(words)
    got, cycles = simulate(dut, words, ("data", "slot", "last", "wide"), lambda p: [p.data, p.mask], stall=stall,
                           count=len(expected))
    check_filled(got, expected, in_bytes, dut.ratio)
    if not stall:
        assert cycles <= len(words) + 2


@pytest.mark.parametrize("stall", [0.0, 0.4])
@pytest.mark.parametrize(("in_bytes", "out_bytes"), [(4, 8), (4, 32), (2, 4)])
def test_widener(in_bytes, out_bytes, stall):
    dut = Widener(in_bytes=in_bytes, out_bytes=out_bytes)
    rng = random.Random(3)
    words, slot = [], 0
    for _ in range(150):
        last = rng.random() < 0.2
        words.append((rng.getrandbits(8 * in_bytes), slot, last))
        slot = rng.randrange(dut.ratio) if last else (slot + 1) % dut.ratio
    expected = dut.compute(words)
    got, cycles = simulate(
        dut, words, ("data", "slot", "last"), lambda p: [p.data, p.mask], stall=stall, count=len(expected)
    )
    check_filled(got, expected, in_bytes, dut.ratio)
    if not stall:
        assert cycles <= len(words) + 2


@pytest.mark.parametrize(
    ("kind", "kwargs", "error", "message"),
    [
        (Narrower, {"in_bytes": "8", "out_bytes": 4}, TypeError, "in_bytes must be an int, not '8'"),
        (
            Narrower,
            {"in_bytes": 12, "out_bytes": 4},
            ValueError,
            "in_bytes must be a positive power of two, not 12",
        ),
        (
            Narrower,
            {"in_bytes": 4, "out_bytes": 4},
            ValueError,
            "in_bytes must be at least twice out_bytes (4), not 4",
        ),
        (
            Widener,
            {"in_bytes": 0, "out_bytes": 4},
            ValueError,
            "in_bytes must be a positive power of two, not 0",
        ),
        (
            Widener,
            {"in_bytes": 8, "out_bytes": 4},
            ValueError,
            "out_bytes must be at least twice in_bytes (8), not 4",
        ),
    ],
)
def test_init_wrong(kind, kwargs, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        kind(**kwargs)
