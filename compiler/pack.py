"""Weight streams: int8 matrices in the order and the formats in which the array eats them.

The formats are those of `docs/numerics.md` ("Weights"). A matrix (cols, k) is cut into tiles of L output
columns (the last one padded with zero lanes); a tile is a sequence of steps of L bytes, lane l = byte l.
Sparse tiles come with position words of 4*L bytes.

A layer is stored sparse whenever its pattern has N < M, even where INDEX and BITMAP both take more bytes than
DENSE (nearly full patterns such as 31:32): the sparse stream takes N/M of the cycles, and cycles are what the
array is short of.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from algo.nm import NM
from hw.isa import Format

__all__ = [
    "PackedWeights",
    "PatternError",
    "check_pattern",
    "choose_format",
    "pack_weights",
    "position_words",
    "unpack_weights",
]

WORD_BITS = 32
_Number = TypeVar("_Number", np.int8, np.uint32)


class PatternError(ValueError):
    """A weight matrix breaks its declared N:M pattern; the message names layer, row and group."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedWeights:
    """The stream of one weight matrix (cols, k).

    Members
    -------
    format, n, m
        As in the instruction; n = m = 0 for DENSE.
    k, cols
        Shape of the matrix.
    values
        int8 (column tiles, steps, lanes).
    positions
        uint32 little endian (column tiles, words, lanes); no words for DENSE.
    """

    format: Format
    n: int
    m: int
    k: int
    cols: int
    values: NDArray[np.int8]
    positions: NDArray[np.uint32]

    @property
    def steps(self) -> int:
        """Array cycles for one column tile."""
        return int(self.values.shape[1])

    @property
    def lanes(self) -> int:
        """Bytes of one step."""
        return int(self.values.shape[2])

    @property
    def stride(self) -> int:
        """`w_stride`: bytes of one column tile's values."""
        return self.steps * self.lanes

    @property
    def nbytes(self) -> int:
        """Bytes of values and position words, padding included."""
        return self.values.nbytes + self.positions.nbytes


def index_bits(m: int) -> int:
    """Bits of a position within a group of m: ceil(log2 m), at least 1."""
    return max(1, (m - 1).bit_length())


