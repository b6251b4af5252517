"""Emission: one operator becomes TILE steps, with symbolic addresses.

`Emitter` knows how tensors lie in memory and makes the parts that instructions share; `Linear` and
`Pointwise` are emitted here, attention in `compiler.emit_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from algo.nm import NM
from compiler.ops import Attention, Conv, LayerNorm, Linear, Pointwise, Requant, ResidualInput
from compiler.pack import check_pattern, pack_weights
from compiler.placement import RowPlacement
from compiler.plan import align_up
from compiler.program import Layout, TensorInfo
from compiler.schedule import Task
from compiler.steps import At, Constants, Region, Step
from compiler.verify_network import LoweringError, describe
from hw.arch import Arch
from hw.isa import Format, Out, Residual, RowOp, Scale, Source
from hw.isa_check import constant_alignment, k_limits
from hw.numerics import PARAM_DTYPE
from hw.row import norm_constants

__all__ = ["COPY", "IDENTITY", "MAX_COLS", "Emitter", "Segment", "Stream", "k_chunks", "mask_stride", "requant_params"]

MAX_COLS = (1 << 16) - 1
NOTHING = {"source": Source.ZERO, "mult": 0, "shift": 1}
"""Columns of zeros. A tensor without matmul comes as the residual, past the loader, which is then free for the next matmul."""
COPY = {"source": Source.STREAM, "mult": 2, "shift": 1}
"""Columns as they are, through the loader, which can turn them by row groups."""
IDENTITY = {"r_mult": 2, "r_shift": 1}
"""Scaling that changes nothing: rshr(2 x, 1) = x."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Output columns [start, stop) that one TILE, or one chain of TILEs with partial sums, makes."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Stream:
    """Packed weights of one segment and chunk of inputs (from `start` on) in the constants, as an instruction
    names them."""

    start: int
    fields: dict[str, int]
    addresses: dict[str, At]


