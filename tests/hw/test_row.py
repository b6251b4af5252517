# amaranth: UnusedElaboratable=no
"""The row unit against its model, with and without stalls on every stream; the model against floats."""

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
    """Simulate and compare with the models; return the cycles of columns in, columns out and row scales."""
    dut = RowUnit(arch)
    columns, scales = expected(jobs, arch.rows)
    seen_columns, seen_scales, times = [], [], {"i": [], "o": [], "scale": [], "busy": [], "stalled": []}
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
            _, _, *bits = await ctx.tick().sample(
                *(port.valid & port.ready for port in (dut.i, dut.o, dut.scale)), dut.busy, dut.stalled)
            for key, bit in zip(times, bits, strict=True):
                if bit:
                    times[key].append(cycle)
            cycle += 1
            done = len(times["i"]) == len(inputs) and len(times["o"]) == len(columns)
            if done and len(times["scale"]) == len(scales):
                left -= 1
            if cycle == limit:
                raise AssertionError(f"hangs: {[(key, len(value)) for key, value in times.items()]}")

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
    last = max(times["i"][-1:] + times["o"][-1:] + times["scale"][-1:])
    assert times["busy"] and times["busy"][-1] <= last + 2  # idle again
    return times




def mixed_jobs(arch, rng, count):
    """Commands of all kinds, one after the other, with extreme values among the random ones."""
    jobs = []
    while len(jobs) < count:
        cols = int(rng.choice([1, 2, 3, 5, 8, 13, arch.row_depth]))
        span = int(rng.choice([1, 300, 3000, 32768]))
        x = rng.integers(-span, span, (arch.rows, cols))
        x[rng.random(x.shape) < rng.choice([0, 0.3, 0.9])] = -32768
        x[0] = rng.choice([x[0, 0], -32768, 32767])
        kind = rng.integers(4)
        scale = {"row_mult": int(rng.integers(1 << 14, 1 << 15)), "row_shift": int(rng.integers(1, 41))}
        if kind == 0:
            jobs.append(softmax_job(x, **scale))
        elif kind == 1:
            blocks = np.array_split(x, range(4, cols, 4), axis=1)
            for op in (RowOp.MAX, RowOp.EXP):
                jobs += [softmax_job(block, op, first=n == 0, last=n == len(blocks) - 1, **scale)
                         for n, block in enumerate(blocks)]
        else:
            op = RowOp.LAYERNORM if kind == 2 else RowOp.RMSNORM
            jobs.append(norm_job(rng, x, op, eps=int(rng.choice([0, 1, 1 << 20, (1 << 32) - 1]))))
    return jobs


STALLS = {
    "none": (0, 0, 0, 0, 0),
    "all": (0.5, 0.3, 0.3, 0.3, 0.6),
    "inputs": (0.8, 0.7, 0, 0, 0),
    "params": (0, 0, 0.8, 0, 0),
    "columns": (0, 0, 0, 0.8, 0),
    "scales": (0, 0, 0, 0, 0.98),
}


@pytest.mark.parametrize("stall", STALLS.values(), ids=STALLS)
@pytest.mark.parametrize("arch", [TINY, WIDE], ids=lambda arch: arch.name)
def test_mixed(arch, stall):
    jobs = mixed_jobs(arch, np.random.default_rng(arch.rows), 18)
    times = run(arch, jobs, stall=stall)
    assert bool(times["stalled"]) == bool(stall[3] or stall[4])


def extremes(rows, cols):
    """Rows that are constant, alternate between the ends of int16, or hold one outlier."""
    x = np.zeros((rows, cols), np.int64)
    x[0], x[1], x[2, :], x[3, 0] = -32768, 32767, np.where(np.arange(cols) % 2, 32767, -32768), 32767
    return x


