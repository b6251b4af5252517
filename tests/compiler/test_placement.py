import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.placement import Piece, RowPlacement

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 70), st.sampled_from([4, 16, 32]))


@given(SIZES)
def test_every_row_has_a_place_of_its_own(sizes: tuple[int, int, int]) -> None:
    place = RowPlacement(*sizes)
    rows = place.packed_rows()
    assert rows.shape == (place.batch, place.length)
    assert len(np.unique(rows)) == rows.size
    assert 0 <= rows.min() and rows.max() < place.tiles * place.rows
    assert rows.max() >= (place.tiles - 1) * place.rows  # no tile is empty


@given(SIZES)
def test_own_rows_are_where_the_shared_tile_has_them(sizes: tuple[int, int, int]) -> None:
    """Moving whole row tiles of the packed tensor to a batch entry's own tiles puts its rows at `own_rows`."""
    place = RowPlacement(*sizes)
    packed = place.packed_rows()
    for batch in range(place.batch):
        own = place.own_rows(batch)
        assert own.max() + 1 == place.span(batch) <= place.longest_span <= place.own_tiles * place.rows
        for row in range(place.length):
            tile, token = divmod(packed[batch, row], place.rows)
            assert dict(place.members(int(tile)))[batch] == own[row] // place.rows
            assert token == own[row] % place.rows


@given(SIZES)
def test_pieces_cover_a_sequence_in_order(sizes: tuple[int, int, int]) -> None:
    place = RowPlacement(*sizes)
    for batch in range(place.batch):
        rows = [p.tile * place.rows + p.skip + i for p in place.pieces(batch) for i in range(p.count)]
        assert rows == place.packed_rows()[batch].tolist()
        assert all(p.skip + p.count <= place.rows for p in place.pieces(batch))


@pytest.mark.parametrize(
    ("batch", "length", "tiles"),
    [(8, 197, 50), (1, 197, 7), (8, 128, 32), (8, 48, 12), (8, 49, 16), (9, 7, 3), (2, 33, 3)],
)
def test_tiles(batch: int, length: int, tiles: int) -> None:
    assert RowPlacement(batch, length, 32).tiles == tiles


def test_pieces_of_197_tokens() -> None:
    place = RowPlacement(8, 197, 32)
    assert (place.share, place.shift(7), place.span(5)) == (6, 5, 222)
    assert place.pieces(7)[-2:] == [Piece(47, 0, 32), Piece(49, 5, 5)]
