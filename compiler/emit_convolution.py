"""Emission of convolutions and poolings: a chain of TILEs for each row tile of the output, one for each `Fetch`.

Each TILE of a convolution multiplies one fetched tile with the weights of its kernel position and adds to the partial sums; the
last one post-processes. A depth-wise or grouped convolution is the same with weights that are zero between groups, stored
N:M where that is fewer steps, in blocks of output channels that load only what they see.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from algo.nm import NM
from compiler.emit import COPY, IDENTITY, Emitter, Segment, Stream, k_chunks, requant_params
from compiler.emit_gather import emit_mean, is_mean
from compiler.images import copy_placement
from compiler.ops import Attention, Conv, MaxPool, QuantNetwork
from compiler.pack import check_pattern
from compiler.placement import PatchPlacement
from compiler.schedule import Task
from compiler.steps import At, Step
from compiler.verify_network import LoweringError, describe
from compiler.windows import Fetch, Move, fetches, moves
from hw.arch import Arch
from hw.isa import Out, Residual, RowOp, Scale

__all__ = ["Block", "blocks", "emit_convolution", "emit_max_pool", "is_non_negative"]

OVERHEAD = 48
"""Cycles that an instruction costs the dispatcher; with so few columns it is not hidden."""


@dataclass(frozen=True)
class Block:
    """Output columns of one chain, and the input channels [first, stop) that they see, N:M if `pattern`."""

    segment: Segment
    first: int
    stop: int
    pattern: NM | None


def emit_convolution(emitter: Emitter, index: int, op: Conv, network: QuantNetwork) -> list[Task]:
    """A chain of TILEs for each row tile and block of output columns."""
    if is_mean(op, network.tensors[op.x].image or (1, 1), emitter.arch):
        return emit_mean(emitter, index, op)
    check_pattern(op.weight.reshape(-1, op.weight.shape[3]), op.pattern, layer=describe(op))
    x, tasks = _source(emitter, index, op, network)
    plan = _plan(emitter, op, x, network)
    positions = range(op.weight.shape[1] * op.weight.shape[2])
    chains = []
    for block in blocks(op, emitter.arch):
        chunks = k_chunks(block.stop - block.first, block.pattern, emitter.arch, cols=1, splittable=True) or []
        streams = {
            position: [
                emitter.pack_block(index, op, _matrix(op, block, position)[:, start:stop], block.pattern, block.first + start)
                for start, stop in chunks
            ]
            for position in positions
        }
        chains.append((block, At(emitter.constants.add(requant_params(op.requant, block.segment))), streams))
    return tasks + [
        Task(tuple(_chain(emitter, index, op, x, tile, wanted, block, p_addr, streams)))
        for tile, wanted in enumerate(plan)
        for block, p_addr, streams in chains
    ]


def _source(emitter: Emitter, index: int, op: Conv | MaxPool, network: QuantNetwork) -> tuple[str, list[Task]]:
    """What the operator reads: its input, or a copy in other patches, with the tasks that make it if it is new."""
    stored = [emitter.tensors[name].stored(emitter.arch) for name in (op.x, op.out)]
    place = copy_placement(op, network, stored[0], stored[1], emitter.arch)
    if not isinstance(place, PatchPlacement):
        return op.x, []
    name = f"{op.x}@{place.grid[0]}x{place.grid[1]}"
    if name in emitter.tensors:
        return name, []
    patches = (place.height, place.width, *place.grid)
    emitter.tensors[name] = replace(emitter.tensors[op.x], name=name, patches=patches)
    return name, [
        Task((_move(emitter, index, op.x, name, move, segment),))
        for move in moves(stored[0], place, emitter.arch)
        for segment in emitter.segments(name)
    ]


def _move(emitter: Emitter, index: int, x: str, name: str, move: Move, segment: Segment) -> Step:
    return Step(
        op=index,
        fields={
            **COPY, "cols": segment.stop - segment.start, "out": Out.STORE8,
            "a_rotate": move.rotate, "o_skip": move.start, "o_drop": emitter.arch.rows - move.stop,
        },
        addresses={
            "a_addr": emitter.column(x, move.source, segment.start),
            "o_addr": emitter.column(name, move.tile, segment.start),
        },
        reads=((x, move.source),),
        writes=((name, move.tile),),
        note=f"copy rows {move.start}..{move.stop - 1} of [{move.tile}] of {name}",
    )  # fmt: skip


def _plan(emitter: Emitter, op: Conv | MaxPool, x: str, network: QuantNetwork) -> list[list[Fetch]]:
    images = [network.tensors[name].image or (1, 1) for name in (op.x, op.out)]
    stored = [emitter.tensors[name].stored(emitter.arch) for name in (x, op.out)]
    try:
        return fetches(stored[0], stored[1], op.window.sources(*images), emitter.arch)
    except ValueError as error:
        raise LoweringError(f"{describe(op)}: {error}; use an array of at most 32 rows") from error


def _chain(
    emitter: Emitter,
    index: int,
    op: Conv,
    x: str,
    tile: int,
    wanted: list[Fetch],
    block: Block,
    p_addr: At,
    streams: dict[int, list[Stream]],
) -> list[Step]:
    """The TILEs of one row tile and block: partial sums, and post-processing in the last. A norm's instruction cannot blank rows:
    if there is no other, one that adds zero follows."""
    wanted = sorted(wanted, key=lambda fetch: fetch.zero == 0) if op.norm is not None else wanted
    parts = [(fetch, stream) for fetch in wanted for stream in streams[fetch.position]]
    if not parts or (op.norm is not None and wanted[-1].zero):
        nothing = np.zeros((block.segment.stop - block.segment.start, 1), np.int8)
        parts.append((Fetch(-1, 0, 0, 0), emitter.pack_block(index, op, nothing, None, 0)))
    steps, cols = [], block.segment.stop - block.segment.start
    for place, (fetch, stream) in enumerate(parts):
        fields = {**stream.fields, "cols": cols, "psum_in": int(place > 0), **_turned(fetch)}
        addresses = {**stream.addresses, "a_addr": emitter.column(x, fetch.tile, stream.start)}
        step = Step(
            op=index,
            fields={**fields, "psum_out": 1},
            addresses=addresses,
            reads=((x, fetch.tile),),
            note=f"{op.name} [{tile}] columns {block.segment.start}..{block.segment.stop - 1}, position {fetch.position}",
        )
        if place + 1 == len(parts):
            post, post_addresses, reads, written = emitter.post(op, tile, block.segment)
            step = replace(
                step,
                fields={**fields, "scale": Scale.COLUMN, **post},
                addresses={**addresses, "p_addr": p_addr, **post_addresses},
                reads=(*step.reads, *reads),
                writes=(written,),
                table=emitter.table(op),
            )
        steps.append(step)
    return steps


def _turned(fetch: Fetch) -> dict[str, int]:
    return {"a_rotate": fetch.rotate} | ({"g_addr": fetch.zero} if fetch.zero else {})


# -- groups --------------------------------------------------------------------------------------------------


def blocks(op: Conv, arch: Arch) -> list[Block]:
    """The output columns in blocks of one width, as wide as costs least; all of them if every output sees every input."""
    outputs, limit = len(op.weight), arch.psum_depth
    inputs = op.weight.shape[3] * op.groups
    if op.norm is not None or op.groups == 1:
        if op.norm is not None and outputs > limit:
            raise LoweringError(f"{describe(op)}: a norm over {outputs} columns needs psum_depth >= {outputs}")
        width = -(-outputs // -(-outputs // limit))
        width = width if width == outputs else -(-width // arch.lanes) * arch.lanes
        return [
            Block(Segment(start=start, stop=min(outputs, start + width)), 0, inputs, op.pattern if op.groups == 1 else None)
            for start in range(0, outputs, width)
        ]
    widths = {min(outputs, limit), *(arch.lanes << i for i in range(12) if arch.lanes << i < min(outputs, limit))}
    found = [[_block(op, start, min(outputs, start + width), arch) for start in range(0, outputs, width)] for width in widths]
    return min(found, key=lambda blocks: sum(_cycles(block, arch) for block in blocks))


def _block(op: Conv, start: int, stop: int, arch: Arch) -> Block:
    """Columns [start, stop) with the inputs of their groups, and the best pattern that their weights obey."""
    out_each, in_each = len(op.weight) // op.groups, op.weight.shape[3]
    first, last = start // out_each * in_each, ((stop - 1) // out_each + 1) * in_each
    block = Block(Segment(start=start, stop=stop), first, last, None)
    if not arch.sparse:
        return block
    weights = [_matrix(op, block, position) != 0 for position in range(op.weight.shape[1] * op.weight.shape[2])]
    marks = np.concatenate(weights)
    options = [m for m in (32, *((op.pattern.m,) if op.pattern is not None else ())) if m <= marks.shape[1]] or [marks.shape[1]]
    patterns = [NM(f"{n}:{m}") for m in options if m <= 32 and 0 < (n := _densest(marks, m)) < m]
    return replace(block, pattern=min(patterns, key=lambda p: p.n / p.m, default=None))


def _densest(marks: NDArray[np.bool_], m: int) -> int:
    """Most non-zeros in an aligned group of m columns; at least 1."""
    padded = np.pad(marks, ((0, 0), (0, -marks.shape[1] % m)))
    return max(1, int(padded.reshape(len(marks), -1, m).sum(2).max()))


def _cycles(block: Block, arch: Arch) -> float:
    """Of one fetch of the block, about; in several TILEs if the ring does not hold two of it."""
    inputs, cols = block.stop - block.first, block.segment.stop - block.segment.start
    density = 1.0 if block.pattern is None else block.pattern.n / block.pattern.m
    pieces = -(-2 * inputs // arch.lane_depth)
    multiplied = -(-cols // arch.lanes) * max(arch.lanes, inputs * density / pieces)
    return pieces * (4 + max(-(-inputs // pieces), multiplied, OVERHEAD if block.pattern else 0))


def _matrix(op: Conv, block: Block, position: int) -> NDArray[np.int8]:
    """Weights of a kernel position, (columns of the block, its inputs), with zeros between groups."""
    out_each, in_each = len(op.weight) // op.groups, op.weight.shape[3]
    flat = op.weight.reshape(len(op.weight), -1, in_each)[block.segment.start : block.segment.stop, position]
    if op.groups == 1:
        return flat
    matrix = np.zeros((len(flat), block.stop - block.first), np.int8)
    columns = np.arange(block.segment.start, block.segment.stop)[:, None] // out_each * in_each + np.arange(in_each) - block.first
    np.put_along_axis(matrix, columns, flat, axis=1)
    return matrix


# -- pooling -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """A fetch of a pooling and the row groups [start, stop) that it is for; ``first``: nothing is there to compare it with."""

    fetch: Fetch
    start: int
    stop: int
    first: bool


def emit_max_pool(emitter: Emitter, index: int, op: MaxPool, network: QuantNetwork) -> list[Task]:
    """What is seen first is written and compared with whatever comes after. All row tiles take a turn before one takes the next:
    each waits for its own last result.

    Rows that a fetch blanks read as 0. Where values may be negative they keep their bytes instead, in more instructions.
    """
    x, tasks = _source(emitter, index, op, network)
    plan = [sorted(wanted, key=lambda fetch: fetch.zero.bit_count()) for wanted in _plan(emitter, op, x, network)]
    groups = emitter.arch.row_groups
    if is_non_negative(network, op.x):
        looks = [[_Look(fetch, 0, groups, turn == 0) for turn, fetch in enumerate(wanted)] for wanted in plan]
    else:
        looks = [_looks(wanted, groups) for wanted in plan]
    for turn in range(max(map(len, looks))):
        for tile, mine in enumerate(looks):
            if turn < len(mine):
                tasks += [Task((_largest(emitter, index, op, x, tile, mine[turn], s),)) for s in emitter.segments(op.out)]
    return tasks


def _looks(wanted: list[Fetch], groups: int) -> list[_Look]:
    """Only the row groups that a fetch does not blank, run by run; it does not matter what those without a pixel get."""
    used, written, result = 0, 0, []
    for fetch in wanted:
        used |= fetch.seen | fetch.zero
    for fetch in wanted:
        for first, mask in ((True, fetch.seen & ~written), (False, fetch.seen & written)):
            result += [_Look(fetch, start, stop, first) for start, stop in _runs(mask, used & ~mask, groups)]
        written |= fetch.seen
    return result


def _runs(mask: int, barred: int, groups: int) -> Iterable[tuple[int, int]]:
    """Ranges [start, stop) that hold all bits of a mask and none that are barred."""
    start = stop = -1
    for group in range(groups):
        if mask >> group & 1:
            start, stop = (group if start < 0 else start), group + 1
        elif barred >> group & 1 and start >= 0:
            yield start, stop
            start = -1
    if start >= 0:
        yield start, stop


def _largest(emitter: Emitter, index: int, op: MaxPool, x: str, tile: int, look: _Look, segment: Segment) -> Step:
    out, region, depth = emitter.column(op.out, tile, segment.start), (op.out, tile), emitter.arch.group_rows
    compared = {} if look.first else {"residual": Residual.MAX8, **IDENTITY}
    return Step(
        op=index,
        fields={
            **COPY, "cols": segment.stop - segment.start, "out": Out.STORE8,
            "row_op": RowOp.NONE, "o_skip": look.start * depth, "o_drop": emitter.arch.rows - look.stop * depth, **compared,
            **_turned(look.fetch),
        },
        addresses={
            "a_addr": emitter.column(x, look.fetch.tile, segment.start), "o_addr": out, **({} if look.first else {"r_addr": out}),
        },
        reads=((x, look.fetch.tile), *(() if look.first else (region,))),
        writes=(region,),
        note=f"{op.name} [{tile}] position {look.fetch.position}",
    )  # fmt: skip


def is_non_negative(network: QuantNetwork, name: str) -> bool:
    """Whether no value of a tensor can be below 0: it comes out of a table without negative entries, perhaps pooled."""
    op = next((op for op in network.ops if op.out == name), None)
    if isinstance(op, MaxPool):
        return is_non_negative(network, op.x)
    if op is None or isinstance(op, Attention) or op.norm is not None or op.table is None:
        return False
    return int(op.table.min()) >= 0
