import time

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from algo.nm import NM
from compiler.pack import PatternError, check_pattern, choose_format, pack_weights, unpack_weights
from hw.isa import Format
from tests.compiler.random_networks import PATTERNS, random_weight

SHAPES = [(1, 1), (3, 7), (4, 32), (9, 33), (5, 64), (33, 95)]


def _pattern(text: str | None) -> NM | None:
    return None if text is None else NM(text)


def _formats(pattern: NM | None) -> list[Format | None]:
    return [None] if pattern is None else [None, Format.INDEX, Format.BITMAP]


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(text: str | None, shape: tuple[int, int]) -> None:
    pattern = _pattern(text)
    weight = random_weight(np.random.default_rng(shape[1]), *shape, pattern)
    for format in _formats(pattern):
        assert_array_equal(unpack_weights(pack_weights(weight, pattern, lanes=4, format=format)), weight)


def _position(packed, tile: int, step: int, lane: int) -> int:
    """Position of a value in its group, read as docs/numerics.md words it, bit by bit."""
    group, place = divmod(step, packed.n)
    if packed.format == Format.INDEX:
        bits = max(1, int(np.ceil(np.log2(packed.m))))
        word, field = divmod(step, 32 // bits)
        return int(packed.positions[tile, word, lane]) >> (bits * field) & ((1 << bits) - 1)
    word, field = divmod(group, 32 // packed.m)
    mask = int(packed.positions[tile, word, lane]) >> (packed.m * field) & ((1 << packed.m) - 1)
    ones = [p for p in range(packed.m) if mask >> p & 1]
    assert len(ones) == packed.n
    return ones[place]


@pytest.mark.parametrize("text", [text for text in PATTERNS if text is not None])
@pytest.mark.parametrize("format", [Format.INDEX, Format.BITMAP])
def test_every_value_stands_where_its_position_says(text: str, format: Format) -> None:
    pattern, lanes = NM(text), 4
    weight = random_weight(np.random.default_rng(1), 6, 43, pattern)
    packed = pack_weights(weight, pattern, lanes=lanes, format=format)
    groups = -(-43 // pattern.m)
    assert packed.values.shape == (2, groups * pattern.n, lanes)
    rebuilt = np.zeros((8, groups * pattern.m), np.int64)
    for tile in range(2):
        for lane in range(lanes):
            seen: set[int] = set()
            for step in range(packed.steps):
                column = step // pattern.n * pattern.m + _position(packed, tile, step, lane)
                assert column not in seen
                seen.add(column)
                rebuilt[tile * lanes + lane, column] += packed.values[tile, step, lane]
    assert_array_equal(rebuilt[:6, :43], weight)
    assert not rebuilt[6:].any()
    assert not rebuilt[:, 43:].any()


def test_dense_stream_is_steps_of_lanes() -> None:
    weight = np.arange(15, dtype=np.int8).reshape(5, 3)
    packed = pack_weights(weight, None, lanes=4)
    assert packed.format == Format.DENSE
    assert (packed.n, packed.m, packed.stride, packed.nbytes) == (0, 0, 12, 24)
    assert_array_equal(packed.values[0, 1], [1, 4, 7, 10])
    assert_array_equal(packed.values[1, 2], [14, 0, 0, 0])


@pytest.mark.parametrize("text", [text for text in PATTERNS if text is not None])
def test_choose_format_takes_fewer_bytes(text: str) -> None:
    pattern = NM(text)
    weight = random_weight(np.random.default_rng(2), 8, 100, pattern)
    sizes = {
        f: pack_weights(weight, pattern, lanes=4, format=f).nbytes for f in (Format.INDEX, Format.BITMAP)
    }
    chosen = choose_format(pattern, 100)
    if pattern.is_dense:
        assert chosen == Format.DENSE
    else:
        assert sizes[chosen] == min(sizes.values())
        assert pack_weights(weight, pattern, lanes=4).nbytes == min(sizes.values())


def test_violation_names_layer_row_and_group() -> None:
    weight = np.zeros((3, 10), np.int8)
    weight[2, 4:7] = 1
    with pytest.raises(
        PatternError, match=r"encoder.fc1: .* 2:4: row 2, group 1 \(inputs 4 to 7\) has 3 non-zeros"
    ):
        pack_weights(weight, NM("2:4"), lanes=4, layer="encoder.fc1")
    with pytest.raises(PatternError, match="row 2, group 1"):
        check_pattern(weight, NM("2:4"), layer="x")
    check_pattern(weight, NM("4:4"), layer="x")


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (np.zeros((2, 2)), TypeError, "int8 array, not float64"),
        ([[1]], TypeError, "int8 array, not list"),
        (np.zeros(4, np.int8), ValueError, r"\(out, in\).*not \(4,\)"),
        (np.zeros((0, 4), np.int8), ValueError, r"not \(0, 4\)"),
    ],
)
def test_bad_weights(weight: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_weights(weight, None, lanes=4)  # type: ignore[arg-type]


def test_sparse_format_needs_a_pattern() -> None:
    with pytest.raises(ValueError, match="INDEX needs an N:M pattern"):
        pack_weights(np.zeros((2, 2), np.int8), None, lanes=4, format=Format.INDEX)


def test_large_matrix_is_packed_in_well_under_a_second() -> None:
    weight = random_weight(np.random.default_rng(3), 768, 3072, NM("2:4"))
    start = time.process_time()
    pack_weights(weight, NM("2:4"), lanes=32)
    assert time.process_time() - start < 1
