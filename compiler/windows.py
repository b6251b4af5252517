"""What a convolution fetches for a row tile: whole tiles of its input, turned by row groups and partly blanked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiler.ops import Window
from compiler.placement import Placement
from hw.arch import Arch

__all__ = ["Fetch", "Move", "count_fetches", "fetches", "moves", "row_moves"]


@dataclass(frozen=True)
class Fetch:
    """Row tile `tile` of the input for kernel position `position`: row group g has what lies in group (g + rotate), or zero if
    bit g of `zero` is set; bits of `seen` are the groups that have a pixel of it."""

    position: int
    tile: int
    rotate: int
    zero: int
    seen: int = 0


@dataclass(frozen=True)
class Move:
    """Token rows [start, stop) of a tile of a tensor's copy come from tile `source` of the tensor, turned by `rotate` groups."""

    tile: int
    source: int
    rotate: int
    start: int
    stop: int


def moves(source: Placement, out: Placement, arch: Arch) -> list[Move]:
    """How a tensor's tiles become those of another placement; the rows in between keep what they have.

    Raises
    ------
    ValueError
        As `fetches`.
    """
    pixels = np.arange(out.packed_rows().shape[1])[None]
    keys, where = _keys(source, out, pixels, arch)
    depth = arch.group_rows
    order = np.lexsort((where, keys[:, 0]))
    result: list[Move] = []
    for (tile, _, origin, rotate), group in zip(keys[order].tolist(), where[order].tolist(), strict=True):
        last = result[-1] if result else None
        if last is not None and (last.tile, last.source, last.rotate) == (tile, origin, rotate) and group * depth <= last.stop:
            result[-1] = Move(tile, origin, rotate, last.start, (group + 1) * depth)
        else:
            result.append(Move(tile, origin, rotate, group * depth, (group + 1) * depth))
    return result


def row_moves(
    source: Placement, out: Placement, rows: NDArray[np.int64], to: NDArray[np.int64], arch: Arch
) -> list[Move]:
    """Copies that bring rows ``rows`` of one tensor to rows ``to`` of another, both counted over the batch: one for each run of
    neighbours that comes from one tile, turned alike.

    Raises
    ------
    ValueError
        A row would have to change its place within a row group.
    """
    depth, groups = arch.group_rows, arch.row_groups
    theirs, ours = source.packed_rows().reshape(-1)[rows], out.packed_rows().reshape(-1)[to]
    if ((theirs - ours) % depth).any():
        raise ValueError(f"rows would move by less than a group of {depth}")
    order = np.argsort(ours)
    theirs, ours = theirs[order], ours[order]
    rotate = (theirs - ours) % arch.rows // depth % groups
    keys = np.stack([ours // arch.rows, theirs // arch.rows, rotate])
    starts = np.flatnonzero(np.concatenate([[True], (keys[:, 1:] != keys[:, :-1]).any(0) | (np.diff(ours) != 1)]))
    stops = [*starts[1:].tolist(), len(ours)]
    return [
        Move(int(tile), int(origin), int(turn), int(ours[first] % arch.rows), int(ours[stop - 1] % arch.rows) + 1)
        for first, stop, (tile, origin, turn) in zip(starts.tolist(), stops, keys[:, starts].T.tolist(), strict=True)
    ]


def fetches(source: Placement, out: Placement, pixels: NDArray[np.int64], arch: Arch) -> list[list[Fetch]]:
    """What each row tile of the output takes from the input.

    Parameters
    ----------
    pixels
        `compiler.ops.Window.sources`: (kernel positions, output pixels), -1 outside the image.

    Returns
    -------
    list
        For each row tile of the output, in order of the kernel positions. A position appears as often as its pixels lie in
        different tiles or at different distances, and not at all where all of it is outside the image. Rows that hold no
        pixel of the output may have anything.

    Raises
    ------
    ValueError
        A pixel would have to change its row within a row group.
    """
    keys, where = _keys(source, out, pixels, arch)
    result: list[list[Fetch]] = [[] for _ in range(out.tiles)]
    used = np.zeros(out.tiles, np.int64)
    np.bitwise_or.at(used, *_marks(out.packed_rows().reshape(-1), arch))
    found, inverse = np.unique(keys, axis=0, return_inverse=True)
    taken = np.zeros(len(found), np.int64)
    np.bitwise_or.at(taken, inverse.reshape(-1), np.int64(1) << where)
    for (tile, position, origin, rotate), groups_taken in zip(found.tolist(), taken.tolist(), strict=True):
        result[tile].append(Fetch(position, origin, rotate, int(used[tile]) & ~groups_taken, groups_taken))
    return result


def count_fetches(
    source: Placement, out: Placement, window: Window, image: tuple[int, int], out_image: tuple[int, int], arch: Arch
) -> int:
    """Number of all `fetches`."""
    keys, _ = _keys(source, out, window.sources(image, out_image), arch)
    return len(np.unique(keys, axis=0))


def _marks(rows: NDArray[np.int64], arch: Arch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tile and bit of the row group of each stored row."""
    return rows // arch.rows, np.int64(1) << (rows % arch.rows // arch.group_rows)


def _keys(
    source: Placement, out: Placement, pixels: NDArray[np.int64], arch: Arch
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each pixel that is seen: (output tile, kernel position, input tile, rotation), and its row group in the output."""
    depth, groups = arch.group_rows, arch.row_groups
    position, pixel = np.nonzero(pixels >= 0)
    theirs, ours = source.packed_rows()[:, pixels[position, pixel]], out.packed_rows()[:, pixel]
    if ((theirs - ours) % depth).any():
        raise ValueError(f"images in groups of {depth} rows that are not in patches")
    group = ours % arch.rows // depth
    rotate = (theirs % arch.rows // depth - group) % groups
    keys = np.stack([ours // arch.rows, np.broadcast_to(position, ours.shape), theirs // arch.rows, rotate], axis=-1)
    return keys.reshape(-1, 4), group.reshape(-1)
