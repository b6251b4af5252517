"""The N:M sparsity pattern as a value: at most N non-zeros among each M consecutive weights."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MAX_M", "NM"]

MAX_M = 32
"""Largest group the framework handles: five index bits, one 32-bit bitmap word."""


@dataclass(frozen=True, init=False, slots=True)
class NM:
    """At most ``n`` non-zeros in every group of ``m`` consecutive weights.

    ``NM("2:4")``, ``NM(2, 4)`` and ``NM(NM(2, 4))`` are the same value; ``NM("dense")`` is ``NM(1, 1)``.
    Equal when both numbers are equal (2:4 is not 1:2), hashable, and has no ordering.

    Raises
    ------
    TypeError
        The pattern is neither a string, an ``NM`` nor two integers.
    ValueError
        The string does not read as ``N:M``, or not 1 <= N <= M <= 32.
    """

    n: int
    m: int

    def __init__(self, n: str | int | NM, m: int | None = None) -> None:
        first, second = _numbers(n, m)
        _check(first, second)
        object.__setattr__(self, "n", first)
        object.__setattr__(self, "m", second)

    @property
    def density(self) -> float:
        """Largest share of non-zeros, in (0, 1]."""
        return self.n / self.m

    @property
    def is_dense(self) -> bool:
        """Whether the pattern allows every weight to be non-zero."""
        return self.n == self.m

    def kept(self, size: int) -> int:
        """Non-zeros that a mask keeps in a group of ``size`` elements, 0 <= size <= m.

        A full group keeps ``n``. The remainder group at the end of a row keeps its share rounded up,
        ``ceil(n * size / m)``: never more than ``n`` (the hardware reads at most n per group) nor than
        ``size``, and at least one, so that a short tail is not cut off altogether.
        """
        if not 0 <= size <= self.m:
            raise ValueError(f"a group of {self} has 0 to {self.m} elements, not {size}")
        return -(-self.n * size // self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def __repr__(self) -> str:
        return f'NM("{self.n}:{self.m}")'


def _numbers(n: object, m: object) -> tuple[int, int]:
    """Bring every spelling of a pattern to its two numbers, unchecked."""
    if isinstance(n, NM) and m is None:
        return n.n, n.m
    if isinstance(n, str) and m is None:
        return _parse(n)
    if isinstance(n, int) and isinstance(m, int) and not isinstance(n, bool) and not isinstance(m, bool):
        return n, m
    given = repr(n) if m is None else f"{n!r}, {m!r}"
    raise TypeError(f'NM takes a string such as "2:4" or two integers such as (2, 4), not {given}')


def _parse(text: str) -> tuple[int, int]:
    """Read ``"N:M"`` or ``"dense"``."""
    if text.strip().lower() == "dense":
        return 1, 1
    n, colon, m = (part.strip() for part in text.partition(":"))
    if not (colon and n.isdecimal() and m.isdecimal()):
        raise ValueError(f'an N:M pattern is written like "2:4" (or "dense"), not {text!r}')
    return int(n), int(m)


def _check(n: int, m: int) -> None:
    if n < 1:
        raise ValueError(f"N must be >= 1, not {n} (pattern {n}:{m})")
    if n > m:
        raise ValueError(f"N must be <= M, not {n} > {m} (pattern {n}:{m})")
    if m > MAX_M:
        raise ValueError(f"M must be <= {MAX_M}, not {m} (pattern {n}:{m})")
