import dataclasses
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algo.compress import choose_format, entropy_bits, index_bits, pack, row_bits, unpack
from algo.group_codes import codes_of_positions, codes_of_ranks, positions_of, ranks_of
from algo.nm import NM

patterns = st.integers(1, 32).flatmap(lambda m: st.builds(NM, st.integers(1, m), st.just(m)))


def sparse_matrix(pattern, shape, seed, dtype=np.int8, fill=1.0):
    """Random matrix with at most N non-zeros per group, in the remainder group too."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((int(np.prod(shape[:-1])), shape[-1]), dtype)
    for row in matrix:
        for start in range(0, shape[-1], pattern.m):
            size = min(pattern.m, shape[-1] - start)
            count = min(size, pattern.n) if rng.random() < fill else rng.integers(0, min(size, pattern.n) + 1)
            where = rng.choice(size, count, replace=False)
            row[start + where] = rng.integers(-128, 128, count)
    return matrix.reshape(shape)


@settings(max_examples=150, deadline=None)
@given(
    patterns, st.integers(1, 6), st.integers(1, 80), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 1.0])
)
def test_round_trip(pattern, out, width, seed, fill):
    matrix = sparse_matrix(pattern, (out, width), seed, fill=fill)
    formats = [None, "index", "bitmap", "rank"] + (["dense"] if pattern.is_dense else [])
    for format in formats:
        packed = pack(matrix, pattern, format)
        result = unpack(packed)
        assert result.dtype == matrix.dtype and np.array_equal(result, matrix)
        assert packed.bits <= 8 * packed.nbytes < packed.bits + 8 * out


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float32, np.float16, np.uint8])
def test_any_dtype_and_rank(dtype):
    matrix = sparse_matrix(NM("2:5"), (2, 3, 12), 1, np.int8).astype(dtype)
    assert np.array_equal(unpack(pack(matrix, NM("2:5"))), matrix)


def test_minus_zero_survives():
    matrix = np.array([[-0.0, 0, 0, 1.0]], np.float32)
    assert unpack(pack(matrix, NM("2:4"))).tobytes() == matrix.tobytes()


def test_minus_zeros_of_pruned_weights_do_not_count():
    weight = np.array([[-3.0, -2.0, 1.0, -1.0]], np.float32) * np.array([1, 0, 1, 0], np.float32)  # has a minus zero
    assert np.array_equal(unpack(pack(weight, NM("2:4"))), weight)


@settings(max_examples=40, deadline=None)
@given(patterns)
def test_ranks_number_all_sets_in_colexicographic_order(pattern):
    size, count = pattern.m, pattern.n
    total = comb(size, count)
    ranks = np.unique(np.linspace(0, total - 1, min(total, 500)).astype(np.uint32))
    codes = codes_of_ranks(ranks, size, count)
    assert (np.bitwise_count(codes) == count).all() and (np.diff(codes.astype(np.int64)) > 0).all()  # colex = order of codes
    assert np.array_equal(ranks_of(codes, size, count), ranks)
    where = positions_of(codes, count)
    by_hand = [sum(comb(int(p), i + 1) for i, p in enumerate(row)) for row in where]
    assert by_hand == ranks.tolist() and np.array_equal(codes_of_positions(where), codes)
    if total < 1000:
        sets = sorted(combinations(range(size), count), key=lambda s: s[::-1])
        every = codes_of_ranks(np.arange(total, dtype=np.uint32), size, count)
        assert [tuple(row) for row in positions_of(every, count).tolist()] == sets


def test_layout_by_hand():
    matrix = np.array([[0, 5, 0, -7, 9, 0, 0, 0, 0, 3]], np.int8)
    index = pack(matrix, NM("2:4"), "index")
    # slots: 1, 3 | 0 and the first zero, 1 | both elements of the remainder
    assert index.values.tolist() == [[5, -7, 9, 0, 0, 3]]
    assert index.positions.tolist() == [[0b01_00_11_01, 0b01_00]]
    assert (index.bits, index.nbytes) == (6 * 8 + 6 * 2, 6 + 2)
    bitmap = pack(matrix, NM("2:4"), "bitmap")
    assert bitmap.positions.tolist() == [[0b0011_1010, 0b11]]
    assert bitmap.bits == 6 * 8 + 10
    rank = pack(matrix, NM("2:4"), "rank")
    # {1, 3}: C(1,1) + C(3,2) = 4; {0, 1}: 0; both of two: no bits
    assert rank.positions.tolist() == [[0b000_100]] and rank.bits == 6 * 8 + 6


def test_choice_of_format():
    assert choose_format(NM("1:4")) == "index"
    assert choose_format(NM("2:4")) == "rank"  # 3 bits against 4 and 4
    assert choose_format(NM("3:4")) == "rank"
    assert choose_format(NM("1:16")) == "index"  # equal: the simplest to decode
    assert choose_format(NM("2:4"), width=8) == "index"  # 6 or 8 bits: a byte either way
    assert choose_format(NM("4:4")) == choose_format(NM("dense")) == "dense"
    assert (index_bits(NM("1:1")), index_bits(NM("1:2")), index_bits(NM("1:5")), index_bits(NM("1:32"))) == (
        0,
        1,
        3,
        5,
    )


@given(patterns, st.integers(1, 100))
def test_chosen_format_is_the_smaller_for_full_groups(pattern, groups):
    width = groups * pattern.m
    best = row_bits(pattern, width, choose_format(pattern))
    assert best <= min(row_bits(pattern, width, f) for f in ("index", "bitmap", "rank"))
    floor = entropy_bits(pattern, width)
    assert floor - 1e-6 <= best < floor + groups + 1e-6  # within a bit a group of the entropy


def test_too_many_nonzeros_are_named():
    matrix = np.zeros((3, 10), np.int8)
    matrix[1, 4:7] = 1
    with pytest.raises(
        ValueError, match=r"not 2:4: row 1, group 1 \(elements 4 to 7\) has 3 non-zeros, at most 2"
    ):
        pack(matrix, NM("2:4"))
    matrix[1] = 0
    matrix[2, 8:] = 1
    with pytest.raises(ValueError, match=r"row 2, group 2 \(elements 8 to 9\) has 2 non-zeros, at most 1"):
        pack(matrix, NM("1:4"))


def test_wrong_arguments():
    matrix = np.zeros((2, 4), np.int8)
    with pytest.raises(TypeError, match="takes a NumPy array of numbers, not list"):
        pack([[1]], NM("2:4"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of dense, index, bitmap, rank, not 'csr'"):
        pack(matrix, NM("2:4"), "csr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"dense" format .* not for 2:4'):
        pack(matrix, NM("2:4"), "dense")
    with pytest.raises(ValueError, match="K >= 1"):
        pack(np.zeros((2, 0), np.int8), NM("2:4"))


def test_damage_is_found():
    matrix = sparse_matrix(NM("2:5"), (4, 23), 0)
    for format in ("index", "bitmap", "rank"):
        packed = pack(matrix, NM("2:5"), format)
        with pytest.raises(ValueError, match="damaged: values is"):
            unpack(dataclasses.replace(packed, values=packed.values[:, 1:]))
        flipped = packed.positions.copy()
        flipped[2, 0] ^= 0xFF
        with pytest.raises(ValueError, match="damaged: .* in row 2"):
            unpack(dataclasses.replace(packed, positions=flipped))
