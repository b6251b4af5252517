"""Instructions before they have addresses: what lowering emits, and the passes that turn a list of them into
code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from compiler.plan import Buffer, MemoryPlan, align_up, plan_memory
from hw.arch import Arch
from hw.axi import BURST_BEATS
from hw.isa import Instruction, Opcode
from hw.isa_check import constant_alignment

__all__ = [
    "MAX_DEP",
    "At",
    "Constants",
    "Region",
    "Step",
    "assign_dependences",
    "burst_alignment",
    "encode",
    "insert_tables",
    "live_ranges",
    "pipelined",
]

MAX_DEP = 1 << 14
"""Longest distance written into `dep`; to wait for a later instruction than the producer is always enough."""

Region = tuple[str, int]
"""One row tile of a buffer: (buffer, batch entry * row tiles + row tile)."""


@dataclass(frozen=True)
class At:
    """An address to come: `offset` bytes into a buffer."""

    buffer: str
    offset: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One instruction of operator number `op`.

    `fields` are final field values, `addresses` the fields that need the memory plan. `reads` are the regions
    that streams with a dependence read (activations, residuals, keys and values), `writes` the region it
    stores. `table` is the activation table it needs.
    """

    op: int
    opcode: Opcode = Opcode.TILE
    fields: Mapping[str, int] = field(default_factory=dict)
    addresses: Mapping[str, At] = field(default_factory=dict)
    reads: tuple[Region, ...] = ()
    writes: tuple[Region, ...] = ()
    table: str | None = None
    note: str = ""


def burst_alignment(arch: Arch) -> int:
    """Where buffers begin: at the bytes of a longest burst, so that none needs more bursts for its place. Like layers then
    lie alike, too, and take the same time."""
    return max(BURST_BEATS * arch.bus_bytes, constant_alignment(arch))


class Constants:
    """Constant buffers in the order in which they were made, each aligned; equal ones are stored once."""

    def __init__(self, arch: Arch) -> None:
        self._align = burst_alignment(arch)
        self._names: dict[bytes, str] = {}
        self._parts: list[bytes] = []
        self._end = 0
        self.offsets: dict[str, int] = {}

    def add(self, array: NDArray[np.generic]) -> str:
        """Store the array's bytes; returns the buffer's name."""
        raw = np.ascontiguousarray(array).tobytes()
        if raw not in self._names:
            name = f"constant{len(self._names)}"
            self._names[raw] = name
            self.offsets[name] = self._end
            size = align_up(len(raw), self._align)
            self._parts.append(raw.ljust(size, b"\0"))
            self._end += size
        return self._names[raw]

    @property
    def image(self) -> NDArray[np.uint8]:
        """All buffers as they lie in memory."""
        return np.frombuffer(b"".join(self._parts), np.uint8)


def pipelined(first: Sequence[Sequence[Step]], second: Sequence[Sequence[Step]], *, depth: int) -> list[Step]:
    """Software pipeline of units of two parts each: first part of unit i + depth goes before the second part
    of unit i."""
    steps: list[Step] = []
    for i in range(len(first) + depth):
        if i < len(first):
            steps += first[i]
        if i >= depth:
            steps += second[i - depth]
    return steps


def insert_tables(steps: Sequence[Step]) -> list[Step]:
    """Put a TABLE before each step that needs another activation table than the one loaded."""
    result: list[Step] = []
    loaded: str | None = None
    for step in steps:
        if step.table is not None and step.table != loaded:
            loaded = step.table
            result.append(
                Step(
                    op=step.op, opcode=Opcode.TABLE, addresses={"p_addr": At(loaded)}, note="activation table"
                )
            )
        result.append(step)
    return result


def assign_dependences(steps: Sequence[Step]) -> list[Step]:
    """Set `dep` to the distance to the last producer of what each step reads; regions from the host need no
    wait."""
    producer: dict[Region, int] = {}
    result = []
    for index, step in enumerate(steps):
        made = [producer[region] for region in step.reads if region in producer]
        dep = min(index - max(made), MAX_DEP) if made else 0
        result.append(replace(step, fields={**step.fields, "dep": dep}) if dep else step)
        producer.update(dict.fromkeys(step.writes, index))
    return result


def live_ranges(steps: Sequence[Step]) -> dict[str, tuple[int, int]]:
    """First write and last read or write of every buffer that steps read or write."""
    ranges: dict[str, tuple[int, int]] = {}
    for index, step in enumerate(steps):
        for buffer, _ in (*step.writes, *step.reads):
            ranges[buffer] = (ranges.get(buffer, (index, index))[0], index)
    return ranges


def plan_buffers(
    sizes: Mapping[str, int],
    steps: Sequence[Step],
    *,
    pinned: frozenset[str],
    given: frozenset[str] = frozenset(),
    results: frozenset[str] = frozenset(),
    base: int,
    align: int,
    reuse: bool,
) -> MemoryPlan:
    """Plan the memory of activations and host-written buffers: pinned ones keep their bytes for the whole run, given ones are
    there before it, results stay to its end."""
    ranges, end = live_ranges(steps), len(steps)
    buffers = []
    for name, size in sizes.items():
        first, last = (-1, end) if name in pinned else ranges.get(name, (-1, -1))
        buffers.append(Buffer(name=name, size=size, first=-1 if name in given else first, last=end if name in results else last))
    return plan_memory(buffers, base=base, align=align, reuse=reuse)


def encode(steps: Sequence[Step], addresses: Mapping[str, int]) -> bytes:
    """The code."""
    return b"".join(
        Instruction(
            opcode=step.opcode,
            **step.fields,
            **{name: addresses[at.buffer] + at.offset for name, at in step.addresses.items()},
        ).encode()
        for step in steps
    )
