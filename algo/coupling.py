"""Which channels must go together: an equivalence of numbered channels, with reasons to keep some.

Every axis of every weight hands out numbers with `Coupling.new`; operators that tie two channels to each
other `join` them; what must stay is `keep`-ed. `solve` then names the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Classes", "Coupling", "Ids"]

Ids = NDArray[np.int64]
"""Channel numbers, shape (C,)."""


@dataclass(frozen=True)
class Classes:
    """A solved coupling. ``of[i]`` is the class of channel i, its lowest member; ``kept`` gives the reason by
    class."""

    of: Ids
    kept: Mapping[int, str]


class Coupling:
    """A growing set of numbered channels, pairs that are tied, and reasons to keep channels."""

    def __init__(self) -> None:
        self._count = 0
        self._left: list[Ids] = []
        self._right: list[Ids] = []
        self._kept: list[tuple[Ids, str]] = []

    def new(self, size: int) -> Ids:
        """Numbers for ``size`` new channels, tied to nothing."""
        self._count += size
        return np.arange(self._count - size, self._count)

    def join(self, left: Ids, right: Ids) -> None:
        """Tie channel ``left[i]`` to ``right[i]``; a single channel is tied to all of the other side."""
        left, right = np.broadcast_arrays(left, right)
        self._left.append(left)
        self._right.append(right)

    def keep(self, ids: Ids, reason: str) -> None:
        """Say why channels, and all that are tied to them, cannot go; the first reason is remembered."""
        self._kept.append((ids, reason))

    def solve(self) -> Classes:
        """Classes of all channels: the connected components."""
        of = np.arange(self._count)
        left, right = (np.concatenate([of[:0], *side]) for side in (self._left, self._right))
        while True:
            lowest = np.minimum(of[left], of[right])
            if np.array_equal(of[left], of[right]):
                break
            np.minimum.at(of, of[left], lowest)
            np.minimum.at(of, of[right], lowest)
            while not np.array_equal(of, of[of]):
                of = of[of]
        kept: dict[int, str] = {}
        for ids, reason in self._kept:
            for number in np.unique(of[ids]).tolist():
                kept.setdefault(number, reason)
        return Classes(of, kept)
