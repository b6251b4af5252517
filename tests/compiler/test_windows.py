"""Fetches of a convolution: turned and blanked tiles hold just the pixels that the windows see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from compiler.ops import Window
from compiler.placement import PatchPlacement, RowPlacement
from compiler.windows import count_fetches, fetches, moves
from hw.arch import PRESETS

WIDE = replace(PRESETS["tiny"], name="wide", rows=16, lanes=16, bus_bytes=32)


def random_placement(rng, batch, image, arch):
    """Lines of pixels, or patches that need not divide the image."""
    if rng.random() < 0.25:
        return RowPlacement(batch, image[0] * image[1], arch.rows)
    grids = [(y, x) for y in range(1, image[0] + 1) for x in range(1, image[1] + 1) if y * x <= arch.row_groups]
    grid = grids[rng.integers(len(grids))]
    return PatchPlacement(batch, *image, arch.rows, arch.row_groups, grid)


def seen(image, out, window):
    """Which pixel (from 1 on) each output pixel sees at each kernel position, 0 outside: by torch.unfold."""
    numbers = torch.arange(1.0, image[0] * image[1] + 1).reshape(1, 1, *image)
    pads = [
        (p, max(0, (n - 1) * s + (k - 1) * d + 1 - p - size))
        for p, n, s, k, d, size in zip(window.padding, out, window.stride, window.kernel, window.dilation, image)
    ]
    columns = F.unfold(F.pad(numbers, (*pads[1], *pads[0])), window.kernel, window.dilation, 0, window.stride)
    sizes = zip(image, pads, window.kernel, window.dilation, window.stride)
    high = [(size + sum(pad) - (k - 1) * d - 1) // s + 1 for size, pad, k, d, s in sizes]
    return columns.reshape(-1, *high)[:, : out[0], : out[1]].reshape(-1, out[0] * out[1]).long().numpy()


@pytest.mark.parametrize("seed", range(60))
def test_fetches_bring_what_the_windows_see(seed):
    rng = np.random.default_rng(seed)
    arch = (PRESETS["tiny"], WIDE)[seed % 2]
    (image, out), batch = (tuple(rng.integers(1, 9, 2).tolist()) for _ in range(2)), int(rng.integers(1, 5))
    kernel, stride, dilation, padding = (tuple(rng.integers(low, 4, 2).tolist()) for low in (1, 1, 1, 0))
    window = Window(kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    source, target = (random_placement(rng, batch, size, arch) for size in (image, out))
    expected = seen(image, out, window)
    stored = np.full((source.tiles, arch.rows), -7)
    values = np.arange(batch)[:, None] * 1000 + np.arange(1, image[0] * image[1] + 1)
    stored.reshape(-1)[source.packed_rows()] = values
    total = np.zeros((target.tiles, arch.rows, len(expected)), np.int64)
    found = fetches(source, target, window.sources(image, out), arch)
    for tile, wanted in enumerate(found):
        for fetch in wanted:
            column = np.roll(stored[fetch.tile], -fetch.rotate)
            column[[bool(fetch.zero >> row & 1) for row in range(arch.rows)]] = 0
            total[tile, :, fetch.position] += column
    got = total.reshape(-1, len(expected))[target.packed_rows()]
    wanted = np.where(expected.T > 0, expected.T + np.arange(batch)[:, None, None] * 1000, 0)
    assert np.array_equal(got, wanted)
    assert sum(map(len, found)) == count_fetches(source, target, window, image, out, arch)


def test_patches_that_divide_the_image_take_one_fetch_a_position():
    """3x3 with stride 1 and 2: nine fetches a tile, whatever the padding."""
    arch = WIDE
    source = PatchPlacement(1, 8, 8, 16, 16, (4, 4))
    for stride in (1, 2):
        out = PatchPlacement(1, 8 // stride, 8 // stride, 16, 16, (4, 4))
        window = Window(kernel=(3, 3), stride=(stride, stride), padding=(1, 1))
        pixels = window.sources((8, 8), (8 // stride, 8 // stride))
        assert {len(wanted) for wanted in fetches(source, out, pixels, arch)} == {9}


@pytest.mark.parametrize("seed", range(30))
def test_moves_make_the_other_placement(seed):
    rng = np.random.default_rng(seed)
    arch, image, batch = WIDE, tuple(rng.integers(1, 9, 2).tolist()), int(rng.integers(1, 5))
    source, target = (random_placement(rng, batch, image, arch) for _ in range(2))
    values = np.arange(1, batch * image[0] * image[1] + 1).reshape(batch, -1)
    stored, made = np.zeros((source.tiles, 16), int), np.zeros((target.tiles, 16), int)
    stored.reshape(-1)[source.packed_rows()] = values
    for move in moves(source, target, arch):
        made[move.tile, move.start : move.stop] = np.roll(stored[move.source], -move.rotate)[move.start : move.stop]
    assert np.array_equal(made.reshape(-1)[target.packed_rows()], values)


def test_rows_within_a_group_cannot_change_places():
    arch = PRESETS["sta4096"]
    source, target = RowPlacement(1, 64, 64), RowPlacement(1, 64, 64)
    window = Window(kernel=(3, 3), padding=(1, 1))
    with pytest.raises(ValueError, match="groups of 2 rows"):
        fetches(source, target, window.sources((8, 8), (8, 8)), arch)
