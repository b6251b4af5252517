"""The row unit against its model, with and without stalls on every stream; the model against floating point."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from amaranth.sim import Simulator

from hw.arch import get_arch
from hw.isa import RowOp
from hw.row import (
    RowUnit,
    exp_rows,
    layernorm_rows,
    max_rows,
    norm_constants,
    row_scale_softmax,
    softmax_rows,
)

TINY = get_arch("tiny")
WIDE = replace(TINY, name="wide", rows=8, lanes=8, bus_bytes=16, row_depth=64)


@dataclass
class Job:
    """A command with its columns and parameters."""

    op: RowOp
    x: np.ndarray  #: (rows, cols)
    fields: dict
    params: np.ndarray | None = None  #: (cols, 3): beta, gamma, shift


def softmax_job(x, op=RowOp.SOFTMAX, *, first=0, last=0, row_mult=16384, row_shift=14):
    return Job(op, x, {"first": first, "last": last, "row_mult": row_mult, "row_shift": row_shift})


def norm_job(rng, x, op=RowOp.LAYERNORM, *, eps=1):
    cols = x.shape[1]
    names = ("ln_inv", "ln_shift", "row_mult", "row_shift")
    params = np.stack([rng.integers(-(1 << 20), 1 << 20, cols), rng.integers(-32768, 32768, cols),
                       rng.integers(12, 24, cols)], 1)
    return Job(op, x, {**dict(zip(names, norm_constants(cols), strict=True)), "ln_eps": eps}, params)


def expected(jobs, rows):
    """Columns and row scales, from the models."""
    columns, scales = [], []
    mx, total = np.full(rows, -32768), np.zeros(rows, np.int64)
    for job in jobs:
        scale = job.fields.get("row_mult"), job.fields.get("row_shift")
        if job.op == RowOp.MAX:
            mx = max_rows(job.x) if job.fields["first"] else max_rows(job.x, mx)
        elif job.op == RowOp.SOFTMAX:
            mx = max_rows(job.x)
            p, m, s = softmax_rows(job.x, *scale)
            columns.extend(p.T.tolist())
            scales.append((m.tolist(), s.tolist()))
        elif job.op == RowOp.EXP:
            p, total = exp_rows(job.x, mx, 0 if job.fields["first"] else total)
            columns.extend(p.T.tolist())
            if job.fields["last"]:
                m, s = row_scale_softmax(total, *scale)
                scales.append((m.tolist(), s.tolist()))
        else:
            beta, gamma, shift = job.params.T
            fields = {k: v for k, v in job.fields.items() if k != "ln_eps"}
            y = layernorm_rows(job.x, gamma, beta, shift, eps=job.fields["ln_eps"],
                               rms=job.op == RowOp.RMSNORM, **fields)
            columns.extend(y.T.tolist())
    return columns, scales


async def put(ctx, stream, payloads, rng, stall):
    for payload in payloads:
        while rng.random() < stall:
            await ctx.tick()
        ctx.set(stream.payload, payload)
        ctx.set(stream.valid, 1)
        await ctx.tick().until(stream.ready)
        ctx.set(stream.valid, 0)


async def get(ctx, stream, count, rng, stall, convert):
    result = []
    for _ in range(count):
        while rng.random() < stall:
            await ctx.tick()
        ctx.set(stream.ready, 1)
        payload, = await ctx.tick().sample(stream.payload).until(stream.valid)
        result.append(convert(payload))
        ctx.set(stream.ready, 0)
    return result


def run(arch, jobs, *, stall=(0, 0, 0, 0, 0), seed=0, limit=20000):
    """Simulate; return the cycle of each column in, of each column out and of each row scale, after checking all."""
    dut = RowUnit(arch)
    columns, scales = expected(jobs, arch.rows)
    seen_columns, seen_scales, times = [], [], {"i": [], "o": [], "scale": [], "busy": []}
    commands = [{"op": int(job.op), "cols": job.x.shape[1], **job.fields} for job in jobs]
    inputs = [column for job in jobs for column in job.x.T.tolist()]
    params = [dict(zip(("bias", "mult", "shift"), values, strict=True))
              for job in jobs if job.params is not None for values in job.params.tolist()]

    def feeder(stream, payloads, rate, key):
        async def testbench(ctx):
            await put(ctx, stream, payloads, np.random.default_rng(seed + key), rate)
        return testbench

    def sink(stream, count, rate, key, convert, seen):
        async def testbench(ctx):
            seen.extend(await get(ctx, stream, count, np.random.default_rng(seed + key), rate, convert))
        return testbench

    async def watch(ctx):
        cycle, left = 0, 12
        while left:
            _, _, i, o, scale, busy = await ctx.tick().sample(
                dut.i.valid & dut.i.ready, dut.o.valid & dut.o.ready, dut.scale.valid & dut.scale.ready, dut.busy)
            for key, bit in (("i", i), ("o", o), ("scale", scale), ("busy", busy)):
                if bit:
                    times[key].append(cycle)
            cycle += 1
            done = len(times["i"]) == len(inputs) and len(times["o"]) == len(columns)
            if done and len(times["scale"]) == len(scales):
                left -= 1
            if cycle == limit:
                raise AssertionError(f"hangs: {[(key, len(value)) for key, value in times.items()]}")
        times["cycles"] = cycle

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(feeder(dut.cmd, commands, stall[0], 1), background=True)
    sim.add_testbench(feeder(dut.i, inputs, stall[1], 2), background=True)
    sim.add_testbench(feeder(dut.params, params, stall[2], 3), background=True)
    sim.add_testbench(sink(dut.o, len(columns), stall[3], 4, list, seen_columns), background=True)
    sim.add_testbench(sink(dut.scale, len(scales), stall[4], 5, lambda p: (list(p.mult), list(p.shift)),
                           seen_scales), background=True)
    sim.add_testbench(watch)
    sim.run()
    assert seen_columns == columns
    assert seen_scales == scales
    return times


def test_one():
    rng = np.random.default_rng(1)
    x = rng.integers(-3000, 3000, (4, 8))
    print(run(TINY, [softmax_job(x)]))
    print(run(TINY, [norm_job(rng, x)]))
    print(run(TINY, [softmax_job(x)]*6))
    print(run(TINY, [norm_job(rng, x)]*6))
