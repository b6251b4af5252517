"""Store unit, transposer, and routing of the row unit's columns against their models."""

import numpy as np
import pytest

from hw.arch import PRESETS
from hw.isa import Out
from hw.store import RowRoute, Store, transpose_blocks
from tests.hw.bench import pack_bytes, run_streams

TINY = PRESETS["tiny"]
T = TINY.rows


def words_of(columns, out):
    """What the writer receives for int16 columns (cols, rows)."""
    saturated = np.clip(columns, -128, 127).astype(np.int8)
    if out == Out.STORE16:
        return [pack_bytes(column, 16) for column in columns]
    return [pack_bytes(word) for word in (transpose_blocks(saturated, TINY.lanes) if out == Out.STORE8T else saturated)]


@pytest.mark.parametrize("stall", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_store(stall, seed):
    rng = np.random.default_rng(seed)
    inputs, expected = {"cmd": [], "post": [], "row_unit": []}, []
    for _ in range(40):
        out, from_rows, cols = int(rng.integers(1, 4)), int(rng.integers(2)), int(rng.integers(1, 12))
        columns = rng.integers(-300, 300, (cols, T)) if rng.random() < 0.5 else rng.integers(-32768, 32768, (cols, T))
        inputs["cmd"].append({"cols": cols, "from_rows": from_rows, "from_post": 1 - from_rows, "wide": out == Out.STORE16,
                              "transposed": out == Out.STORE8T})
        inputs["row_unit" if from_rows else "post"] += columns.tolist()
        expected += words_of(columns, out)
    got = run_streams(Store(TINY), inputs=inputs, outputs={"o": len(expected)}, stall=stall, seed=seed)
    wide = [cmd["wide"] for cmd in inputs["cmd"]
            for _ in range(-(-cmd["cols"] // T) * T if cmd["transposed"] else cmd["cols"])]
    assert [word if both else word % (1 << 8 * T) for word, both in zip(got["o"], wide, strict=True)] == expected


@pytest.mark.parametrize("out", [Out.STORE8, Out.STORE16])
def test_one_column_a_cycle(out):
    columns = np.arange(60 * T).reshape(60, T) % 128
    cmd = {"from_post": 1, "wide": out == Out.STORE16, "cols": 60}
    got = run_streams(Store(TINY), inputs={"cmd": [cmd], "post": columns.tolist()}, outputs={"o": 60}, max_cycles=63)
    assert len(got["o"]) == 60


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
