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
``rank``   number of the set of slots among all of N out of M,             N * value_bits
           ceil(log2 C(M, N)) bits (`algo.group_codes`)                    + ceil(log2 C(M, N))
=========  ==============================================================  =====================

Positions are packed per row, least significant bit first, and padded to a whole byte at the end of each row. No format can
take fewer position bits than log2 C(M, N) a group on average if all sets are equally likely: `entropy_bits`.

The accelerator reads index and bitmap words in a layout of its own: `compiler.pack`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb, log2
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from algo.group_codes import (
    Codes,
    bits_of,
    codes_of,
    codes_of_positions,
    codes_of_ranks,
    numbers_of,
    positions_of,
    rank_bits,
    ranks_of,
)
from algo.nm import NM

__all__ = ["Format", "Packed", "choose_format", "entropy_bits", "index_bits", "pack", "row_bits", "unpack"]

Format = Literal["dense", "index", "bitmap", "rank"]


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


@dataclass(frozen=True)
class _Part:
    """The full groups of a row, or its remainder: ``groups`` of ``size`` elements and ``slots`` each, from element ``start``."""

    start: int
    groups: int
    size: int
    slots: int

    @property
    def stop(self) -> int:
        return self.start + self.groups * self.size


def _parts(pattern: NM, width: int) -> Iterator[_Part]:
    full, tail = divmod(width, pattern.m)
    if full:
        yield _Part(0, full, pattern.m, pattern.n)
    if tail:
        yield _Part(full * pattern.m, 1, tail, min(pattern.n, tail))


def index_bits(pattern: NM) -> int:
    """Bits that one position within a group of M takes: ceil(log2 M)."""
    return (pattern.m - 1).bit_length()


def _group_bits(pattern: NM, part: _Part, format: Format) -> int:
    """Position bits of one group."""
    if format == "dense":
        return 0
    if format == "index":
        return part.slots * index_bits(pattern)
    return part.size if format == "bitmap" else rank_bits(part.size, part.slots)


def row_bits(pattern: NM, width: int, format: Format, *, value_bits: int = 8) -> int:
    """Bits that a row of ``width`` elements takes in a format."""
    _check_format(pattern, format)
    parts = list(_parts(pattern, width))
    slots = sum(part.groups * part.slots for part in parts)
    return slots * value_bits + sum(part.groups * _group_bits(pattern, part, format) for part in parts)


def entropy_bits(pattern: NM, width: int, *, value_bits: int = 8) -> float:
    """The floor of `row_bits`: values, and log2 of the number of sets of slots that a row can have."""
    return sum(part.groups * (part.slots * value_bits + log2(comb(part.size, part.slots))) for part in _parts(pattern, width))


