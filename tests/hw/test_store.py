"""Store unit, transposer, routing of the row unit's columns and widening of residuals against their models."""

import numpy as np
import pytest

from hw.arch import PRESETS
from hw.isa import Out
from hw.residual import Widen
from hw.store import RowRoute, Store, transpose_blocks
from tests.hw.bench import pack_bytes, run_streams

TINY = PRESETS["tiny"]
T = TINY.rows


def words_of(columns, out):
    """Words of `rows` bytes that memory receives for int16 columns (cols, rows)."""
    saturated = np.clip(columns, -128, 127).astype(np.int8)
    if out == Out.STORE16:
        return [pack_bytes(half) for column in columns.astype("<i2") for half in column.view(np.int8).reshape(2, T)]
    return [pack_bytes(word) for word in (transpose_blocks(saturated, TINY.lanes) if out == Out.STORE8T else saturated)]


@pytest.mark.parametrize("stall", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_store(stall, seed):
    rng = np.random.default_rng(seed)
    inputs, expected = {"cmd": [], "post": [], "row_unit": []}, []
    for _ in range(40):
        out, from_rows, cols = int(rng.integers(1, 4)), int(rng.integers(2)), int(rng.integers(1, 12))
        columns = rng.integers(-300, 300, (cols, T)) if rng.random() < 0.5 else rng.integers(-32768, 32768, (cols, T))
        inputs["cmd"].append({"out": out, "cols": cols, "from_rows": from_rows})
        inputs["row_unit" if from_rows else "post"] += columns.tolist()
        expected += words_of(columns, out)
    got = run_streams(Store(TINY), inputs=inputs, outputs={"o": len(expected)}, stall=stall, seed=seed)
    assert got["o"] == expected


@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_row_route(stall):
    rng = np.random.default_rng(1)
    cmds, columns, expected = [], [], {"lanes": [], "store": []}
    for _ in range(30):
        cols, lanes = int(rng.integers(1, 9)), int(rng.integers(2))
        block = rng.integers(0, 256, (cols, T))
        cmds.append({"count": cols, "lanes": lanes})
        columns += block.tolist()
        expected["lanes" if lanes else "store"] += [pack_bytes(c) for c in block] if lanes else block.tolist()
    counts = {name: len(values) for name, values in expected.items()}
    got = run_streams(RowRoute(TINY), inputs={"cmd": cmds, "i": columns}, outputs=counts, stall=stall)
    assert got == expected


@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_widen(stall):
    rng = np.random.default_rng(2)
    cmds, words, expected = [], [], []
    for _ in range(40):
        cols, wide = int(rng.integers(1, 9)), int(rng.integers(2))
        limit = 32768 if wide else 128
        columns = rng.integers(-limit, limit, (cols, T))
        cmds.append({"count": cols, "wide": wide})
        words += words_of(columns, Out.STORE16 if wide else Out.STORE8)
        expected += columns.tolist()
    got = run_streams(Widen(TINY), inputs={"cmd": cmds, "i": words}, outputs={"o": len(expected)}, stall=stall)
    assert got["o"] == expected
