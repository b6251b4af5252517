"""Reciprocal of softmax sums: model against floating point, pipeline against model."""

import numpy as np
from amaranth.sim import Simulator

from hw.rowscale import SoftmaxScale, bit_length, recip16, row_scale_softmax


def test_bit_length():
    values = [0, 1, 2, 3, 255, 256, (1 << 32) - 1, 1 << 32, (1 << 57) - 1, 1 << 57, (1 << 62) + 1]
    assert bit_length(values).tolist() == [value.bit_length() for value in values]


def test_recip16():
    mantissa = np.arange(1 << 15, 1 << 16)
    r = recip16(mantissa)
    assert r[0] == 65535 and r.min() >= 1 << 15
    assert (r[1:] == [2**31 // v for v in mantissa[1:].tolist()]).all()


def test_row_scale():
    total = np.arange(1, 1 << 18)
    for row_mult in (1 << 14, 23170, (1 << 15) - 1):
        m, s = row_scale_softmax(total, row_mult, 10)
        assert m.max() < 1 << 15
        error = m * 2.0**-s * total / (row_mult * 2.0**-10) - 1
        assert -1.9e-4 < error.min() and error.max() < 4e-5


def test_row_scale_ends():
    m, s = row_scale_softmax([0, 1, (1 << 24) - 1], 16384, 60)
    assert (m.tolist(), s.tolist()) == ([0, 16383, 8192], [1, 60, 63])


def test_pipeline():
    dut = SoftmaxScale()
    rng = np.random.default_rng(0)
    total = np.concatenate([[0, 1, 2, 3, (1 << 24) - 1, 1 << 23], 1 << np.arange(24),
                            rng.integers(0, 1 << rng.integers(1, 25, 100))]).tolist()
    row_mult = rng.integers(0, 1 << 16, len(total)).tolist()
    row_shift = rng.integers(0, 64, len(total)).tolist()
    expected = [tuple(int(v) for v in row_scale_softmax(t, m, s)) for t, m, s in
                zip(total, row_mult, row_shift, strict=True)]
    seen = []

    async def put(ctx):
        ctx.set(dut.i.valid, 1)
        for values in zip(total, row_mult, row_shift, strict=True):
            ctx.set(dut.i.payload, dict(zip(("total", "row_mult", "row_shift"), values, strict=True)))
            await ctx.tick().until(dut.i.ready)
        ctx.set(dut.i.valid, 0)

    async def get(ctx):
        while len(seen) < len(expected):
            ctx.set(dut.o.ready, int(rng.random() < 0.7))
            _, _, valid, ready, payload = await ctx.tick().sample(dut.o.valid, dut.o.ready, dut.o.payload)
            if valid and ready:
                seen.append((payload.mult, payload.shift))

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(put)
    sim.add_testbench(get)
    sim.run()
    assert seen == expected
