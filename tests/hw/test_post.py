"""The post unit against the primitives of `hw.numerics`, with and without stalls."""

from types import SimpleNamespace

import numpy as np
import pytest

from hw.arch import PRESETS
from hw.commands import post_flags
from hw.isa import Residual, RowOp, Scale, Source
from hw.numerics import requantise, residual_add, residual_max, residual_multiplier, table_lookup, wrap32
from hw.post import Post
from tests.hw.bench import pack_bytes, run_streams

TINY = PRESETS["tiny"]
T = TINY.rows


def random_stream(rng, count):
    """`count` commands with their operands, and the columns expected at both outputs."""
    inputs = {name: [] for name in ("cmd", "acc", "bypass", "params", "residual", "scale")}
    expected = {"to_rows": [], "to_store": []}
    table, psum = None, np.zeros((TINY.psum_depth, T), np.int64)
    for i in range(count):
        if i == 0 or rng.random() < 0.15:
            table = rng.integers(-128, 128, 256)
            inputs["cmd"].append({"load_table": 1})
            inputs["params"] += [pack_bytes(table[j:j + 8]) for j in range(0, 256, 8)]
            continue
        cols, source = int(rng.integers(1, 9)), int(rng.integers(3))
        psum_in, psum_out = int(rng.random() < 0.4), int(rng.random() < 0.3)
        scale, residual, use_table = int(rng.integers(3)), 0 if psum_out else int(rng.choice(Residual)), int(rng.integers(2))
        times = residual in (Residual.MUL8, Residual.MUL16)
        if psum_out or times:
            scale = int(rng.integers(2))
        use_table &= not psum_out
        to_rows = int(rng.integers(2))
        tile = SimpleNamespace(source=source, scale=scale, residual=residual, psum_out=psum_out,
                               row_op=RowOp.LAYERNORM if to_rows else RowOp.NONE)
        cmd = {"psum_in": psum_in, "psum_out": psum_out, "table": use_table, "cols": cols, "mult": int(rng.integers(1 << 15)),
               "shift": int(rng.integers(1, 48)), "r_mult": int(rng.integers(1 << 15)), "r_shift": int(rng.integers(1, 32)),
               "load_table": 0, **post_flags(tile)}
        inputs["cmd"].append(cmd)
        acc = {Source.ARRAY: rng.integers(-2**31, 2**31, (cols, T)) >> rng.integers(0, 24),
               Source.STREAM: rng.integers(-128, 128, (cols, T)), Source.ZERO: np.zeros((cols, T), np.int64)}[source]
        if source == Source.ARRAY:
            inputs["acc"] += acc.tolist()
        if source == Source.STREAM:
            inputs["bypass"] += [pack_bytes(c) for c in acc]
        if psum_in:
            acc = wrap32(acc + psum[:cols])
        if psum_out:
            psum[:cols] = acc
            continue
        bias, mult, shift = 0, cmd["mult"], cmd["shift"]
        if scale == Scale.COLUMN:
            bias, mult = rng.integers(-2**31, 2**31, (cols, 1)) >> 8, rng.integers(-2**15, 2**15, (cols, 1))
            shift = rng.integers(1, 48, (cols, 1))
            inputs["params"] += [pack_bytes([b], 32) | pack_bytes([v], 16) << 32 | int(s) << 48
                                 for b, v, s in zip(bias[:, 0], mult[:, 0], shift[:, 0])]
        elif scale == Scale.ROW:
            mult, shift = rng.integers(0, 1 << 15, T), rng.integers(1, 48, T)
            inputs["scale"].append({"mult": mult.tolist(), "shift": shift.tolist()})
        if residual != Residual.NONE:
            wide = int(residual in (Residual.INT16, Residual.MUL16))
            limit = 32768 if wide else 128
            r = rng.choice([rng.integers(-limit, limit, (cols, T)), np.full((cols, T), -limit)], p=[0.9, 0.1])
            inputs["residual"] += [{"data": pack_bytes(c, 8 << wide), "wide": wide} for c in r]
        q = requantise(acc, bias, residual_multiplier(r, mult, 8 << wide) if times else mult, shift)
        if residual != Residual.NONE and not times:
            q = (residual_max if residual == Residual.MAX8 else residual_add)(q, r, cmd["r_mult"], cmd["r_shift"])
        if use_table:
            q = table_lookup(q, table)
        expected["to_rows" if to_rows else "to_store"] += q.tolist()
    return inputs, expected


@pytest.mark.parametrize("stall", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_post_equals_model(stall, seed):
    inputs, expected = random_stream(np.random.default_rng(seed), 60)
    got = run_streams(Post(TINY), inputs=inputs, outputs={k: len(v) for k, v in expected.items()}, stall=stall, seed=seed)
    assert got == expected


def test_one_column_per_cycle():
    count = 60
    cmd = {"array": 1, "array_data": 1, "mult": 1 << 14, "shift": 14, "cols": count}
    columns = [[i] * T for i in range(count)]
    got = run_streams(Post(TINY), inputs={"cmd": [cmd], "acc": columns}, outputs={"to_store": count}, max_cycles=count * 3 + 20)
    assert got["to_store"] == columns