@dataclass(eq=False)
class Emitter:
    """State of one lowering.

    Members
    -------
    constants : constant buffers so far. tensors : layout of each tensor, copies included.
    copies : name of the copy of a tensor in another layout, by (tensor, layout, heads). tails : bytes of the buffers for row
    tiles that hold the tails of several keys or values, and of what `compiler.emit_gather` turns. tables : name of the
    host-written parameter tables, by (mask, multiplier, shift). weights : stored bytes and format of each
    Linear, by operator number.
    """

    arch: Arch
    constants: Constants
    tensors: dict[str, TensorInfo]
    copies: dict[tuple[str, Layout, int], str] = field(default_factory=dict)
    tails: dict[str, int] = field(default_factory=dict)
    tables: dict[tuple[str, int, int], str] = field(default_factory=dict)
    weights: dict[int, tuple[int, str]] = field(default_factory=dict)

    # -- addresses -------------------------------------------------------------------------------------------

    def placement(self, name: str) -> RowPlacement:
        """Where the token rows of a tensor lie."""
        return self.tensors[name].placement(self.arch)

    def tiles(self, name: str) -> int:
        """Row tiles of a tensor in columns."""
        return self.tensors[name].stored(self.arch).tiles

    def own_tile(self, name: str, batch: int, tile: int) -> int:
        """Number of row tile `tile` of a batch entry in a tensor of keys or values; also of its region."""
        return batch * self.placement(name).own_tiles + tile

    def column(self, name: str, tile: int, channel: int = 0) -> At:
        """Column `channel` of a row tile (layouts "columns" and "keys")."""
        info = self.tensors[name]
        size = self.arch.rows * (2 if info.dtype == "int16" else 1)
        return At(name, (tile * self.pitch(name) + channel) * size)

    def pitch(self, name: str) -> int:
        """Columns from one row tile to the next."""
        return self.tensors[name].pitch or self.tensors[name].shape[2]

    def transposed(self, name: str, batch: int, head: int, row: int) -> At:
        """Row `row` of the first block of a head (layout "transposed")."""
        _, heads, blocks, rows, lanes = self.tensors[name].grid(self.arch)
        return At(name, ((batch * heads + head) * blocks * rows + row) * lanes)

    def block_stride(self, name: str) -> int:
        """Bytes from one block of features of a transposed tensor to the next."""
        return self.tensors[name].grid(self.arch)[3] * self.arch.lanes

    # -- parts of instructions -------------------------------------------------------------------------------

    def store(self, name: str, tile: int, segment: Segment) -> tuple[dict[str, int], dict[str, At], Region]:
        """Fields and addresses that store a segment's columns of a (packed) row tile, and the region they are in.

        Keys and values whose tile holds several tails go to a buffer, from which `spread` takes them.
        """
        if self.tensors[name].layout == "columns":
            return self.store_columns(name, tile, segment)
        members = self.placement(name).members(tile)
        if len(members) == 1:
            return self.store_own(name, *members[0], segment)
        channels = self.tensors[name].shape[2]
        buffer, number = f"{name}@tails", tile - self.placement(name).batch * self.placement(name).whole
        size = channels * self.arch.rows
        self.tails[buffer] = max(self.tails.get(buffer, 0), (number + 1) * size)
        address = At(buffer, number * size + segment.start * self.arch.rows)
        return {"out": Out.STORE8}, {"o_addr": address}, (buffer, number)

    def store_columns(self, name: str, tile: int, segment: Segment) -> tuple[dict[str, int], dict[str, At], Region]:
        """`store` for a tile of a tensor in columns."""
        out = Out.STORE16 if self.tensors[name].dtype == "int16" else Out.STORE8
        return {"out": out}, {"o_addr": self.column(name, tile, segment.start)}, (name, tile)

    def store_own(
        self, name: str, batch: int, tile: int, segment: Segment
    ) -> tuple[dict[str, int], dict[str, At], Region]:
        """`store` for row tile `tile` of a batch entry of keys or values."""
        info, number = self.tensors[name], self.own_tile(name, batch, tile)
        if info.layout == "keys":
            return self.store_columns(name, number, segment)
        head_dim = info.shape[2] // info.heads
        at = self.transposed(name, batch, segment.start // head_dim, tile * self.arch.rows)
        block = segment.start % head_dim // self.arch.lanes
        stride = self.block_stride(name)
        address = replace(at, offset=at.offset + block * stride)
        return {"out": Out.STORE8T, "o_stride": stride}, {"o_addr": address}, (name, number)

    def spread(self, index: int, name: str, tile: int) -> list[Step]:
        """Steps that take the tails of keys or values from their shared tile to each batch entry; none if `store` has put
        them there."""
        if self.tensors[name].layout == "columns" or len(self.placement(name).members(tile)) == 1:
            return []
        steps = []
        for segment in self.segments(name):
            _, addresses, region = self.store(name, tile, segment)
            for member in self.placement(name).members(tile):
                steps.append(self.move(index, addresses["o_addr"], region, self.store_own(name, *member, segment), segment))
        return steps

    def move(
        self, index: int, source: At, read: Region, store: tuple[dict[str, int], dict[str, At], Region], segment: Segment
    ) -> Step:
        """Copy a segment's columns of a row tile as they are."""
        fields, addresses, region = store
        return Step(
            op=index,
            fields={**NOTHING, "residual": Residual.INT8, "cols": segment.stop - segment.start, **IDENTITY, **fields},
            addresses={"r_addr": source, **addresses},
            reads=(read,),
            writes=(region,),
            note=f"copy {list(read)} columns {segment.start}..{segment.stop - 1} to {list(region)}",
        )

    def post(
        self, op: Linear | Pointwise | Conv, tile: int, segment: Segment
    ) -> tuple[dict[str, int], dict[str, At], tuple[Region, ...], Region]:
        """Residual, table, norm and store of a segment: fields, addresses, regions read, region written."""
        fields, addresses, written = self.store(op.out, tile, segment)
        more, places, reads = self.residual(op.residual, tile, segment)
        fields |= more
        addresses |= places
        if op.table is not None:
            fields["table"] = 1
        if op.norm is not None:
            norm_fields, gamma = self.norm(op.norm, segment)
            fields |= norm_fields
            addresses["g_addr"] = gamma
        return fields, addresses, reads, written

    def residual(
        self, residual: ResidualInput | None, tile: int, segment: Segment
    ) -> tuple[dict[str, int], dict[str, At], tuple[Region, ...]]:
        """Second operand of a segment: fields, addresses, regions read."""
        if residual is None:
            return {}, {}, ()
        wide = self.tensors[residual.tensor].dtype == "int16"
        kind = (Residual.MUL16 if wide else Residual.MUL8) if residual.multiply else Residual.INT16 if wide else Residual.INT8
        fields = {"residual": kind, "r_mult": residual.mult, "r_shift": residual.shift}
        return fields, {"r_addr": self.column(residual.tensor, tile, segment.start)}, ((residual.tensor, tile),)

    def norm(self, norm: LayerNorm, segment: Segment) -> tuple[dict[str, int], At]:
        """Fields of a row normalisation over the columns of a segment, and its parameters."""
        ln_inv, ln_shift, row_mult, row_shift = norm_constants(segment.stop - segment.start)
        part = slice(segment.start, segment.stop)
        fields = {
            "row_op": RowOp.RMSNORM if norm.rms else RowOp.LAYERNORM,
            "ln_inv": ln_inv,
            "ln_shift": ln_shift,
            "row_mult": row_mult,
            "row_shift": row_shift,
            "ln_eps": norm.eps,
        }
        return fields, At(self.constants.add(_params(norm.beta[part], norm.gamma[part], norm.shift[part])))

    def table(self, op: Linear | Pointwise | Conv) -> str | None:
        return None if op.table is None else self.constants.add(op.table)

    def segments(self, name: str, *, limit: int = MAX_COLS) -> list[Segment]:
        """Cut a tensor's columns so that a segment has at most `limit` columns, and heads of a transposed
        tensor start blocks."""
        info, lanes = self.tensors[name], self.arch.lanes
        channels = info.shape[2]
        head_dim = channels // info.heads
        parts = info.heads if info.layout == "transposed" and head_dim % lanes else 1
        size = channels // parts
        if size > limit:
            count = -(-size // (limit // lanes * lanes or limit))
            width = min(align_up(-(-size // count), lanes), limit)
        else:
            width = size
        return [
            Segment(start=p * size + s, stop=p * size + min(size, s + width))
            for p in range(parts)
            for s in range(0, size, width)
        ]

    def keys(self, index: int, name: str) -> tuple[str, list[Step]]:
        """A tensor with all row tiles of a batch entry in a row: its name, and the steps that make it if it is new."""
        if self.tensors[name].layout == "keys" or self.placement(name).share == 1:
            return name, []
        return self.copy(index, name, "keys", 1)

    def values(self, index: int, name: str, heads: int) -> tuple[str, list[Step]]:
        """The transposed form of a tensor for that many heads, in the same manner."""
        info = self.tensors[name]
        if info.layout == "transposed" and info.heads == heads:
            return name, []
        return self.copy(index, name, "transposed", heads)

    def copy(self, index: int, name: str, layout: Layout, heads: int) -> tuple[str, list[Step]]:
        """A tensor in columns in another layout: its name, and the steps that make it if it is new."""
        known = self.copies.get((name, layout, heads))
        if known is not None:
            return known, []
        made = f"{name}@{layout}{heads}"
        self.copies[name, layout, heads] = made
        self.tensors[made] = replace(self.tensors[name], name=made, layout=layout, heads=heads)
        place = self.placement(name)
        return made, [
            self.move(index, self.column(name, tile, s.start), (name, tile), self.store_own(made, *member, s), s)
            for tile in range(place.tiles)
            for s in self.segments(made)
            for member in place.members(tile)
        ]

    # -- operators -------------------------------------------------------------------------------------------

    def linear(self, index: int, op: Linear) -> list[tuple[list[list[Step]], list[Step]]]:
        """For each row tile: one TILE for each segment of columns, or a chain of them over chunks of the inputs; and what
        takes shared tails to their places."""
        check_pattern(op.weight, op.pattern, layer=describe(op))
        chunks = self.linear_chunks(op)
        limit = MAX_COLS if len(chunks) == 1 else self.arch.psum_depth
        segments = [
            (
                segment,
                At(self.constants.add(requant_params(op.requant, segment))),
                [self.pack(index, op, segment, chunk) for chunk in chunks],
            )
            for segment in self.segments(op.out, limit=limit)
        ]
        return [
            ([self.linear_chain(index, op, tile, *segment) for segment in segments], self.spread(index, op.out, tile))
            for tile in range(self.tiles(op.x))
        ]

    def linear_chunks(self, op: Linear) -> list[tuple[int, int]]:
        """How the inputs are cut; a row normalisation needs all columns of a row in one instruction."""
        cols, k = op.weight.shape
        splittable = op.norm is None or cols <= self.arch.psum_depth
        chunks = k_chunks(k, op.pattern, self.arch, cols=cols, splittable=splittable)
        if chunks is None:
            raise LoweringError(
                f"{describe(op)}: {k} inputs need partial sums of all {cols} columns before the norm, "
                f"more than psum_depth = {self.arch.psum_depth} of {self.arch.name}"
            )
        return chunks

    def linear_chain(
        self,
        index: int,
        op: Linear,
        tile: int,
        segment: Segment,
        p_addr: At,
        streams: list[Stream],
    ) -> list[Step]:
        """The TILEs of one row tile and segment: partial sums, and post-processing in the last."""
        steps, read = [], (op.x, tile)
        what = f"{op.name} [{tile}] columns {segment.start}..{segment.stop - 1}"
        for place, stream in enumerate(streams):
            fields = {**stream.fields, "cols": segment.stop - segment.start, "psum_in": int(place > 0)}
            addresses = {**stream.addresses, "a_addr": self.column(op.x, tile, stream.start)}
            note = f"{what}, inputs from {stream.start}"
            if place + 1 < len(streams):
                fields["psum_out"] = 1
                steps.append(Step(op=index, fields=fields, addresses=addresses, reads=(read,), note=note))
                continue
            post_fields, post_addresses, reads, written = self.post(op, tile, segment)
            steps.append(
                Step(
                    op=index,
                    fields={**fields, "scale": Scale.COLUMN, **post_fields},
                    addresses={**addresses, "p_addr": p_addr, **post_addresses},
                    reads=(read, *reads),
                    writes=(written,),
                    table=self.table(op),
                    note=note,
                )
            )
        return steps

    def pack(self, index: int, op: Linear, segment: Segment, chunk: tuple[int, int]) -> Stream:
        """Pack a block of a layer's weights and store it."""
        block = op.weight[segment.start : segment.stop, chunk[0] : chunk[1]]
        return self.pack_block(index, op, block, op.pattern, chunk[0])

    def pack_block(self, index: int, op: Linear | Conv, block: NDArray[np.int8], pattern: NM | None, start: int) -> Stream:
        """Pack weights (columns, inputs from `start` on) and store them."""
        format = None if self.arch.sparse else Format.DENSE
        packed = pack_weights(block, pattern, lanes=self.arch.lanes, layer=describe(op), format=format)
        addresses = {"w_addr": At(self.constants.add(packed.values))}
        if packed.format != Format.DENSE:
            addresses["x_addr"] = At(self.constants.add(packed.positions))
        size, name = self.weights.get(index, (0, packed.format.name))
        self.weights[index] = (size + packed.nbytes, name)
        return Stream(
            start=start,
            fields={
                "k": packed.k,
                "format": packed.format,
                "n": packed.n,
                "m": packed.m,
                "w_stride": packed.stride,
            },
            addresses=addresses,
        )

    def pointwise(self, index: int, op: Pointwise) -> list[Task]:
        """One TILE for each row tile and segment of columns."""
        table, steps = self.table(op), []
        for tile in range(self.tiles(op.out)):
            for segment in self.runs(op):
                fields, addresses, reads, written = self.post(op, tile, segment)
                fields |= {**NOTHING, "cols": segment.stop - segment.start}
                if op.x is not None:
                    first = segment.start if op.channels is None else int(op.channels[segment.start])
                    column = self.column(op.x, tile, first)
                    reads += ((op.x, tile),)
                    if op.residual is None:
                        fields |= {"residual": Residual.INT8, "r_mult": op.mult, "r_shift": op.shift}
                        addresses["r_addr"] = column
                    else:
                        fields |= {"source": Source.STREAM, "mult": op.mult, "shift": op.shift}
                        addresses["a_addr"] = column
                steps.append(
                    Step(
                        op=index,
                        fields=fields,
                        addresses=addresses,
                        reads=reads,
                        writes=(written,),
                        table=table,
                        note=f"{op.name} [{tile}] columns {segment.start}..{segment.stop - 1}",
                    )
                )
            steps += self.spread(index, op.out, tile)
        return [Task((step,)) for step in steps]

    def runs(self, op: Pointwise) -> list[Segment]:
        """Segments of a tensor without matmul; channels that are neighbours in x and in the output stay together."""
        width = op.norm.width if op.norm is not None else 0
        if op.norm is not None and op.norm.groups > 1:
            return [Segment(start=start, stop=start + width) for start in range(0, len(op.norm.gamma), width)]
        segments = self.segments(op.out)
        if op.channels is None:
            return segments
        breaks = np.flatnonzero(np.diff(op.channels) != 1) + 1
        cuts = sorted({*breaks.tolist(), *(segment.start for segment in segments), len(op.channels)})
        return [Segment(start=start, stop=stop) for start, stop in zip(cuts, cuts[1:], strict=False)]

    def mask_table(self, op: Attention) -> str:
        """Name of the parameter tables that the host writes for a masked attention."""
        key = (str(op.mask), op.score_mult, op.score_shift)
        return self.tables.setdefault(key, f"mask table {len(self.tables)}")


def k_chunks(
    k: int, pattern: NM | None, arch: Arch, *, cols: int, splittable: bool
) -> list[tuple[int, int]] | None:
    """Cut a reduction into pieces [start, stop) whose starts are multiples of M.

    One piece if two of it fit the lanes' ring, so that the next TILE loads while this one computes. Else
    pieces with partial sums, if that is allowed and costs less than loading without overlap; None if it does
    not fit in one piece and may not be cut.
    """
    n, m = (1, 1) if pattern is None or pattern.n == pattern.m else (pattern.n, pattern.m)
    padded = align_up(k, m)
    if 2 * padded <= arch.lane_depth:
        return [(0, k)]
    piece = arch.lane_depth // 2 // m * m
    count = -(-k // piece)
    piece = align_up(-(-k // count), m)
    pieces = [(start, min(k, start + piece)) for start in range(0, k, piece)]
    if k > k_limits(arch)[m]:
        return pieces if splittable else None
    tiles = -(-cols // arch.lanes)
    whole = tiles * max(padded // m * n, arch.lanes) + 2 * padded - arch.lane_depth
    cut = tiles * len(pieces) * max(piece // m * n, arch.lanes)
    return pieces if splittable and cut < whole else [(0, k)]


def mask_stride(keys: RowPlacement, arch: Arch) -> int:
    """Bytes from one batch entry's mask table to the next."""
    return align_up(keys.longest_span * PARAM_DTYPE.itemsize, constant_alignment(arch))


def _params(bias: NDArray[np.int32], mult: NDArray[np.int16], shift: NDArray[np.uint8]) -> NDArray[np.void]:
    params = np.zeros(len(bias), PARAM_DTYPE)
    params["bias"], params["mult"], params["shift"] = bias, mult, shift
    return params


def requant_params(requant: Requant, segment: Segment) -> NDArray[np.void]:
    part = slice(segment.start, segment.stop)
    return _params(requant.bias[part], requant.mult[part], requant.shift[part])
