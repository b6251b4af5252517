"""Rows mixed by the array: rows of a tensor in any order, and their mean.

A tile of the tensor is stored with rows and channels changed, so that each row of ``lanes`` channels is a word of weights. The
activations are a constant matrix with a 1 where the tile of the result takes a row. Products with 1 and 0 are exact: the result
is that of copies, and a tile costs about as much as one copy of it, however its rows are mixed. With more ones it is a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compiler.emit import COPY, MAX_COLS, Emitter, Segment, requant_params
from compiler.ops import Conv, Rearrange, RowSource
from compiler.placement import Placement
from compiler.schedule import Task
from compiler.steps import At, Region, Step
from hw.arch import Arch
from hw.isa import Format, Out, Scale, Source

__all__ = ["Gather", "emit_mean", "gather_cost", "gather_steps", "gathers", "is_mean", "rotated", "turn_rows"]

INSTRUCTION_CYCLES = 13
"""Cycles that an instruction of few columns takes."""


@dataclass(frozen=True, eq=False)
class Gather:
    """Token rows [start, stop) of a tile of the result. taken: for each source tile, (row of the result's tile, row of the
    source tile) of each row that is taken, (n, 2); the others become zero."""

    tile: int
    start: int
    stop: int
    taken: dict[int, NDArray[np.int64]]


def gathers(source: Placement, out: Placement, part: RowSource, free: NDArray[np.bool_]) -> list[Gather]:
    """What brings a part's rows to the result. free: rows of the result, as stored, that may become zero, (tiles * rows,)."""
    rows, busy = out.rows, np.flatnonzero(~free)
    theirs, ours = source.packed_rows().reshape(-1)[part.rows], out.packed_rows().reshape(-1)[part.to]
    order = np.argsort(ours)
    theirs, ours = theirs[order], ours[order]
    place = np.searchsorted(busy, ours)  # a part's own rows are busy, too
    apart = (np.diff(ours // rows) != 0) | (np.diff(place) != 1)
    result = []
    for span in np.split(np.arange(len(ours)), np.flatnonzero(apart) + 1):
        first, last, tile = place[span[0]], place[span[-1]], int(ours[span[0]] // rows)
        start = max(tile * rows, busy[first - 1] + 1 if first else 0)
        stop = min((tile + 1) * rows, busy[last + 1] if last + 1 < len(busy) else len(free))
        pairs = np.stack([ours[span] % rows, theirs[span] % rows], axis=1)
        tiles = theirs[span] // rows
        taken = {int(source): pairs[tiles == source] for source in np.unique(tiles)}
        result.append(Gather(tile, int(start - tile * rows), int(stop - tile * rows), taken))
    return result


def gather_cost(found: list[Gather], width: int, arch: Arch) -> int:
    """Cycles of a part's gathers, those of `turn_rows` included."""
    blocks, turned = -(-width // arch.lanes), {tile for gather in found for tile in gather.taken}
    products = (max(width, blocks * _depth(pairs)) for gather in found for pairs in gather.taken.values())
    return len(turned) * (width + INSTRUCTION_CYCLES) + sum(cycles + INSTRUCTION_CYCLES for cycles in products)


def turn_rows(emitter: Emitter, index: int, op: Rearrange, part: RowSource, found: list[Gather]) -> dict[Region, Task]:
    """What stores the source tiles of a part with rows and channels changed; parts of like columns share them."""
    tiles = {tile for gather in found for tile in gather.taken}
    return _turn_tiles(emitter, index, _turned(op, part), part.tensor, tiles, part.start, part.width)


def _turn_tiles(
    emitter: Emitter, index: int, name: str, tensor: str, tiles: Iterable[int], start: int, columns: int
) -> dict[Region, Task]:
    """Columns of tiles of a tensor as weights, in a buffer with a place for each tile up to the last."""
    size, tasks = _turned_bytes(columns, emitter.arch), {}
    for tile in sorted(tiles):
        emitter.tails[name] = max(emitter.tails.get(name, 0), (tile + 1) * size)
        source, region = emitter.column(tensor, tile, start), (name, tile)
        tasks[region] = Task((_turn(emitter, index, source, (tensor, tile), columns, At(name, tile * size), region),))
    return tasks


def _turn(emitter: Emitter, index: int, source: At, read: Region, columns: int, to: At, region: Region) -> Step:
    """A tile as weights: words of ``lanes`` channels, one for each row."""
    block = emitter.arch.rows * emitter.arch.lanes
    return Step(
        op=index,
        fields={**COPY, "cols": columns, "out": Out.STORE8T, "o_stride": block},
        addresses={"a_addr": source, "o_addr": to}, reads=(read,), writes=(region,), note=f"rows of {list(read)} as weights",
    )  # fmt: skip


def rotated(emitter: Emitter, step: Step, rows: int) -> tuple[Step, ...]:
    """A copy (of source STREAM) of a tile that is turned by token rows: the loader does it if they are whole groups."""
    arch, columns = emitter.arch, step.fields["cols"]
    if rows % arch.group_rows == 0:
        return (replace(step, fields={**step.fields, "a_rotate": rows // arch.group_rows % arch.row_groups}),)
    name = f"{step.writes[0][0]}@odd {len(emitter.tails)}"
    emitter.tails[name] = _turned_bytes(columns, arch)
    choice = np.roll(np.eye(arch.rows, dtype=np.int8), rows, axis=0)  # (row of the tile, row of the result)
    turn = _turn(emitter, step.op, step.addresses["a_addr"], step.reads[0], columns, At(name), (name, 0))
    fields = {**step.fields, "source": Source.ARRAY, "k": arch.rows, "w_dep": 1, "w_stride": arch.rows * arch.lanes}
    places = {**step.addresses, "a_addr": At(emitter.constants.add(choice)), "w_addr": At(name)}
    return turn, replace(step, fields=fields, addresses=places, reads=((name, 0),))


def gather_steps(emitter: Emitter, index: int, op: Rearrange, part: RowSource, gather: Gather) -> Iterator[Step]:
    """A chain of TILEs, one for each source tile, for each segment of columns."""
    arch, choices = emitter.arch, {}
    for tile, pairs in gather.taken.items():
        choices[tile] = np.zeros((arch.rows, arch.rows), np.int8)
        choices[tile][pairs[:, 1], pairs[:, 0]] = 1
    for segment in _segments(part.width, len(choices), arch):
        last = Step(
            op=index,
            fields={
                "mult": part.mult, "shift": part.shift, "out": Out.STORE8, "o_skip": gather.start,
                "o_drop": arch.rows - gather.stop,
            },
            addresses={"o_addr": emitter.column(op.out, gather.tile, part.at + segment.start)},
            writes=((op.out, gather.tile),),
            note=f"{op.name} [{gather.tile}] rows {gather.start}..{gather.stop - 1} of {part.tensor}",
        )  # fmt: skip
        yield from _chain(emitter, _turned(op, part), part.width, choices, segment, last)


def _segments(columns: int, products: int, arch: Arch) -> list[Segment]:
    """Of a chain of so many products: partial sums have room for `psum_depth` columns."""
    limit = (MAX_COLS if products == 1 else arch.psum_depth) // arch.lanes * arch.lanes
    return [Segment(start=start, stop=min(columns, start + limit)) for start in range(0, columns, limit)]


def _chain(
    emitter: Emitter, turned: str, columns: int, choices: dict[int, NDArray[np.int8]], segment: Segment, last: Step
) -> Iterator[Step]:
    """A segment of the columns of a tile: for each turned tile, a matrix (its rows, rows of the result) times its rows. What is
    done with the sum stands in ``last``."""
    arch = emitter.arch
    for place, (tile, choice) in enumerate(choices.items()):
        used = np.flatnonzero(choice.any(1))
        rows = choice[used[0] : used[-1] + 1]
        offset = tile * _turned_bytes(columns, arch) + segment.start * arch.rows + int(used[0]) * arch.lanes
        fields = {
            "k": len(rows), "cols": segment.stop - segment.start, "w_dep": 1, "w_stride": arch.rows * arch.lanes,
            "psum_in": int(place > 0),
        }  # fmt: skip
        places = {"a_addr": At(emitter.constants.add(rows)), "w_addr": At(turned, offset)}
        read = (turned, tile)
        if place + 1 < len(choices):
            yield Step(op=last.op, fields={**fields, "psum_out": 1}, addresses=places, reads=(read,), note=last.note)
        else:
            yield replace(
                last, fields={**fields, **last.fields}, addresses={**places, **last.addresses}, reads=(read, *last.reads)
            )


def is_mean(op: Conv, image: tuple[int, int], arch: Arch) -> bool:
    """Whether a depth-wise convolution adds up all pixels of an image with one weight."""
    whole = op.window.kernel == image and op.window.padding == (0, 0) and op.window.dilation == (1, 1)
    depthwise = op.groups == len(op.weight) and op.weight.shape[3] == 1
    alike = op.norm is None and len(np.unique(op.weight)) == 1
    return arch.attention and whole and depthwise and alike and image[0] * image[1] > 2


def emit_mean(emitter: Emitter, index: int, op: Conv) -> list[Task]:
    """The mean of the pixels of each image: a chain for each tile of the result, in which each image has a row."""
    arch, weight, columns = emitter.arch, op.weight.flat[0], len(op.weight)
    name = f"{op.out}@{op.x}"
    theirs, ours = (emitter.tensors[n].stored(arch).packed_rows() for n in (op.x, op.out))
    emitter.weights[index] = (0, Format.DENSE.name)
    tasks = list(_turn_tiles(emitter, index, name, op.x, np.unique(theirs // arch.rows).tolist(), 0, columns).values())
    for tile in np.unique(ours // arch.rows).tolist():
        images = np.flatnonzero(ours[:, 0] // arch.rows == tile)
        rows, result = theirs[images], np.broadcast_to(ours[images] % arch.rows, theirs[images].shape)
        choices = {}
        for source in np.unique(rows // arch.rows).tolist():
            mine = rows // arch.rows == source
            choices[source] = np.zeros((arch.rows, arch.rows), np.int8)
            choices[source][rows[mine] % arch.rows, result[mine]] = weight
        for segment in _segments(columns, len(choices), arch):
            fields, addresses, reads, written = emitter.post(op, tile, segment)
            params = At(emitter.constants.add(requant_params(op.requant, segment)))
            last = Step(
                op=index, fields={"scale": Scale.COLUMN, **fields}, addresses={"p_addr": params, **addresses}, reads=reads,
                writes=(written,), table=emitter.table(op), note=f"{op.name} [{tile}]",
            )  # fmt: skip
            tasks.append(Task(tuple(_chain(emitter, name, columns, choices, segment, last))))
    return tasks


def _turned(op: Rearrange, part: RowSource) -> str:
    return f"{op.out}@{part.tensor} {part.start}+{part.width}"


def _turned_bytes(columns: int, arch: Arch) -> int:
    """Bytes of a turned tile."""
    return -(-columns // arch.lanes) * arch.rows * arch.lanes


def _depth(pairs: NDArray[np.int64]) -> int:
    """Rows of a source tile from the first to the last that is taken."""
    return int(np.ptp(pairs[:, 1])) + 1
