"""The array against a matrix product, for every weight format, with and without stalls."""

from dataclasses import replace

import numpy as np
import pytest
from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import PRESETS
from hw.array import MacArray
from hw.commands import array_command, column_layout, loader_command
from hw.feeder import index_bits, positions_per_word
from hw.isa import Format
from hw.loader import Loader
from tests.hw.bench import pack_bytes, run_streams

TINY = PRESETS["tiny"]


class LoaderAndArray(wiring.Component):
    """The two units joined by the ring buffers, as in the top level."""

    def __init__(self, arch):
        self._arch = arch
        super().__init__({
            "array_cmd": In(stream.Signature(array_command())), "load_cmd": In(stream.Signature(loader_command())),
            "columns": In(stream.Signature(8 * arch.rows)), "values": In(stream.Signature(8 * arch.lanes)),
            "positions": In(stream.Signature(32 * arch.lanes)), "o": Out(stream.Signature(column_layout(arch.rows, 32))),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.loader = loader = Loader(self._arch)
        m.submodules.array = array = MacArray(self._arch)
        for ours, theirs in ((self.array_cmd, array.cmd), (self.values, array.values), (self.positions, array.positions),
                             (self.load_cmd, loader.cmd), (self.columns, loader.memory)):
            wiring.connect(m, wiring.flipped(ours), theirs)
        wiring.connect(m, array.o, wiring.flipped(self.o))
        m.d.comb += [array.loaded.eq(loader.loaded), loader.freed.eq(array.freed), array.write_en.eq(loader.write_en),
                     array.write_addr.eq(loader.write_addr), array.write_data.eq(loader.write_data)]
        return m


def random_tile(rng, fmt, n, m, k, cols, unsigned_a, a=None):
    """Stored activations, both commands, weight words, position words and the expected columns of one TILE; naive packing.
    With `a`, the lanes hold these activations already. Also the activations as the lanes have them."""
    rows, lanes, held = TINY.lanes, TINY.lanes, a is not None
    if not held:
        a = rng.integers(0, 256, (k, rows)) if unsigned_a else rng.integers(-128, 128, (k, rows))
    groups, tiles = -(-k // m), -(-cols // lanes)
    values, words = [], []
    weight = np.zeros((groups * m, tiles * lanes), np.int64)
    for tile in range(tiles):
        chosen = np.sort(np.array([[rng.permutation(m)[:n] for _ in range(groups)] for _ in range(lanes)]), axis=2)
        position_bits = [[] for _ in range(lanes)]
        for g in range(groups):
            for j in range(n):
                step = []
                for lane in range(lanes):
                    p = g * m + chosen[lane, g, j]
                    w = int(rng.integers(-128, 128)) if p < k else 0
                    weight[p, tile * lanes + lane] = w
                    step.append(w)
                    position_bits[lane].append(int(chosen[lane, g, j]))
                values.append(pack_bytes(step))
        if fmt != Format.DENSE:
            per_word = positions_per_word(fmt, n, m)
            for start in range(0, groups * n, per_word):
                word = []
                for lane in range(lanes):
                    chunk = position_bits[lane][start:start + per_word]
                    if fmt == Format.INDEX:
                        word.append(sum(p << (i * index_bits(m)) for i, p in enumerate(chunk)))
                    else:
                        word.append(sum(1 << (i // n * m + p) for i, p in enumerate(chunk)))
                words.append(pack_bytes(word, 32))
    # what the loader turns and blanks comes out as `a`
    rotate, zero = int(rng.integers(rows)), int(rng.integers(1 << rows)) if rng.random() < 0.5 else 0
    stored = np.roll(a, rotate, axis=1)
    if not held:
        a[:, [bool(zero >> row & 1) for row in range(rows)]] = 0
    load = {"count": k, "from_rows": 0, "from_memory": 1, "bypass": 0, "a_unsigned": unsigned_a, "a_rotate": rotate, "zero": zero}
    cmd = {"a_unsigned": unsigned_a, "format": fmt, "n": n, "m": m, "k": k, "cols": cols, "held": int(held)}
    return [pack_bytes(c) for c in stored], load, cmd, values, words, (a.T @ weight[:k, :cols]).T.tolist(), a


def run_tiles(rng, tiles, stall, seed, arch=TINY):
    """Run (format, n, m, k, cols) tiles through loader and array; returns what came out and what was expected. A tile with
    k = 0 is on the columns of the one before."""
    loads, cmds, columns, values, words, expected, before, is_unsigned = [], [], [], [], [], [], None, 0
    for fmt, n, m, k, cols in tiles:
        if k:
            before, is_unsigned = None, int(rng.integers(2))
        a, load, cmd, v, w, out, now = random_tile(rng, fmt, n, m, k or len(before), cols, is_unsigned, before)
        if before is None:
            loads.append(load)
            columns += a
        before = now
        cmds.append(cmd)
        values += v
        words += w
        expected += out
    got = run_streams(LoaderAndArray(arch), stall=stall, seed=seed, outputs={"o": len(expected)},
                      inputs={"array_cmd": cmds, "load_cmd": loads, "columns": columns, "values": values, "positions": words})
    return got["o"], expected


def test_columns_are_not_overwritten_while_frozen():
    """Short sums are drained more slowly than they are made; the ring is full, so the loader is at the array's heels."""
    rng = np.random.default_rng(0)
    tiles = [(Format.DENSE, 1, 1, 3, 13)] * 24 + [(Format.DENSE, 1, 1, 25, 8)] * 4
    got, expected = run_tiles(rng, tiles, {"o": 0.7}, 0)
    assert got == expected


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"lane_register": True}], ids=str)
@pytest.mark.parametrize("stall", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_array_equals_matrix_product(stall, seed, options):
    rng = np.random.default_rng(seed)
    patterns = [(Format.DENSE, 1, 1), (Format.INDEX, 2, 4), (Format.BITMAP, 2, 4), (Format.INDEX, 1, 32), (Format.INDEX, 3, 7),
                (Format.BITMAP, 31, 32), (Format.BITMAP, 3, 5), (Format.INDEX, 1, 2), (Format.BITMAP, 1, 1)]
    chosen = [patterns[(i + seed) % len(patterns)] if i % 3 else patterns[0] for i in range(12)]
    tiles = [(*p, int(rng.integers(1, 40)) if i % 4 < 2 else 0, int(rng.integers(1, 14))) for i, p in enumerate(chosen)]
    got, expected = run_tiles(rng, tiles, stall, seed, replace(TINY, **options))
    assert got == expected


@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_held_columns_stay_until_the_next_load_needs_their_room(stall):
    rng = np.random.default_rng(1)
    tiles = [(Format.DENSE, 1, 1, k, 5) for _ in range(3) for k in (64, 0, 33, 0, 0, 40, 64)]
    got, expected = run_tiles(rng, tiles, stall, 1)
    assert got == expected