def position_words(format: Format, *, n: int, m: int, k: int) -> int:
    """Position words of one column tile (0 for DENSE)."""
    groups = -(-k // m) if m else 0
    if format == Format.INDEX:
        return -(-groups * n // (WORD_BITS // index_bits(m)))
    if format == Format.BITMAP:
        return -(-groups // (WORD_BITS // m))
    return 0


def choose_format(pattern: NM | None, k: int) -> Format:
    """DENSE when nothing can be left out (no pattern, N = M), else the one of INDEX and BITMAP with fewer
    bytes for rows of k weights; INDEX if equal."""
    if pattern is None or pattern.n == pattern.m:
        return Format.DENSE
    index, bitmap = (position_words(f, n=pattern.n, m=pattern.m, k=k) for f in (Format.INDEX, Format.BITMAP))
    return Format.INDEX if index <= bitmap else Format.BITMAP


def check_pattern(weight: NDArray[np.int8], pattern: NM | None, *, layer: str) -> None:
    """Check that every group of M weights along the last axis of (cols, k) has at most N non-zeros.

    Raises
    ------
    PatternError
        Naming the layer, and row and group of the first violation.
    """
    if pattern is None or pattern.n == pattern.m:
        return
    found = np.add.reduceat(weight != 0, np.arange(0, weight.shape[1], pattern.m), axis=1, dtype=np.uint8)
    if (found > pattern.n).any():
        row, group = (int(i) for i in np.argwhere(found > pattern.n)[0])
        raise PatternError(
            f"{layer}: weights are not {pattern}: row {row}, group {group} (inputs {group * pattern.m} to "
            f"{min(weight.shape[1], (group + 1) * pattern.m) - 1}) has {found[row, group]} non-zeros, "
            f"at most {pattern.n} allowed"
        )


def pack_weights(
    weight: NDArray[np.int8],
    pattern: NM | None,
    *,
    lanes: int,
    format: Format | None = None,
    layer: str = "weights",
) -> PackedWeights:
    """Pack a matrix for tiles of `lanes` output columns.

    Parameters
    ----------
    weight
        int8 (cols, k), both >= 1; each row obeys `pattern`.
    pattern
        None for dense.
    lanes
        L, output columns of a tile.
    format
        By default `choose_format`. INDEX and BITMAP need a pattern.
    layer
        Name for messages.

    Raises
    ------
    PatternError
        A group with more than N non-zeros.
    TypeError, ValueError
        Not an int8 matrix, an empty one, or a sparse format without a pattern.
    """
    if not isinstance(weight, np.ndarray) or weight.dtype != np.int8:
        raise TypeError(
            f"{layer}: weights must be an int8 array, not {getattr(weight, 'dtype', type(weight).__name__)}"
        )
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"{layer}: weights must have the shape (out, in), both >= 1, not {weight.shape}")
    cols, k = weight.shape
    chosen = choose_format(pattern, k) if format is None else format
    if chosen == Format.DENSE:
        values = _tiles(weight, lanes)
        none = np.zeros((len(values), 0, lanes), "<u4")
        return PackedWeights(format=chosen, n=0, m=0, k=k, cols=cols, values=values, positions=none)
    if pattern is None:
        raise ValueError(f"{layer}: the format {chosen.name} needs an N:M pattern")
    check_pattern(weight, pattern, layer=layer)
    values, positions = _pack_sparse(weight, pattern, chosen, lanes)
    return PackedWeights(
        format=chosen, n=pattern.n, m=pattern.m, k=k, cols=cols, values=values, positions=positions
    )


def unpack_weights(packed: PackedWeights) -> NDArray[np.int8]:
    """Give back the matrix (cols, k)."""
    tiles, _, lanes = packed.values.shape
    if packed.format == Format.DENSE:
        return np.ascontiguousarray(
            packed.values.transpose(0, 2, 1).reshape(tiles * lanes, packed.k)[: packed.cols]
        )
    groups = -(-packed.k // packed.m)
    where = _read_positions(packed, groups)
    matrix = np.zeros((tiles, lanes, groups, packed.m), np.int8)
    values = packed.values.reshape(tiles, groups, packed.n, lanes).transpose(0, 3, 1, 2)
    np.put_along_axis(matrix, where.transpose(0, 3, 1, 2), values, axis=3)
    return np.ascontiguousarray(matrix.reshape(tiles * lanes, -1)[: packed.cols, : packed.k])


def _tiles(matrix: NDArray[_Number], lanes: int) -> NDArray[_Number]:
    """(cols, steps) as (column tiles, steps, lanes), zero lanes at the end."""
    cols, steps = matrix.shape
    tiles = -(-cols // lanes)
    padded = np.zeros((tiles * lanes, steps), matrix.dtype)
    padded[:cols] = matrix
    return np.ascontiguousarray(padded.reshape(tiles, lanes, steps).transpose(0, 2, 1))


def _pack_sparse(
    weight: NDArray[np.int8], pattern: NM, format: Format, lanes: int
) -> tuple[NDArray[np.int8], NDArray[np.uint32]]:
    """Values (column tiles, steps, lanes) and position words; padding lanes are rows of zeros, packed like
    any other."""
    groups = -(-weight.shape[1] // pattern.m)
    cols = -(-weight.shape[0] // lanes) * lanes
    padded = np.zeros((cols, groups * pattern.m), np.int8)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    taken = _taken(padded.reshape(cols * groups, pattern.m), pattern.n)
    values = padded.reshape(-1)[taken.reshape(-1)].reshape(cols, groups * pattern.n)
    if format == Format.INDEX:
        bits = index_bits(pattern.m)
        places = (np.flatnonzero(taken) % pattern.m).astype(np.uint32).reshape(cols, groups * pattern.n)
    else:
        bits = pattern.m
        weights = (np.uint32(1) << np.arange(pattern.m, dtype=np.uint32)).astype(np.float64)
        places = (taken @ weights).astype(np.uint32).reshape(cols, groups)
    return _tiles(values, lanes), _tiles(_words(places, bits), lanes)


def _taken(groups: NDArray[np.int8], n: int) -> NDArray[np.bool_]:
    """Mark n places of each group (rows of a matrix): its non-zeros, then its first zeros."""
    taken = groups != 0
    spare = (n - taken.sum(1, dtype=np.int8))[:, None]
    zeros = np.zeros(len(groups), np.int8)
    for place in range(
        groups.shape[1]
    ):  # M passes over a column each are faster than a cumulative sum along short rows
        free = ~taken[:, place]
        zeros += free
        taken[:, place] |= free & (zeros <= spare[:, 0])
    return taken


def _words(places: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """Join (cols, n) numbers of `bits` bits to (cols, words) 32-bit words, lowest bits first; the rest of the
    last word is zero."""
    each = WORD_BITS // bits
    words = -(-places.shape[1] // each)
    padded = np.zeros((len(places), words * each), np.uint32)
    padded[:, : places.shape[1]] = places
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    return np.bitwise_or.reduce(padded.reshape(len(places), words, each) << shifts, axis=2).astype("<u4")


def _read_positions(packed: PackedWeights, groups: int) -> NDArray[np.int64]:
    """Position within its group of every value: (column tiles, groups, n, lanes)."""
    tiles, _, lanes = packed.values.shape
    bits = index_bits(packed.m) if packed.format == Format.INDEX else packed.m
    each = WORD_BITS // bits
    shifts = (np.arange(each, dtype=np.uint64) * np.uint64(bits))[:, None]
    numbers = (packed.positions.astype(np.uint64)[:, :, None, :] >> shifts) & np.uint64((1 << bits) - 1)
    fields = numbers.reshape(tiles, -1, lanes).astype(np.int64)
    if packed.format == Format.INDEX:
        return fields[:, : groups * packed.n].reshape(tiles, groups, packed.n, lanes)
    marks = (fields[:, :groups, None, :] >> np.arange(packed.m)[:, None]) & 1
    order: NDArray[np.int64] = np.argsort(1 - marks, axis=2, kind="stable")
    return order[:, :, : packed.n]