@pytest.mark.parametrize("cols", [1, TINY.row_depth])
def test_extremes(cols):
    x = extremes(4, cols)
    rng = np.random.default_rng(3)
    run(TINY, [softmax_job(x), norm_job(rng, x, eps=0), norm_job(rng, x, RowOp.RMSNORM, eps=0),
               softmax_job(x[::-1]), softmax_job(-x - 1), norm_job(rng, -x - 1)])


def test_saturated_mean():
    """Constants that no compiler makes still give the same bits."""
    rng = np.random.default_rng(4)
    job = norm_job(rng, extremes(4, 8))
    job.fields |= {"ln_inv": 65535, "ln_shift": 1, "row_mult": 65535, "row_shift": 1}
    run(TINY, [job, norm_job(rng, extremes(4, 3))])


def test_softmax_rate():
    rng = np.random.default_rng(5)
    jobs = [softmax_job(rng.integers(-3000, 3000, (8, 8))) for _ in range(6)]
    times = run(WIDE, jobs)
    assert times["o"][0] - times["i"][7] == 6
    assert times["scale"][0] - times["o"][7] == WIDE.rows + 22
    for key, distance in (("i", 9), ("o", 9)):
        assert (np.diff(times[key][::8]) == distance).all()
    assert (np.diff(times["scale"]) == 9).all()


def test_max_exp_rate():
    rng = np.random.default_rng(6)
    x = rng.integers(-3000, 3000, (8, 8))
    jobs = [softmax_job(x, op, first=1, last=1) for op in (RowOp.MAX, RowOp.EXP) * 4]
    times = run(WIDE, jobs)
    assert (np.diff(times["i"][::8]) == 9).all()


def test_norm_rate():
    rng = np.random.default_rng(7)
    jobs = [norm_job(rng, rng.integers(-3000, 3000, (8, 40))) for _ in range(4)]
    times = run(WIDE, jobs)
    assert times["o"][0] - times["i"][39] == WIDE.rows + 32
    assert (np.diff(times["o"][::40]) == 44).all()


def test_init():
    dut = RowUnit("tiny")
    assert dut.arch is TINY
    assert RowUnit(WIDE).arch is WIDE


def test_init_wrong_arch():
    with pytest.raises(TypeError, match="arch must be a preset name or an Arch, not 3"):
        RowUnit(3)
    with pytest.raises(ValueError, match="unknown arch preset 'huge'"):
        RowUnit("huge")


def test_softmax_model():
    """Probabilities after the division by their sum, against floating point."""
    rng = np.random.default_rng(8)
    for cols in (1, 7, 128, 384):
        scores = rng.integers(-2000, 2000, (64, cols))
        scores[:, cols // 2 + 1:] = -32768
        p, m, s = softmax_rows(scores, 16384, 14)
        true = np.where(scores == -32768, 0, 2.0 ** ((scores - scores.max(1, keepdims=True)) / 256))
        true /= true.sum(1, keepdims=True)
        # each p is off by at most 0.64 / 255 of the largest one, and so is, on the average, the sum
        largest = true.max(1, keepdims=True)
        limit = largest * 0.64 / 255 * (1 + true * cols) + 2**-12 * true + 1e-9
        assert (np.abs(p * (m * 2.0**-s)[:, None] - true) <= limit).all()


def test_softmax_blocks():
    rng = np.random.default_rng(9)
    scores = rng.integers(-4000, 4000, (16, 96))
    mx, total, blocks = -32768, 0, []
    for block in np.split(scores, 4, axis=1):
        mx = max_rows(block, mx)
    for block in np.split(scores, 4, axis=1):
        p, total = exp_rows(block, mx, total)
        blocks.append(p)
    p, m, s = softmax_rows(scores, 20000, 9)
    assert (np.concatenate(blocks, 1) == p).all()
    assert (np.array(row_scale_softmax(total, 20000, 9)) == (m, s)).all()


def test_softmax_all_masked():
    p, m, s = softmax_rows(np.full((2, 5), -32768), 16384, 14)
    assert not p.any() and (m == 0).all() and (s == 1).all()