def choose_format(pattern: NM, value_bits: int = 8, *, width: int | None = None) -> Format:
    """Name the format with the fewest bytes for a row of ``width`` elements (by default bits of one full group); of equals the
    simplest to decode: index, bitmap, rank."""
    if pattern.is_dense:
        return "dense"
    formats: tuple[Format, ...] = ("index", "bitmap", "rank")
    sizes = {f: row_bits(pattern, width or pattern.m, f, value_bits=value_bits) for f in formats}
    return min(formats, key=lambda f: -(-sizes[f] // 8) if width else sizes[f])


def pack(matrix: NDArray[np.generic], pattern: NM, format: Format | None = None) -> Packed:
    """Compress a matrix that obeys ``pattern`` along its last axis.

    Parameters
    ----------
    matrix
        ``(..., K)``, any numeric dtype, K >= 1. A minus zero is kept if its group has a slot for it, else it is a zero like any
        other.
    pattern
        At most N non-zeros in each group of M, remainder groups included.
    format
        By default the smallest, see `choose_format`.

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
    width = matrix.shape[-1]
    chosen = choose_format(pattern, 8 * matrix.dtype.itemsize, width=width) if format is None else format
    _check_format(pattern, chosen)
    flat = matrix.reshape(-1, width)
    if chosen == "dense":
        return Packed(pattern, chosen, matrix.shape, flat.copy(), np.zeros((len(flat), 0), np.uint8))
    parts = [(part, _slots(flat, pattern, part)) for part in _parts(pattern, width)]
    taken = _taken(parts)
    bits = taken.view(np.uint8) if chosen == "bitmap" else np.concatenate(
        [_encode(codes, pattern, part, chosen) for part, codes in parts], axis=1)
    values = flat[taken].reshape(len(flat), -1)
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
    parts = list(_parts(packed.pattern, width))
    sizes = [part.groups * _group_bits(packed.pattern, part, packed.format) for part in parts]
    bits = np.unpackbits(packed.positions, axis=1, count=sum(sizes), bitorder="little")
    pieces = np.split(bits, np.cumsum(sizes)[:-1], axis=1)
    found = [(part, _decode(piece, packed, part)) for part, piece in zip(parts, pieces, strict=True)]
    matrix = np.zeros((count, width), packed.values.dtype)
    matrix[_taken(found)] = packed.values.reshape(-1)
    return matrix.reshape(packed.shape)


def _check_format(pattern: NM, format: str) -> None:
    if format not in get_args(Format):
        raise ValueError(f"a format must be one of {', '.join(get_args(Format))}, not {format!r}")
    if format == "dense" and not pattern.is_dense:
        raise ValueError(f'the "dense" format stores every element and is for N = M, not for {pattern}')


def _slots(flat: NDArray[np.generic], pattern: NM, part: _Part) -> Codes:
    """Codes (rows, groups) of the elements that take a slot: non-zeros, minus zeros, then the first zeros up to the size."""
    groups = flat[:, part.start:part.stop].reshape(len(flat), part.groups, part.size)
    codes = codes_of(groups != 0)
    found = np.bitwise_count(codes)
    if (found > part.slots).any():
        row, group = (int(i) for i in np.argwhere(found > part.slots)[0])
        first = part.start + group * part.size
        raise ValueError(
            f"not {pattern}: row {row}, group {first // pattern.m} (elements {first} to {first + part.size - 1}) has "
            f"{found[row, group]} non-zeros, at most {part.slots} allowed"
        )
    short = np.nonzero(found < part.slots)
    if len(short[0]):
        codes[short] = _filled(codes[short], groups[short], part)
    return codes


def _filled(codes: Codes, groups: NDArray[np.generic], part: _Part) -> Codes:
    """Fill the slots of groups with too few non-zeros."""
    if groups.dtype.kind == "f":
        signed = codes | codes_of(np.signbit(groups))
        codes = np.where(np.bitwise_count(signed) <= part.slots, signed, codes)
    while (open_ := np.bitwise_count(codes) < part.slots).any():
        codes = np.where(open_, codes | (codes + np.uint32(1)), codes)  # sets the lowest zero bit
    return codes


def _taken(parts: list[tuple[_Part, Codes]]) -> NDArray[np.bool_]:
    """Codes to one flag per element, (rows, K)."""
    flags = [bits_of(codes, part.size).reshape(len(codes), -1) for part, codes in parts]
    return (flags[0] if len(flags) == 1 else np.concatenate(flags, axis=1)).view(np.bool_)


def _encode(codes: Codes, pattern: NM, part: _Part, format: Format) -> NDArray[np.uint8]:
    """Codes to position bits, (rows, groups * bits)."""
    if format == "index":
        numbers, bits = positions_of(codes, part.slots), index_bits(pattern)
        each = np.unpackbits(numbers[..., None], axis=-1, count=bits, bitorder="little")
    else:
        each = bits_of(ranks_of(codes, part.size, part.slots), rank_bits(part.size, part.slots))
    return each.reshape(len(codes), -1)


def _decode(bits: NDArray[np.uint8], packed: Packed, part: _Part) -> Codes:
    """Undo `_encode`, checking every group."""
    each = bits.reshape(len(bits), part.groups, -1)
    if packed.format == "bitmap":
        codes = numbers_of(each)
        _refuse(np.bitwise_count(codes) != part.slots, "a bitmap marks the wrong number of slots")
    elif packed.format == "rank":
        ranks = numbers_of(each)
        _refuse(ranks >= comb(part.size, part.slots), "a rank names no set of slots")
        codes = codes_of_ranks(ranks, part.size, part.slots)
    else:
        split = each.reshape(len(bits), part.groups, part.slots, index_bits(packed.pattern))
        one = split.shape[-1] == 0  # groups of one element need no index
        where = np.zeros(split.shape[:-1], np.uint8) if one else np.packbits(split, axis=-1, bitorder="little")[..., 0]
        _refuse(where >= part.size, "an index points outside its group")
        _refuse(where[..., 1:] <= where[..., :-1], "the indices of a group are not ascending")
        codes = codes_of_positions(where)
    return codes


def _check_sizes(packed: Packed, count: int, width: int) -> None:
    value_bits = 8 * packed.values.dtype.itemsize
    slots = sum(part.groups * part.slots for part in _parts(packed.pattern, width))
    where = row_bits(packed.pattern, width, packed.format, value_bits=value_bits) - slots * value_bits
    expected = {"values": (count, slots), "positions": (count, -(-where // 8))}
    for name, shape in expected.items():
        if getattr(packed, name).shape != shape:
            raise ValueError(
                f"the packed matrix is damaged: {name} is {getattr(packed, name).shape}, "
                f"but {packed.shape} at {packed.pattern} in {packed.format} needs {shape}"
            )


def _refuse(bad: NDArray[np.bool_], what: str) -> None:
    if bad.any():
        raise ValueError(f"the packed matrix is damaged: {what} in row {int(np.argwhere(bad)[0][0])}")
