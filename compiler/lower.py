"""Lowering: operators of a `QuantNetwork` become TILE instructions.

In order: `check_network` (law), `choose_layouts` (how each tensor lies in memory), one emitter per kind of operator, `order_steps` (the
schedule), then the passes of `compiler.steps` (tables, dependences, memory plan, encoding). Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from algo.nm import NM
from compiler.ops import Attention, LayerNorm, Linear, Op, Pointwise, QuantNetwork, Requant, ResidualInput
from compiler.pack import PackedWeights, check_pattern, pack_weights
from compiler.plan import align_up
from compiler.program import MaskTable, OperatorInfo, TensorInfo
from compiler.steps import (
    At,
    Constants,
    Region,
    Step,
    assign_dependences,
    encode,
    insert_tables,
    live_ranges,
    pipelined,
    plan_buffers,
)
from compiler.verify_network import LoweringError, check_network, describe
from hw.arch import Arch
from hw.isa import INSTRUCTION_BYTES, Format, Opcode, Operand, Out, Residual, RowOp, Scale, Source
from hw.isa_check import constant_alignment, k_limits
from hw.numerics import PARAM_DTYPE
from hw.row import norm_constants

__all__ = ["Lowered", "LoweringError", "k_chunks", "lower", "order_steps"]

MAX_COLS = (1 << 16) - 1
IDENTITY = {"mult": 2, "shift": 1}
"""Requantisation that changes nothing: rshr(2 x, 1) = x."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Lowered:
    """What a `Program` needs from the back end."""

    code: bytes
    constants: NDArray[np.uint8]
    constants_address: int
    memory_bytes: int
    activation_bytes: int
    tensors: tuple[TensorInfo, ...]
    operators: tuple[OperatorInfo, ...]
    masks: tuple[MaskTable, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Output columns that one TILE (or one chain of TILEs with partial sums) makes; `block` is its first transposed block."""

    start: int
    stop: int
    head: int = 0


@dataclass(eq=False)
class _Emitter:
    """State of one lowering: constants, tensors by name, steps made so far for each operator."""

    network: QuantNetwork
    arch: Arch
    depth: int
    constants: Constants
    tensors: dict[str, TensorInfo]
    copies: dict[tuple[str, int], str] = field(default_factory=dict)
    tables: dict[tuple[str, int, int], str] = field(default_factory=dict)
    weights: dict[int, tuple[int, str]] = field(default_factory=dict)

    # -- addresses ---------------------------------------------------------------------------------------------------------------

    def row_tiles(self, name: str) -> int:
        """Row tiles of one batch entry."""
        return -(-self.tensors[name].shape[1] // self.arch.rows)

    def units(self, name: str) -> list[tuple[int, int]]:
        """All (batch entry, row tile) of a tensor in memory order."""
        return [(b, r) for b in range(self.tensors[name].shape[0]) for r in range(self.row_tiles(name))]

    def region(self, name: str, batch: int, tile: int) -> Region:
        return name, batch * self.row_tiles(name) + tile

    def column(self, name: str, batch: int, tile: int, channel: int = 0) -> At:
        """Column `channel` of a row tile (layout "columns")."""
        info = self.tensors[name]
        size = self.arch.rows * (2 if info.dtype == "int16" else 1)
        return At(name, ((batch * self.row_tiles(name) + tile) * info.shape[2] + channel) * size)

    def transposed(self, name: str, batch: int, head: int, row: int) -> At:
        """Row `row` of the first block of a head (layout "transposed")."""
        _, heads, blocks, rows, lanes = self.tensors[name].grid(self.arch.rows)
        return At(name, ((batch * heads + head) * blocks * rows + row) * lanes)

    def block_stride(self, name: str) -> int:
        """Bytes from one block of features of a transposed tensor to the next."""
        return self.tensors[name].grid(self.arch.rows)[3] * self.arch.lanes

    # -- parts of instructions ---------------------------------------------------------------------------------------------------

    def store(self, name: str, batch: int, tile: int, segment: _Segment) -> tuple[dict[str, int], dict[str, At]]:
        """Fields and addresses that store a segment's columns."""
        info = self.tensors[name]
        if info.layout == "columns":
            out = Out.STORE16 if info.dtype == "int16" else Out.STORE8
            return {"out": out}, {"o_addr": self.column(name, batch, tile, segment.start)}
        head_dim = info.shape[2] // info.heads
        at = self.transposed(name, batch, segment.start // head_dim, tile * self.arch.rows)
        block = segment.start % head_dim // self.arch.lanes
        stride = self.block_stride(name)
        return {"out": Out.STORE8T, "o_stride": stride}, {"o_addr": replace(at, offset=at.offset + block * stride)}

    def post(
        self, op: Linear | Pointwise, batch: int, tile: int, segment: _Segment
    ) -> tuple[dict[str, int], dict[str, At], tuple[Region, ...]]:
        """Residual, table, norm and store of a segment: fields, addresses, regions read."""
        fields, addresses = self.store(op.out, batch, tile, segment)
        reads: tuple[Region, ...] = ()
        if op.residual is not None:
            kind = Residual.INT16 if self.tensors[op.residual.tensor].dtype == "int16" else Residual.INT8
            fields |= {"residual": kind, "r_mult": op.residual.mult, "r_shift": op.residual.shift}
            addresses["r_addr"] = self.column(op.residual.tensor, batch, tile, segment.start)
            reads = (self.region(op.residual.tensor, batch, tile),)
        if op.table is not None:
            fields["table"] = 1
        if op.norm is not None:
            norm_fields, gamma = self.norm(op.norm, segment.stop - segment.start)
            fields |= norm_fields
            addresses["g_addr"] = gamma
        return fields, addresses, reads

    def norm(self, norm: LayerNorm, cols: int) -> tuple[dict[str, int], At]:
        """Fields of a row normalisation over `cols` columns, and its parameters."""
        ln_inv, ln_shift, row_mult, row_shift = norm_constants(cols)
        fields = {
            "row_op": RowOp.RMSNORM if norm.rms else RowOp.LAYERNORM,
            "ln_inv": ln_inv, "ln_shift": ln_shift, "row_mult": row_mult, "row_shift": row_shift, "ln_eps": norm.eps,
        }
        return fields, At(self.constants.add(_params(norm.beta, norm.gamma, norm.shift)))

    def table(self, op: Linear | Pointwise) -> str | None:
        return None if op.table is None else self.constants.add(op.table)

    def segments(self, name: str, *, limit: int = MAX_COLS) -> list[_Segment]:
        """Cut a tensor's columns so that a segment has at most `limit` columns, and heads of a transposed tensor start blocks."""
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
            _Segment(start=p * size + s, stop=p * size + min(size, s + width))
            for p in range(parts)
            for s in range(0, size, width)
        ]

    def copy(self, index: int, name: str, heads: int) -> tuple[str, list[Step]]:
        """The transposed form of a tensor for that many heads: its name, and the steps that make it if it is new."""
        info = self.tensors[name]
        if info.layout == "transposed" and info.heads == heads:
            return name, []
        if (name, heads) in self.copies:
            return self.copies[name, heads], []
        made = f"{name}@{heads}"
        self.copies[name, heads] = made
        self.tensors[made] = replace(info, name=made, layout="transposed", heads=heads)
        steps = []
        for batch, tile in self.units(name):
            for segment in self.segments(made):
                fields, addresses = self.store(made, batch, tile, segment)
                steps.append(Step(
                    op=index,
                    fields={"source": Source.STREAM, "cols": segment.stop - segment.start, **IDENTITY, **fields},
                    addresses={"a_addr": self.column(name, batch, tile, segment.start), **addresses},
                    reads=(self.region(name, batch, tile),), writes=(self.region(made, batch, tile),),
                    note=f"transpose {name} [{batch}, {tile}] columns {segment.start}..{segment.stop - 1}",
                ))
        return made, steps

    # -- operators ---------------------------------------------------------------------------------------------------------------

    def emit(self, index: int, op: Op) -> list[Step]:
        """Steps of one operator."""
        if isinstance(op, Linear):
            return self.linear(index, op)
        if isinstance(op, Attention):
            return self.attention(index, op)
        return self.pointwise(index, op)

    def linear(self, index: int, op: Linear) -> list[Step]:
        cols, k = op.weight.shape
        check_pattern(op.weight, op.pattern, layer=describe(op))
        single = op.norm is not None  # a row normalisation needs all columns of a row in one instruction
        splittable = not single or cols <= self.arch.psum_depth
        chunks = k_chunks(k, op.pattern, self.arch, cols=cols, splittable=splittable)
        if chunks is None:
            raise LoweringError(
                f"{describe(op)}: {k} inputs need partial sums of all {cols} columns before the norm, more than "
                f"psum_depth = {self.arch.psum_depth} of {self.arch.name}"
            )
        segments = self.segments(op.out, limit=MAX_COLS if len(chunks) == 1 else self.arch.psum_depth)
        packed = [[self.pack(index, op, segment, chunk) for chunk in chunks] for segment in segments]
        params = [At(self.constants.add(_requant_params(op.requant, segment))) for segment in segments]
        table = self.table(op)
        steps = []
        for batch, tile in self.units(op.x):
            for segment, streams, p_addr in zip(segments, packed, params, strict=True):
                for place, (k0, k1) in enumerate(chunks):
                    weights, weight_fields, weight_addresses = streams[place]
                    final = place + 1 == len(chunks)
                    fields = {"k": k1 - k0, "cols": segment.stop - segment.start, "psum_in": int(place > 0), **weight_fields}
                    addresses = {"a_addr": self.column(op.x, batch, tile, k0), **weight_addresses}
                    reads = (self.region(op.x, batch, tile),)
                    if final:
                        post_fields, post_addresses, post_reads = self.post(op, batch, tile, segment)
                        fields |= {"scale": Scale.COLUMN, **post_fields}
                        addresses |= {"p_addr": p_addr, **post_addresses}
                        reads += post_reads
                    else:
                        fields["psum_out"] = 1
                    steps.append(Step(
                        op=index, fields=fields, addresses=addresses, reads=reads,
                        writes=(self.region(op.out, batch, tile),) if final else (),
                        table=table if final else None,
                        note=f"{op.name} [{batch}, {tile}] columns {segment.start}..{segment.stop - 1}, inputs {k0}..{k1 - 1}, "
                             f"{_pattern_text(weights)}",
                    ))
        return steps

    def pack(
        self, index: int, op: Linear, segment: _Segment, chunk: tuple[int, int]
    ) -> tuple[PackedWeights, dict[str, int], dict[str, At]]:
        """Pack a block of a layer's weights and store it."""
        block = op.weight[segment.start : segment.stop, chunk[0] : chunk[1]]
        packed = pack_weights(block, op.pattern, lanes=self.arch.lanes, layer=describe(op))
        fields = {"format": packed.format, "n": packed.n, "m": packed.m, "w_stride": packed.stride}
        addresses = {"w_addr": At(self.constants.add(packed.values))}
        if packed.format != Format.DENSE:
            addresses["x_addr"] = At(self.constants.add(packed.positions))
        size, name = self.weights.get(index, (0, packed.format.name))
        self.weights[index] = (size + packed.nbytes, name)
        return packed, fields, addresses

    def pointwise(self, index: int, op: Pointwise) -> list[Step]:
        table, steps = self.table(op), []
        for batch, tile in self.units(op.out):
            for segment in self.segments(op.out):
                fields, addresses, reads = self.post(op, batch, tile, segment)
                fields |= {"source": Source.ZERO, "cols": segment.stop - segment.start, "mult": op.mult, "shift": op.shift}
                if op.x is not None:
                    fields["source"] = Source.STREAM
                    addresses["a_addr"] = self.column(op.x, batch, tile, segment.start)
                    reads += (self.region(op.x, batch, tile),)
                steps.append(Step(
                    op=index, fields=fields, addresses=addresses, reads=reads,
                    writes=(self.region(op.out, batch, tile),), table=table,
                    note=f"{op.name} [{batch}, {tile}] columns {segment.start}..{segment.stop - 1}",
                ))
        return steps

    def attention(self, index: int, op: Attention) -> list[Step]:
        values, steps = self.copy(index, op.v, op.heads)
        emit = _AttentionEmitter(self, index, op, values)
        units = [(batch, tile, head) for batch, tile in self.units(op.q) for head in range(op.heads)]
        if emit.blocks is not None:
            return steps + [step for unit in units for step in emit.blocked(*unit)]
        depth = self.depth
        if depth > 1 and emit.keys + emit.head_dim > self.arch.lane_depth:
            depth = 1  # the next unit's queries and a row of probabilities must fit the lanes together
        scores, outputs = [emit.scores(*unit) for unit in units], [emit.output(*unit) for unit in units]
        return steps + pipelined(scores, outputs, depth=depth)

    def mask_table(self, op: Attention) -> str:
        """Name of the parameter tables that the host writes for a masked attention."""
        assert op.mask is not None
        key = (op.mask, op.score_mult, op.score_shift)
        return self.tables.setdefault(key, f"mask table {len(self.tables)}")


@dataclass(eq=False)
class _AttentionEmitter:
    """Steps of one attention operator; `values` names the transposed values."""

    parent: _Emitter
    index: int
    op: Attention
    values: str

    def __post_init__(self) -> None:
        arch, op = self.parent.arch, self.op
        self.keys = self.parent.tensors[op.k].shape[1]
        self.channels = self.parent.tensors[op.k].shape[2]
        self.head_dim = self.channels // op.heads
        self.chunks = k_chunks(self.head_dim, None, arch, cols=self.keys, splittable=True) or []
        one_pass = min(arch.row_depth, arch.lane_depth, arch.psum_depth if len(self.chunks) > 1 else MAX_COLS)
        self.blocks = None if self.keys <= one_pass else self._blocks()

    def _blocks(self) -> list[tuple[int, int]]:
        """Blocks of keys [start, stop) of a row that is too long for one pass."""
        arch = self.parent.arch
        if len(self.chunks) > 1:
            raise LoweringError(
                f"{describe(self.op)}: heads of {self.head_dim} features need partial sums for the scores and {self.keys} keys "
                f"need them for the output; {arch.name} has one set (lane_depth {arch.lane_depth}, row_depth {arch.row_depth})"
            )
        unit = max(arch.lanes, constant_alignment(arch) // PARAM_DTYPE.itemsize)
        size = min(arch.row_depth, arch.lane_depth // 2) // unit * unit
        if not size:
            raise LoweringError(f"{describe(self.op)}: {self.keys} keys need blocks of {unit}, row_depth is {arch.row_depth}")
        count = -(-self.keys // size)
        size = align_up(-(-self.keys // count), unit)
        return [(start, min(self.keys, start + size)) for start in range(0, self.keys, size)]

    def scores(
        self, batch: int, tile: int, head: int, block: tuple[int, int] | None = None, **fields: int
    ) -> list[Step]:
        """Q * K^T for a block of keys, into the row unit."""
        parent, op, rows = self.parent, self.op, self.parent.arch.rows
        start, stop = block or (0, self.keys)
        read = [parent.region(op.k, batch, t) for t in range(start // rows, -(-stop // rows))]
        fields = {"row_op": RowOp.SOFTMAX, "out": Out.LANES, "row_mult": op.out_mult, "row_shift": op.out_shift, **fields}
        addresses: dict[str, At] = {}
        if op.mask is None:
            fields |= {"scale": Scale.CONST, "mult": op.score_mult, "shift": op.score_shift}
        else:
            fields |= {"scale": Scale.COLUMN}
            stride = _mask_stride(self.keys, parent.arch)
            addresses["p_addr"] = At(parent.mask_table(op), batch * stride + start * PARAM_DTYPE.itemsize)
        steps = []
        for place, (k0, k1) in enumerate(self.chunks):
            final, channel = place + 1 == len(self.chunks), head * self.head_dim + k0
            steps.append(Step(
                op=self.index,
                fields={
                    "k": k1 - k0, "cols": stop - start, "w_dep": 1, "w_stride": self.channels * rows, "psum_in": int(place > 0),
                    **(fields if final else {"psum_out": 1}),
                },
                addresses={
                    "a_addr": parent.column(op.q, batch, tile, channel),
                    "w_addr": parent.column(op.k, batch, start // rows, channel),
                    **(addresses if final else {}),
                },
                reads=(parent.region(op.q, batch, tile), *read),
                note=f"{op.name} scores [{batch}, {tile}] head {head}, keys {start}..{stop - 1}",
            ))
        return steps

    def output(
        self, batch: int, tile: int, head: int, block: tuple[int, int] | None = None,
        features: tuple[int, int] | None = None,
    ) -> list[Step]:
        """P * V for a block of keys; partial sums are kept unless the block is the last."""
        parent, op, arch = self.parent, self.op, self.parent.arch
        start, stop = block or (0, self.keys)
        f0, f1 = features or (0, self.head_dim)
        final, channel = stop == self.keys, head * self.head_dim + f0
        stride = parent.block_stride(self.values)
        weights = parent.transposed(self.values, batch, head, start)
        fields: dict[str, int] = {
            "operand": Operand.ROWS, "a_unsigned": 1, "k": stop - start, "cols": f1 - f0, "w_dep": 1, "w_stride": stride,
            "psum_in": int(start > 0),
        }
        addresses = {"w_addr": replace(weights, offset=weights.offset + f0 // arch.lanes * stride)}
        if final:
            store_fields, store_addresses = parent.store(op.out, batch, tile, _Segment(start=channel, stop=channel + f1 - f0))
            fields |= {"scale": Scale.ROW, **store_fields}
            addresses |= store_addresses
        else:
            fields["psum_out"] = 1
        return [Step(
            op=self.index, fields=fields, addresses=addresses,
            reads=tuple(parent.region(self.values, batch, t) for t in range(start // arch.rows, -(-stop // arch.rows))),
            writes=(parent.region(op.out, batch, tile),) if final else (),
            note=f"{op.name} output [{batch}, {tile}] head {head}, keys {start}..{stop - 1}",
        )]

    def blocked(self, batch: int, tile: int, head: int) -> list[Step]:
        """A row in blocks of keys: the maximum over all of them, then block by block exponentials and products with the values."""
        assert self.blocks is not None
        arch, steps = self.parent.arch, []
        for block in self.blocks:
            steps += self.scores(batch, tile, head, block, row_op=RowOp.MAX, out=Out.NONE, row_first=int(block[0] == 0))
        width = min(self.head_dim, arch.psum_depth)
        if width < self.head_dim:
            width = max(arch.lanes, width // arch.lanes * arch.lanes)
        if width > arch.psum_depth:
            raise LoweringError(f"{describe(self.op)}: psum_depth {arch.psum_depth} is less than the {arch.lanes} lanes")
        for f0 in range(0, self.head_dim, width):
            for block in self.blocks:
                first, last = block[0] == 0, block[1] == self.keys
                steps += self.scores(batch, tile, head, block, row_op=RowOp.EXP, row_first=int(first), row_last=int(last))
                steps += self.output(batch, tile, head, block, (f0, min(self.head_dim, f0 + width)))
        return steps


def order_steps(groups: Sequence[Sequence[Step]]) -> list[Step]:
    """The schedule: operator after operator, each over all its row tiles, so that a row tile's producer is long done when it is read."""
    return [step for group in groups for step in group]


def k_chunks(
    k: int, pattern: NM | None, arch: Arch, *, cols: int, splittable: bool
) -> list[tuple[int, int]] | None:
    """Cut a reduction into pieces [start, stop) whose starts are multiples of M.

    One piece if two of it fit the lanes' ring, so that the next TILE loads while this one computes. Else pieces with partial sums,
    if that is allowed and costs less than loading without overlap; None if it does not fit in one piece and may not be cut.
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


def lower(network: QuantNetwork, arch: Arch, *, pipeline_depth: int = 1, reuse: bool = True) -> Lowered:
    """Lower a network.

    Parameters
    ----------
    network
        Integer network; checked first.
    arch
        The accelerator to run it.
    pipeline_depth
        Attention: how many heads' scores are ahead of the outputs, 0 to 2.
    reuse
        Share memory between tensors of different times. False keeps every tensor to the end of the run.

    Raises
    ------
    LoweringError
        The network breaks a rule or does not fit the architecture; the message names operator, module path and shapes.
    compiler.pack.PatternError
        Weights that break their declared pattern.
    compiler.plan.PlanError
        More than 4 GiB of memory.
    """
    if pipeline_depth not in (0, 1, 2):
        raise ValueError(f"pipeline_depth must be 0, 1 or 2, not {pipeline_depth!r}")
    check_network(network, arch)
    emitter = _Emitter(network, arch, pipeline_depth, Constants(arch), choose_layouts(network, arch))
    groups = [emitter.emit(index, op) for index, op in enumerate(network.ops)]
    steps = assign_dependences(insert_tables(order_steps(groups)))
    steps.append(Step(op=-1, opcode=Opcode.HALT, note="end"))
    return _assemble(emitter, steps, reuse)


def choose_layouts(network: QuantNetwork, arch: Arch) -> dict[str, TensorInfo]:
    """Layout of every tensor: transposed if it is only ever the values of attentions with one number of heads, and whoever
    writes it can write it so; else columns (attention then makes a transposed copy)."""
    value_heads: dict[str, set[int]] = {}
    plain: set[str] = set()
    for op in network.ops:
        if isinstance(op, Attention):
            value_heads.setdefault(op.v, set()).add(op.heads)
            plain |= {op.q, op.k}
        elif op.x is not None:
            plain.add(op.x)
        if not isinstance(op, Attention) and op.residual is not None:
            plain.add(op.residual.tensor)
    producers = {op.out: op for op in network.ops}
    infos = {}
    for name, tensor in network.tensors.items():
        heads = value_heads.get(name, set())
        turned = len(heads) == 1 and name not in plain
        if turned and name in producers:
            turned = _writes_transposed(producers[name], tensor.shape[2] // min(heads), arch)
        layout = "keymask" if tensor.dtype == "keymask" else "transposed" if turned else "columns"
        infos[name] = TensorInfo(
            name=name, of=name, shape=tensor.shape, dtype=tensor.dtype, scale=tensor.scale, layout=layout,
            heads=min(heads) if turned else 1, address=0, written=-1, last_use=-1, kept=True,
        )
    return infos


def _writes_transposed(op: Op, head_dim: int, arch: Arch) -> bool:
    if isinstance(op, Attention):
        return False
    if head_dim % arch.lanes == 0:
        return True
    return op.norm is None  # one instruction per head; a row normalisation needs the whole row in one


def _assemble(emitter: _Emitter, steps: list[Step], reuse: bool) -> Lowered:
    """Memory plan, code and tables of the finished list of steps."""
    arch, network = emitter.arch, emitter.network
    align = constant_alignment(arch)
    constants_address = align_up(len(steps) * INSTRUCTION_BYTES, align)
    constants = emitter.constants.image
    sizes = {info.name: info.nbytes(arch.rows) for info in emitter.tensors.values() if info.layout != "keymask"}
    masks = _mask_tables(emitter)
    sizes |= {name: table.batch * table.stride for name, table in masks.items()}
    pinned = frozenset({*network.inputs, *network.outputs, *masks})
    plan = plan_buffers(
        sizes, steps, pinned=pinned, base=align_up(constants_address + len(constants), align), align=align, reuse=reuse
    )
    addresses = {name: constants_address + offset for name, offset in emitter.constants.offsets.items()}
    addresses |= plan.addresses
    ranges = live_ranges(steps)
    infos = [_placed(info, plan.addresses, ranges, pinned) for info in emitter.tensors.values()]
    return Lowered(
        code=encode(steps, addresses), constants=constants, constants_address=constants_address,
        memory_bytes=plan.end, activation_bytes=plan.peak_bytes, tensors=tuple(_mark_kept(infos, arch)),
        operators=tuple(_operator_info(emitter, index, steps) for index in range(len(network.ops))),
        masks=tuple(replace(table, address=addresses[name]) for name, table in masks.items()),
        notes=tuple(step.note for step in steps),
    )


def _mask_tables(emitter: _Emitter) -> dict[str, MaskTable]:
    tables = {}
    for (tensor, mult, shift), name in emitter.tables.items():
        batch, _, keys = emitter.tensors[tensor].shape
        tables[name] = MaskTable(
            tensor=tensor, address=0, stride=_mask_stride(keys, emitter.arch), batch=batch, keys=keys, mult=mult, shift=shift
        )
    return tables


def _mask_stride(keys: int, arch: Arch) -> int:
    return align_up(keys * PARAM_DTYPE.itemsize, constant_alignment(arch))


def _placed(
    info: TensorInfo, addresses: dict[str, int], ranges: dict[str, tuple[int, int]], pinned: frozenset[str]
) -> TensorInfo:
    if info.layout == "keymask":
        return info
    first, last = ranges.get(info.name, (-1, -1))
    return replace(info, address=addresses[info.name], written=-1 if info.name in pinned and first == -1 else first, last_use=last)


def _mark_kept(infos: list[TensorInfo], arch: Arch) -> list[TensorInfo]:
    """`kept` is False for tensors whose bytes a later tensor takes."""
    spans = [(info, info.address, info.address + info.nbytes(arch.rows)) for info in infos]
    return [
        replace(info, kept=not any(
            other.written > info.last_use and start < other_stop and other_start < stop
            for other, other_start, other_stop in spans
        ))
        for info, start, stop in spans
    ]


def _operator_info(emitter: _Emitter, index: int, steps: Sequence[Step]) -> OperatorInfo:
    op, tensors = emitter.network.ops[index], emitter.network.tensors
    batch, rows, channels = tensors[op.out].shape
    weight_bytes, weight_format, pattern, density = 0, "", "", 1.0
    if isinstance(op, Linear):
        shape = (batch * rows, op.weight.shape[1], channels)
        weight_bytes, weight_format = emitter.weights[index]
        pattern = "dense" if weight_format == Format.DENSE.name else str(op.pattern)
        density = op.pattern.n / op.pattern.m if op.pattern is not None else 1.0
        macs = shape[0] * shape[1] * shape[2]
    elif isinstance(op, Attention):
        shape = (batch * op.heads * rows, tensors[op.k].shape[1], channels // op.heads)
        macs = 2 * shape[0] * shape[1] * shape[2]
    else:
        shape, macs = (batch * rows, channels, channels), 0
    return OperatorInfo(
        name=op.name, source=op.source, kind=type(op).__name__.lower(), pattern=pattern, shape=shape,
        macs=macs, effective_macs=macs * density,
        weight_bytes_dense=op.weight.size if isinstance(op, Linear) else 0, weight_bytes=weight_bytes,
        weight_format=weight_format.lower(), spans=_spans([i for i, step in enumerate(steps) if step.op == index]),
    )


def _spans(indices: list[int]) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for i in indices:
        if spans and spans[-1][1] == i:
            spans[-1] = (spans[-1][0], i + 1)
        else:
            spans.append((i, i + 1))
    return tuple(spans)


def _params(bias: NDArray[np.int32], mult: NDArray[np.int16], shift: NDArray[np.uint8]) -> NDArray[np.void]:
    params = np.zeros(len(bias), PARAM_DTYPE)
    params["bias"], params["mult"], params["shift"] = bias, mult, shift
    return params


def _requant_params(requant: Requant, segment: _Segment) -> NDArray[np.void]:
    part = slice(segment.start, segment.stop)
    return _params(requant.bias[part], requant.mult[part], requant.shift[part])


def _pattern_text(weights: PackedWeights) -> str:
    return "dense" if weights.format == Format.DENSE else f"{weights.n}:{weights.m} {weights.format.name.lower()}"
