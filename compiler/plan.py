"""Memory planning: addresses for buffers that live for a while, so that buffers of different times share
bytes.

Time is counted in instructions. The accelerator consumes in program order, so a buffer's bytes are free as
soon as its last reader precedes the next writer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ADDRESS_SPACE", "Buffer", "MemoryPlan", "PlanError", "align_up", "plan_memory"]

ADDRESS_SPACE = 1 << 32
"""Addresses have 32 bits."""


class PlanError(ValueError):
    """The buffers do not fit the address space."""


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """`size` bytes in use from instruction `first` (written) to instruction `last` (read), both included."""

    name: str
    size: int
    first: int
    last: int

    def overlaps(self, other: "Buffer") -> bool:
        """Whether both are in use at some time."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class MemoryPlan:
    """Address of each buffer; `end` is the first byte after the last one."""

    addresses: dict[str, int]
    base: int
    end: int

    @property
    def peak_bytes(self) -> int:
        """Bytes of the planned region."""
        return self.end - self.base


def align_up(value: int, alignment: int) -> int:
    """Round up to a multiple."""
    return -(-value // alignment) * alignment


def plan_memory(
    buffers: Sequence[Buffer],
    *,
    base: int = 0,
    align: int = 64,
    reuse: bool = True,
    limit: int = ADDRESS_SPACE,
) -> MemoryPlan:
    """Place buffers from `base` upwards: largest first, each in the smallest gap that fits among the buffers
    it meets in time.

    Parameters
    ----------
    buffers
        Distinct names, sizes >= 1.
    base, align
        First address, and what every address is a multiple of.
    reuse
        False gives every buffer bytes of its own.
    limit
        First address that does not exist.

    Raises
    ------
    PlanError
        The buffers need more than `limit` bytes; the message names the one that did not fit.
    """
    placed: list[tuple[int, int, Buffer]] = []  # address, end, buffer; sorted
    order = sorted(enumerate(buffers), key=lambda item: (-item[1].size, item[1].first, item[0]))
    for _, buffer in order:
        busy = [(start, end) for start, end, other in placed if not reuse or buffer.overlaps(other)]
        address = _best_gap(busy, align_up(base, align), buffer.size, align)
        end = address + buffer.size
        if end > limit:
            raise PlanError(
                f"the program needs more than {limit} bytes of memory: "
                f"{buffer.name} ({buffer.size} bytes) does not fit; compile it in parts, or for a smaller batch or length"
            )
        placed.append((address, end, buffer))
        placed.sort(key=lambda item: item[:2])
    top = max((end for _, end, _ in placed), default=base)
    return MemoryPlan({buffer.name: address for address, _, buffer in placed}, base, align_up(top, align))


def _best_gap(busy: list[tuple[int, int]], base: int, size: int, align: int) -> int:
    """Start of the smallest sufficient gap between the busy ranges (sorted by start), else the end of the
    last one."""
    best, best_size, cursor = None, 0, base
    for start, end in busy:
        gap = start - cursor
        if gap >= size and (best is None or gap < best_size):
            best, best_size = cursor, gap
        cursor = max(cursor, align_up(end, align))
    return cursor if best is None else best
