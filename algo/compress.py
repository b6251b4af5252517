"""Exact compressed storage of N:M matrices: only the values that may be non-zero, and where they stand.

A row of K elements has ``K // M`` full groups and, if K is not a multiple of M, one remainder group of
``K % M`` elements. A full group stores N slots, a remainder group of r elements min(N, r). Slots are in
ascending position; when a group has fewer non-zeros than slots, its first zeros fill them, so that every
group of a kind has the same size.

Formats, per group of N:M:

=========  ==============================================================  =====================
format     positions                                                       bits per full group
=========  ==============================================================  =====================
``dense``  none: every element is stored (only for N = M)                  M * value_bits
``index``  each slot's position in its group, ceil(log2 M) bits            N * (value_bits + ceil(log2 M))
``bitmap`` one bit per element, set where a slot stands                    N * value_bits + M
=========  ==============================================================  =====================

Positions are packed per row, least significant bit first, and padded to a whole byte at the end of each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from algo.nm import NM

__all__ = ["Format", "Packed", "choose_format", "index_bits", "pack", "row_bits", "unpack"]

Format = Literal["dense", "index", "bitmap"]


@dataclass(frozen=True, eq=False)
class Packed:
    """A compressed matrix. ``pack`` makes it, ``unpack`` gives the matrix back.

    Members
    -------
    pattern, format
        How the groups are laid out.
    shape
        Shape of the original, groups along its last axis.
    values
        ``(rows, slots)``, the original's dtype.
    positions
        ``(rows, bytes)``, uint8; no bytes in the ``dense`` format.
    """

    pattern: NM
    format: Format
    shape: tuple[int, ...]
    values: NDArray[np.generic]
    positions: NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Bytes stored: values and positions, with each row's padding."""
        return self.values.nbytes + self.positions.nbytes

    @property
    def bits(self) -> int:
        """Bits of information stored, without the padding of rows to whole bytes."""
        value_bits = 8 * self.values.dtype.itemsize
        return len(self.values) * row_bits(self.pattern, self.shape[-1], self.format, value_bits=value_bits)


def index_bits(pattern: NM) -> int:
    """Bits that one position within a group of M takes: ceil(log2 M)."""
    return (pattern.m - 1).bit_length()


def row_bits(pattern: NM, width: int, format: Format, *, value_bits: int = 8) -> int:
    """Bits that a row of ``width`` elements takes in a format."""
    _check_format(pattern, format)
    slots = _slots(pattern, width)
    where = {"dense": 0, "index": slots * index_bits(pattern), "bitmap": width}[format]
    return slots * value_bits + where


def choose_format(pattern: NM, value_bits: int = 8) -> Format:
    """Name the format with the fewest bits per group; ``index`` if equal, because it needs no decoder.

    ``value_bits`` is accepted because a future format may store values otherwise; today it does not matter.
    """
    if pattern.is_dense:
        return "dense"
    sizes: dict[Format, int] = {
        f: row_bits(pattern, pattern.m, f, value_bits=value_bits) for f in ("index", "bitmap")
    }
    return min(sizes, key=lambda name: sizes[name])


def pack(matrix: NDArray[np.generic], pattern: NM, format: Format | None = None) -> Packed:
    """Compress a matrix that obeys ``pattern`` along its last axis.

    Parameters
    ----------
    matrix
        ``(..., K)``, any numeric dtype, K >= 1.
    pattern
        At most N non-zeros in each group of M, remainder groups included.
    format
        By default the smaller, see `choose_format`.

    Raises
    ------
    TypeError
        Not a NumPy array of numbers.
    ValueError
        A group with more than N non-zeros (named by row and group), or a format the pattern does not have.
    """
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "iufb":
        kind = matrix.dtype if isinstance(matrix, np.ndarray) else type(matrix).__name__
        raise TypeError(f"pack takes a NumPy array of numbers, not {kind}")
    if matrix.ndim < 1 or matrix.shape[-1] < 1:
        raise ValueError(f"pack takes an array (..., K) with K >= 1, not of shape {matrix.shape}")
    chosen = choose_format(pattern, 8 * matrix.dtype.itemsize) if format is None else format
    _check_format(pattern, chosen)
    flat = matrix.reshape(-1, matrix.shape[-1])
    if chosen == "dense":
        return Packed(pattern, chosen, matrix.shape, flat.copy(), np.zeros((len(flat), 0), np.uint8))
    taken = _slot_bitmap(flat, pattern)
    values = flat[taken].reshape(len(flat), -1)
    bits = taken if chosen == "bitmap" else _to_bits(_positions(taken, pattern), index_bits(pattern))
    return Packed(pattern, chosen, matrix.shape, values, np.packbits(bits, axis=1, bitorder="little"))


