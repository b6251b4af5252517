"""What of a program lies where in memory, and when: the plan of `compiler.plan` as it came out.

Time is counted in instructions, as in the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compiler.program import Program, TensorInfo
from hw.arch import Arch
from hw.isa import Instruction, Opcode, Operand, Out, RowOp, Source

__all__ = ["MemoryMap", "Region", "memory_map"]

Content = Literal["code", "constants", "masks", "inputs", "outputs", "activations"]


@dataclass(frozen=True, kw_only=True)
class Region:
    """``size`` bytes at ``address`` that hold something from instruction ``first``, by which it is written (-1: before the run),
    to instruction ``last``, the last to read it (the number of instructions: to the end of the run)."""

    name: str
    content: Content
    address: int
    size: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class MemoryMap:
    """A program's memory.

    Members
    -------
    regions
        By address; those that share bytes do not live at the same time.
    instructions
        Of the program: the length of the time axis.
    end
        Bytes of memory that the program needs.
    activations
        Bytes of the region that activations share.
    live
        Most bytes of activations in use at one time: no plan needs less.
    unshared
        Bytes of all activations, were none to share any.
    lanes, sums, row
        Of the memories on chip, the most columns that one instruction needs, and the columns there are: activations in a lane,
        partial sums, and the row unit.
    """

    regions: tuple[Region, ...]
    instructions: int
    end: int
    activations: int
    live: int
    unshared: int
    lanes: tuple[int, int]
    sums: tuple[int, int]
    row: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        used = lambda name, pair: f"{name} {pair[0]:,} of {pair[1]:,} columns"
        of = {content: sum(part.size for part in self.regions if part.content == content) for content in ("code", "constants")}
        return (
            f"memory: {self.end:,} bytes: code {of['code']:,}, constants {of['constants']:,}, activations {self.activations:,} "
            f"(in use at one time {self.live:,}; without sharing {self.unshared:,})\n"
            f"on chip, most of one instruction: {used('lanes', self.lanes)}, {used('partial sums', self.sums)}, "
            f"{used('row unit', self.row)}"
        )


def memory_map(program: Program) -> MemoryMap:
    """Where a program keeps what, and when."""
    count, arch = program.instruction_count, program.arch
    regions = [
        Region(name="code", content="code", address=program.code_address, size=len(program.code), first=-1, last=count),
        Region(name="constants", content="constants", address=program.constants_address, size=len(program.constants), first=-1,
               last=count),
        *(
            Region(name=mask.tensor, content="masks", address=mask.address, size=mask.batch * mask.stride, first=-1, last=count)
            for mask in program.masks
        ),
        *_tensors(program),
    ]  # fmt: skip
    shared = [region for region in regions if region.content not in ("code", "constants")]
    return MemoryMap(
        regions=tuple(sorted(regions, key=lambda region: (region.address, region.first))), instructions=count,
        end=program.memory_bytes, activations=program.activation_bytes, live=_most_at_once(shared, count),
        unshared=sum(region.size for region in shared), **_on_chip(program.instructions, arch),
    )  # fmt: skip


def _tensors(program: Program) -> Iterator[Region]:
    stored = [info for info in program.tensors if info.layout != "keymask"]
    targets = _stores(program.instructions)
    for info in stored:
        size, inside = info.nbytes(program.arch), info.name in program.network.outputs
        content: Content = "inputs" if info.written < 0 else "outputs" if inside else "activations"
        last = program.instruction_count if inside else max(info.last_use, info.written)
        yield Region(
            name=info.name, content=content, address=info.address, size=size, first=_first(info, stored, targets, program.arch),
            last=last,
        )  # fmt: skip


def _stores(instructions: Sequence[Instruction]) -> NDArray[np.int64]:
    """Address to which each instruction stores; -1 if it does not."""
    kinds = (Out.STORE8, Out.STORE16, Out.STORE8T)
    return np.array([item.o_addr if item.opcode == Opcode.TILE and item.out in kinds else -1 for item in instructions], np.int64)


def _first(info: TensorInfo, stored: Sequence[TensorInfo], targets: NDArray[np.int64], arch: Arch) -> int:
    """The first instruction that writes a tensor: after the last one that had to do with what lay there before."""
    if info.written < 0:
        return -1
    stop = info.address + info.nbytes(arch)
    before = max(
        (
            max(other.last_use, other.written) for other in stored
            if other is not info and other.written < info.written and other.address < stop
            and info.address < other.address + other.nbytes(arch)
        ),
        default=-1,
    )  # fmt: skip
    part = targets[before + 1 : info.written + 1]
    hits = np.flatnonzero((part >= info.address) & (part < stop))
    return before + 1 + int(hits[0]) if len(hits) else info.written


def _most_at_once(regions: Sequence[Region], count: int) -> int:
    """Most bytes in use at one time."""
    change = np.zeros(count + 3, np.int64)
    for region in regions:
        change[region.first + 1] += region.size
        change[region.last + 2] -= region.size
    return int(change.cumsum().max())


def _on_chip(instructions: Sequence[Instruction], arch: Arch) -> dict[str, tuple[int, int]]:
    tiles = [item for item in instructions if item.opcode == Opcode.TILE]
    lanes = (item.k for item in tiles if item.source == Source.ARRAY and item.operand == Operand.MEMORY)
    sums = (item.cols for item in tiles if item.psum_in or item.psum_out)
    row = (item.cols for item in tiles if item.row_op not in (RowOp.NONE, RowOp.MAX))
    return {
        "lanes": (max(lanes, default=0), arch.lane_depth), "sums": (max(sums, default=0), arch.psum_depth),
        "row": (max(row, default=0), arch.row_depth),
    }  # fmt: skip
