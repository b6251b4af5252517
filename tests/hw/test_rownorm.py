"""LayerNorm: model against floating point, constants, error messages."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from amaranth import Module
from amaranth.lib import wiring
from amaranth.sim import Simulator

from hw.arch import get_arch
from hw.isa import RowOp
from hw.rownorm import (
    RSQRT_TABLE,
    InverseRoot,
    Variance,
    layernorm_rows,
    norm_constants,
    norm_row_scale,
    rsqrt16,
)


def test_rsqrt16():
    v = np.arange(1 << 14, 1 << 16)
    rs = rsqrt16(v)
    assert len(RSQRT_TABLE) == 192 and 1 << 10 <= min(RSQRT_TABLE) and max(RSQRT_TABLE) < 1 << 11
    assert rs.min() >= 1 << 15 and rs.max() == 65535
    assert np.abs(rs * np.sqrt(v) / 2**23 - 1).max() < 2.3e-5


def test_norm_constants():
    for cols in [*range(1, 300), 384, 768, 1024, 8191, 8192, 65535]:
        ln_inv, ln_shift, row_mult, row_shift = norm_constants(cols)
        assert 1 << 15 <= ln_inv < 1 << 16 and 1 << 15 <= row_mult < 1 << 16
        assert 1 <= ln_shift <= 63 and 1 <= row_shift <= 40
        assert abs(ln_inv * 2.0**-ln_shift * cols / 64 - 1) <= 1.6e-5
        assert abs(row_mult * 2.0**-row_shift * 8 / cols - 1) <= 1.6e-5


def test_norm_constants_wrong_cols():
    with pytest.raises(TypeError, match="cols must be an int, not 3.0"):
        norm_constants(3.0)
    with pytest.raises(ValueError, match="cols must be in 1..65535, not 0"):
        norm_constants(0)
    with pytest.raises(ValueError, match="cols must be in 1..65535, not 65536"):
        norm_constants(65536)


def normalised(x, *, eps=1, rms=False):
    """z of the model: gamma 1, beta 0, shift 1 on 2 * z."""
    cols = x.shape[1]
    ln_inv, ln_shift, row_mult, row_shift = norm_constants(cols)
    constants = {"ln_inv": ln_inv, "ln_shift": ln_shift, "row_mult": row_mult, "row_shift": row_shift}
    gamma, beta, shift = np.full(cols, 2), np.zeros(cols), np.ones(cols, int)
    return layernorm_rows(x, gamma, beta, shift, eps=eps, rms=rms, **constants)


@pytest.mark.parametrize("cols", [2, 3, 32, 192, 384, 768])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_against_torch(cols, rms):
    rng = np.random.default_rng(cols)
    for sigma, offset in ((100, 0), (2000, 500), (8000, -9000)):
        x = np.clip(np.rint(rng.normal(offset, sigma, (200, cols))), -32768, 32767).astype(np.int64)
        wide = torch.from_numpy(x).double()
        if rms:
            true = wide / wide.square().mean(1, keepdim=True).sqrt()
        else:
            true = torch.nn.functional.layer_norm(wide, (cols,), eps=1e-9)
        centred = wide if rms else wide - wide.mean(1, keepdim=True)
        spread = centred.square().mean(1, keepdim=True).sqrt()
        # rounding of z; of the mean (2^-7, and ln_inv); of the reciprocal root and of m
        mean = 0 if rms else 2**-7 + 1.6e-5 * wide.mean(1, keepdim=True).abs()
        limit = 2**-11 + mean / spread + 1.3e-4 * true.abs()
        error = (torch.from_numpy(normalised(x, rms=rms)) / 1024 - true).abs()
        # below, the variance is clipped to 2^14 / cols^2 from below
        assert (error <= limit)[spread[:, 0] > 128 / cols].all()


def test_constant_row():
    assert not normalised(np.full((2, 64), 1234), eps=1 << 12).any()


def test_rounding_and_saturation():
    x = np.array([[-32768, 32767, 0, 1]])
    ln_inv, ln_shift, row_mult, row_shift = norm_constants(4)
    constants = {"ln_inv": ln_inv, "ln_shift": ln_shift, "row_mult": row_mult, "row_shift": row_shift}
    y = layernorm_rows(x, [32767] * 4, [(1 << 31) - 1] * 4, [1] * 4, eps=1, **constants)
    assert (y == 32767).all()


@pytest.mark.parametrize("op", [RowOp.LAYERNORM, RowOp.RMSNORM])
def test_widest_moments(op):
    """The row scale in hardware for the longest rows of any `Arch`, up to all 57 bits of variance."""
    arch = replace(get_arch("tiny"), row_depth=8192)
    m = Module()
    m.submodules.variance = variance = Variance(arch)
    m.submodules.root = root = InverseRoot(arch)
    wiring.connect(m, variance.o, root.i)
    rng = np.random.default_rng(2)
    cols, eps = 8192, (1 << 32) - 1
    moments = [(-cols << 15, cols << 30), (0, 0), (0, cols << 30), (cols * 32767, cols * 32767**2)]
    for _ in range(60):
        x = rng.integers(-(1 << rng.integers(1, 16)), 1 << rng.integers(0, 16), cols)
        moments.append((int(x.sum()), int((x * x).sum())))
    fields = dict(zip(("ln_inv", "ln_shift", "row_mult", "row_shift"), norm_constants(cols), strict=True))
    total, squares = np.array(moments).T
    expected = np.stack(norm_row_scale(total, squares, cols, eps=eps, rms=op == RowOp.RMSNORM, **fields), 1)
    seen = []

    async def put(ctx):
        job = {"op": int(op), "cols": cols, "ln_eps": eps, **fields}
        ctx.set(variance.job, job)
        ctx.set(root.job, job)
        ctx.set(variance.i.valid, 1)
        for values in moments:
            ctx.set(variance.i.payload, dict(zip(("total", "squares"), values, strict=True)))
            await ctx.tick().until(variance.i.ready)
        ctx.set(variance.i.valid, 0)

    async def get(ctx):
        while len(seen) < len(moments):
            ctx.set(root.o.ready, int(rng.random() < 0.7))
            _, _, valid, ready, payload = await ctx.tick().sample(root.o.valid, root.o.ready, root.o.payload)
            if valid and ready:
                seen.append([payload.mean, payload.mult, payload.shift + 1])

    sim = Simulator(m)
    sim.add_clock(1e-6)
    sim.add_testbench(put)
    sim.add_testbench(get)
    sim.run()
    assert seen == expected.tolist()