def unpack(packed: Packed) -> NDArray[np.generic]:
    """Give back the matrix, equal in every bit to what was packed.

    Raises
    ------
    ValueError
        The values or positions have the wrong size, or the positions name an element twice or one outside its
        group.
    """
    width = packed.shape[-1]
    count = int(np.prod(packed.shape[:-1], dtype=np.int64))
    _check_sizes(packed, count, width)
    if packed.format == "dense":
        return packed.values.reshape(packed.shape).copy()
    taken = _read_bitmap(packed, width) if packed.format == "bitmap" else _read_index(packed, width)
    matrix = np.zeros((count, width), packed.values.dtype)
    matrix[taken] = packed.values.reshape(-1)
    return matrix.reshape(packed.shape)


def _check_format(pattern: NM, format: str) -> None:
    if format not in get_args(Format):
        raise ValueError(f"a format must be one of {', '.join(get_args(Format))}, not {format!r}")
    if format == "dense" and not pattern.is_dense:
        raise ValueError(f'the "dense" format stores every element and is for N = M, not for {pattern}')


def _group_sizes(pattern: NM, width: int) -> list[int]:
    tail = width % pattern.m
    return [pattern.m] * (width // pattern.m) + ([tail] if tail else [])


def _slots(pattern: NM, width: int) -> int:
    return width // pattern.m * pattern.n + min(pattern.n, width % pattern.m)


def _slot_bitmap(flat: NDArray[np.generic], pattern: NM) -> NDArray[np.bool_]:
    """Mark, in (rows, K), the elements that take a slot: all non-zeros, then the first zeros up to the
    group's size."""
    count, width = flat.shape
    # Minus zero counts as a non-zero, so that floating-point round trips are exact.
    stored = (flat != 0) | np.signbit(flat) if flat.dtype.kind == "f" else flat != 0
    padded = np.zeros((count, -(-width // pattern.m) * pattern.m), np.bool_)
    padded[:, :width] = stored
    groups = padded.reshape(count, -1, pattern.m)
    found = groups.sum(2)
    if (found > pattern.n).any():
        row, group = (int(i) for i in np.argwhere(found > pattern.n)[0])
        raise ValueError(
            f"not {pattern}: row {row}, group {group} (elements {group * pattern.m} to "
            f"{min(width, (group + 1) * pattern.m) - 1}) has {found[row, group]} non-zeros, "
            f"at most {pattern.n} allowed"
        )
    # The k-th zero of a group takes a slot while non-zeros + k <= slots: the tail's end before its padding.
    slots = np.minimum(pattern.n, np.array(_group_sizes(pattern, width)))
    spare = (slots[None, :] - found)[:, :, None]
    filled = groups | (np.cumsum(~groups, axis=2) <= spare)
    taken: NDArray[np.bool_] = filled.reshape(count, -1)[:, :width]
    return taken


def _positions(taken: NDArray[np.bool_], pattern: NM) -> NDArray[np.uint8]:
    """Position within its group of each slot: (rows, slots)."""
    where = np.nonzero(taken)[1] % pattern.m
    return where.reshape(len(taken), -1).astype(np.uint8)


def _to_bits(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Spell (rows, n) numbers as (rows, n * bits) single bits, least significant first."""
    each = (numbers[:, :, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    return each.reshape(len(numbers), -1).astype(np.uint8)


def _check_sizes(packed: Packed, count: int, width: int) -> None:
    value_bits = 8 * packed.values.dtype.itemsize
    where = row_bits(packed.pattern, width, packed.format, value_bits=value_bits)
    slots = width if packed.format == "dense" else _slots(packed.pattern, width)
    expected = {"values": (count, slots), "positions": (count, -(-(where - slots * value_bits) // 8))}
    for name, shape in expected.items():
        if getattr(packed, name).shape != shape:
            raise ValueError(
                f"the packed matrix is damaged: {name} is {getattr(packed, name).shape}, "
                f"but {packed.shape} at {packed.pattern} in {packed.format} needs {shape}"
            )


def _read_bitmap(packed: Packed, width: int) -> NDArray[np.bool_]:
    taken = np.unpackbits(packed.positions, axis=1, count=width, bitorder="little").astype(np.bool_)
    starts = np.arange(0, width, packed.pattern.m)
    found = np.add.reduceat(taken, starts, axis=1, dtype=np.int64)
    slots = np.minimum(packed.pattern.n, np.array(_group_sizes(packed.pattern, width)))
    _refuse(found != slots, "a bitmap marks the wrong number of slots")
    return taken


def _read_index(packed: Packed, width: int) -> NDArray[np.bool_]:
    pattern, bits, slots = packed.pattern, index_bits(packed.pattern), _slots(packed.pattern, width)
    each = np.unpackbits(packed.positions, axis=1, count=slots * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.int64)
    where = each.reshape(len(each), slots, bits) @ weights
    group = np.arange(slots) // pattern.n
    _refuse(where >= np.array(_group_sizes(pattern, width))[group], "an index points outside its group")
    column = group * pattern.m + where
    _refuse(np.diff(column, axis=1) <= 0, "the indices of a group are not ascending")
    taken = np.zeros((len(each), width), np.bool_)
    np.put_along_axis(taken, column, True, axis=1)
    return taken


def _refuse(bad: NDArray[np.bool_], what: str) -> None:
    if bad.any():
        raise ValueError(f"the packed matrix is damaged: {what} in row {int(np.argwhere(bad)[0][0])}")
