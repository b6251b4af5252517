"""Where the token rows of a tensor lie: in whole row tiles of one batch entry and, at its end, in a tail.

A sequence of S rows has S // T whole row tiles and a tail of S mod T rows. Tails are short, and a row tile costs the same
however few of its rows are in use. So the tails of several batch entries share row tiles ("packed"), side by side: a linear
layer then computes less padding. Attention works on one sequence at a time: keys and values have all tiles of a batch entry
in a row, the tail in the token rows where the shared tile has it, so that it is moved as whole columns.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["PatchPlacement", "Piece", "Placement", "RowPlacement"]


@dataclass(frozen=True)
class Piece:
    """Rows of one batch entry in one row tile: `tile` of the packed tensor, token rows [skip, skip + count)."""

    tile: int
    skip: int
    count: int


@dataclass(frozen=True)
class RowPlacement:
    """Placement of `batch` sequences of `length` rows in row tiles of `rows` (T) token rows."""

    batch: int
    length: int
    rows: int

    @property
    def whole(self) -> int:
        """Whole row tiles of a batch entry."""
        return self.length // self.rows

    @property
    def tail(self) -> int:
        """Rows of a batch entry after its whole tiles."""
        return self.length % self.rows

    @property
    def share(self) -> int:
        """Batch entries whose tails share a row tile; 1 if none do."""
        return max(1, min(self.batch, self.rows // self.tail)) if self.tail else 1

    @property
    def own_tiles(self) -> int:
        """Row tiles of a batch entry on its own, tail included."""
        return self.whole + (self.tail > 0)

    @property
    def tiles(self) -> int:
        """Row tiles of the packed tensor: the whole ones of each batch entry, then the tails; unshared tails follow
        their batch entry's whole tiles."""
        if self.share == 1:
            return self.batch * self.own_tiles
        return self.batch * self.whole + -(-self.batch // self.share)

    def shift(self, batch: int) -> int:
        """Token row of its tile at which the tail of a batch entry starts."""
        return batch % self.share * self.tail

    def span(self, batch: int) -> int:
        """Rows of a batch entry with all its tiles in a row: the whole ones, the gap before the tail, the tail."""
        return self.length + self.shift(batch)

    @property
    def longest_span(self) -> int:
        """Largest `span` of a batch entry."""
        return self.span(self.share - 1)

    def pieces(self, batch: int) -> list[Piece]:
        """The row tiles of the packed tensor with rows of a batch entry, in the order of its rows."""
        if self.share == 1:
            first, sizes = batch * self.own_tiles, [self.rows] * self.whole + [self.tail] * (self.tail > 0)
            return [Piece(first + i, 0, size) for i, size in enumerate(sizes)]
        tail = Piece(self.batch * self.whole + batch // self.share, self.shift(batch), self.tail)
        return [Piece(batch * self.whole + i, 0, self.rows) for i in range(self.whole)] + [tail]

    def members(self, tile: int) -> list[tuple[int, int]]:
        """(batch entry, which of its own row tiles) that a row tile of the packed tensor holds."""
        if self.share == 1:
            return [divmod(tile, self.own_tiles)]
        if tile < self.batch * self.whole:
            return [divmod(tile, self.whole)]
        first = (tile - self.batch * self.whole) * self.share
        return [(batch, self.whole) for batch in range(first, min(self.batch, first + self.share))]

    def packed_rows(self) -> NDArray[np.int64]:
        """Row of the packed tensor, tiles one after the other, of each row: (batch, length)."""
        return np.stack([
            np.concatenate([piece.tile * self.rows + piece.skip + np.arange(piece.count) for piece in self.pieces(batch)])
            for batch in range(self.batch)
        ])

    def own_rows(self, batch: int) -> NDArray[np.int64]:
        """Place of each row of a batch entry that has all its tiles in a row (keys, values): (length,), in 0..span."""
        rows = np.arange(self.length)
        return rows + np.where(rows >= self.whole * self.rows, self.shift(batch), 0)


@dataclass(frozen=True)
class PatchPlacement:
    """Placement of `batch` images of (height, width) pixels: an image is cut into a grid of patches, a row group of a tile
    holds the same pixel of each patch, a tile one pixel of all patches.

    So the neighbour of every pixel of a tile is in the tile of the neighbouring pixel, in the same row; for pixels at the edge
    of their patches it is in the tile of the opposite edge, a fixed number of row groups further. A convolution then
    reads whole tiles, turned by that number (`a_rotate`), and nothing is ever copied. The grid's patches need not divide the
    image: what is outside it is not used. Several images share a tile, as many as fit.

    Row groups are `groups` parts of the `rows` token rows of a tile (`Arch.row_groups`); the rows of one belong to different
    images.
    """

    batch: int
    height: int
    width: int
    rows: int
    groups: int
    grid: tuple[int, int]  #: patches from top to bottom and from left to right

    @property
    def patch(self) -> tuple[int, int]:
        """Pixels of a patch, vertical and horizontal."""
        return -(-self.height // self.grid[0]), -(-self.width // self.grid[1])

    @property
    def together(self) -> int:
        """Images that share a tile."""
        return self.groups // (self.grid[0] * self.grid[1]) * (self.rows // self.groups)

    @property
    def tiles(self) -> int:
        """Row tiles of the tensor."""
        return -(-self.batch // self.together) * self.patch[0] * self.patch[1]

    @property
    def length(self) -> int:
        """Pixels of an image."""
        return self.height * self.width

    @property
    def share(self) -> int:
        """Batch entries whose rows share tiles."""
        return min(self.batch, self.together)

    def packed_rows(self) -> NDArray[np.int64]:
        """Row of the packed tensor, tiles one after the other, of each pixel: (batch, height * width)."""
        (high, wide), depth = self.patch, self.rows // self.groups
        image, y, x = np.ogrid[: self.batch, : self.height, : self.width]
        tile = (image // self.together * high + y % high) * wide + x % wide
        group = (image % self.together // depth * self.grid[0] + y // high) * self.grid[1] + x // wide
        return (tile * self.rows + group * depth + image % depth).reshape(self.batch, -1).astype(np.int64)


Placement = RowPlacement | PatchPlacement
