import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algo.compress import choose_format, index_bits, pack, row_bits, unpack
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
    formats = [None, "index", "bitmap"] + (["dense"] if pattern.is_dense else [])
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


def test_choice_of_format():
    assert choose_format(NM("1:4")) == "index"
    assert choose_format(NM("2:4")) == "index"  # equal: no decoder needed
    assert choose_format(NM("3:4")) == "bitmap"
    assert choose_format(NM("4:16")) == "bitmap" if 4 * 4 > 16 else "index"
    assert choose_format(NM("8:32")) == "bitmap"
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
    assert best <= min(row_bits(pattern, width, "index"), row_bits(pattern, width, "bitmap"))


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
    with pytest.raises(ValueError, match="one of dense, index, bitmap, not 'csr'"):
        pack(matrix, NM("2:4"), "csr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"dense" format .* not for 2:4'):
        pack(matrix, NM("2:4"), "dense")
    with pytest.raises(ValueError, match="K >= 1"):
        pack(np.zeros((2, 0), np.int8), NM("2:4"))


def test_damage_is_found():
    matrix = sparse_matrix(NM("2:5"), (4, 23), 0)
    for format in ("index", "bitmap"):
        packed = pack(matrix, NM("2:5"), format)
        with pytest.raises(ValueError, match="damaged: values is"):
            unpack(dataclasses.replace(packed, values=packed.values[:, 1:]))
        flipped = packed.positions.copy()
        flipped[2, 0] ^= 0xFF
        with pytest.raises(ValueError, match="damaged: .* in row 2"):
            unpack(dataclasses.replace(packed, positions=flipped))
