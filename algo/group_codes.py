"""Which elements of a group stand: as a bit set, as positions, as the rank among all sets of that size. Vectorised.

A *code* is a group's bit set in a uint32: bit k is set where element k stands. The *rank* of a set of s out of m elements is its
number, from 0 to C(m, s) - 1, in colexicographic order: the sum of C(position of the i-th element, i), i = 1 ... s.

Ref: the combinatorial number system; D. E. Knuth, The Art of Computer Programming 4A, section 7.2.1.3.
"""

from __future__ import annotations

from functools import cache
from math import comb

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Codes",
    "bits_of",
    "codes_of",
    "codes_of_positions",
    "codes_of_ranks",
    "numbers_of",
    "positions_of",
    "rank_bits",
    "ranks_of",
]

Codes = NDArray[np.uint32]
_TABLE_BITS = 16


def bits_of(numbers: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Spell numbers ``(...)`` as single bits ``(..., bits)``, least significant first; 0 <= bits <= 32."""
    raw = np.ascontiguousarray(numbers, "<u4")[..., None].view(np.uint8)
    return np.unpackbits(raw, axis=-1, count=bits, bitorder="little")


def numbers_of(bits: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Undo `bits_of`: ``(..., bits)`` to ``(...)``."""
    raw = np.zeros((*bits.shape[:-1], 4), np.uint8)
    packed = np.packbits(bits, axis=-1, bitorder="little")
    raw[..., : packed.shape[-1]] = packed
    return raw.view("<u4")[..., 0].astype(np.uint32, copy=False)


def codes_of(stored: NDArray[np.bool_]) -> Codes:
    """Codes ``(...)`` of groups ``(..., size)``, size <= 32."""
    return numbers_of(stored.view(np.uint8))


def positions_of(codes: Codes, count: int) -> NDArray[np.uint8]:
    """Ascending positions ``(..., count)`` of codes that have ``count`` elements each."""
    where = np.empty((*codes.shape, count), np.uint8)
    left = codes.copy()
    for slot in range(count):
        low = left & (~left + np.uint32(1))
        where[..., slot] = np.bitwise_count(low - np.uint32(1))
        left ^= low
    return where


def codes_of_positions(where: NDArray[np.uint8]) -> Codes:
    """Undo `positions_of`: ``(..., count)`` to ``(...)``; positions are below 32."""
    codes = np.zeros(where.shape[:-1], np.uint32)
    for slot in range(where.shape[-1]):
        codes |= np.uint32(1) << where[..., slot].astype(np.uint32)
    return codes


def rank_bits(size: int, count: int) -> int:
    """Bits that a rank takes: ceil(log2 C(size, count))."""
    return (comb(size, count) - 1).bit_length()


def ranks_of(codes: Codes, size: int, count: int) -> NDArray[np.uint32]:
    """Ranks of codes of ``count`` out of ``size`` elements."""
    if size <= _TABLE_BITS:
        return _rank_table(size, count)[codes]
    ranks, seen, table = np.zeros_like(codes), np.zeros(codes.shape, np.uint8), _binomials(size, count)
    for k in range(size):
        present = ((codes >> np.uint32(k)) & np.uint32(1)).astype(np.uint8)
        seen += present
        ranks += np.where(present, table[k][seen], np.uint32(0))
    return ranks


def codes_of_ranks(ranks: NDArray[np.uint32], size: int, count: int) -> Codes:
    """Undo `ranks_of`; ranks are below C(size, count)."""
    if comb(size, count) <= 1 << _TABLE_BITS:
        return _code_table(size, count)[ranks]
    return _decode(ranks, size, count)


def _decode(ranks: NDArray[np.uint32], size: int, count: int) -> Codes:
    codes, table = np.zeros_like(ranks), _binomials(size, count)
    left, due = ranks.copy(), np.full(ranks.shape, count, np.uint8)
    for k in reversed(range(size)):
        value = table[k][due]
        present = (due > 0) & (value <= left)
        left -= np.where(present, value, np.uint32(0))
        due -= present
        codes |= present.astype(np.uint32) << np.uint32(k)
    return codes


@cache
def _binomials(size: int, count: int) -> NDArray[np.uint32]:
    return np.array([[comb(k, s) for s in range(count + 1)] for k in range(size)], np.uint32)


@cache
def _code_table(size: int, count: int) -> Codes:
    return _decode(np.arange(comb(size, count), dtype=np.uint32), size, count)


@cache
def _rank_table(size: int, count: int) -> NDArray[np.uint32]:
    codes = _decode(np.arange(comb(size, count), dtype=np.uint32), size, count)
    table = np.zeros(1 << size, np.uint32)
    table[codes] = np.arange(len(codes), dtype=np.uint32)
    return table
