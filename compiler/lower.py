"""Lowering: operators of a `QuantNetwork` become TILE instructions.

In order: `check_network` (law), `choose_layouts` (how each tensor lies in memory), `order_operators`, emission of each
operator (`compiler.emit`), the order of instructions (`compiler.schedule`), then the passes of `compiler.steps`: tables,
dependences, memory plan, encoding. Deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compiler.emit import Emitter, mask_stride
from compiler.emit_attention import emit_attention, visible_share
from compiler.emit_convolution import emit_convolution, emit_max_pool
from compiler.emit_matmul import emit_matmul
from compiler.emit_rearrange import emit_rearrange
from compiler.emit_rows import emit_product, emit_softmax, emit_transpose
from compiler.hold import hold_columns, join, side_by_side
from compiler.images import choose_grids
from compiler.ops import (
    Attention,
    Conv,
    Linear,
    MatMul,
    MaxPool,
    Op,
    Pointwise,
    Product,
    QuantNetwork,
    Rearrange,
    Softmax,
    Transpose,
)  # fmt: skip
from compiler.placement import RowPlacement
from compiler.plan import ADDRESS_SPACE, align_up
from compiler.program import Kind, Layout, MaskTable, OperatorInfo, TensorInfo
from compiler.schedule import Order, Task, schedule, worth_choosing
from compiler.steps import (
    Constants,
    Step,
    assign_dependences,
    burst_alignment,
    encode,
    insert_tables,
    live_ranges,
    plan_buffers,
)
from compiler.verify_network import LoweringError, check_network
from hw.arch import Arch
from hw.isa import INSTRUCTION_BYTES, Format, Opcode

__all__ = [
    "Draft", "Lowered", "LoweringError", "assemble", "choose_layouts", "draft", "emit_tasks", "lower", "order_operators",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Lowered:
    """What a `Program` needs from the back end."""

    code: bytes
    constants: NDArray[np.uint8]
    constants_address: int
    memory_bytes: int
    tensors: tuple[TensorInfo, ...]
    operators: tuple[OperatorInfo, ...]
    masks: tuple[MaskTable, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Draft:
    """A network's instructions before they have addresses.

    Members
    -------
    emitter
        Whose constants other drafts may share: then all of them are made before the first is assembled.
    orders
        The finished steps, in each of the wanted orders.
    """

    network: QuantNetwork
    emitter: Emitter
    orders: tuple[list[Step], ...]

    def code_bytes(self, order: int) -> int:
        """Bytes of the code, up to where the next may begin."""
        return align_up(len(self.orders[order]) * INSTRUCTION_BYTES, burst_alignment(self.emitter.arch))


def lower(
    network: QuantNetwork,
    arch: Arch,
    *,
    pipeline_depth: int = 1,
    reuse: bool = True,
    orders: Sequence[Order] = ("cost",),
) -> list[Lowered]:
    """Lower a network, once for each of the wanted orders of instructions.

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
    orders
        See `compiler.schedule`; of very long programs there is one, by operator.

    Raises
    ------
    LoweringError
        The network breaks a rule or does not fit the architecture; the message names operator, module path
        and shapes.
    compiler.pack.PatternError
        Weights that break their declared pattern.
    compiler.plan.PlanError
        More than 4 GiB of memory.
    """
    made = draft(network, arch, Constants(arch), pipeline_depth=pipeline_depth, orders=orders)
    image = made.emitter.constants.image
    return [
        assemble(made, order, constants=image, constants_address=made.code_bytes(order), reuse=reuse)
        for order in range(len(made.orders))
    ]


def draft(
    network: QuantNetwork, arch: Arch, constants: Constants, *, pipeline_depth: int = 1, orders: Sequence[Order] = ("cost",)
) -> Draft:
    """The first half of `lower`: the instructions; what they need of constants is added to ``constants``."""
    if pipeline_depth not in (0, 1, 2):
        raise ValueError(f"pipeline_depth must be 0, 1 or 2, not {pipeline_depth!r}")
    check_network(network, arch)
    layouts = choose_layouts(network, arch)
    _check_sizes(network, layouts, arch)
    emitter = Emitter(arch, constants, layouts)
    tasks = emit_tasks(emitter, network)
    depth = _safe_depth(network, arch, pipeline_depth)
    orders = orders if worth_choosing(tasks) else ("operator",)
    steps = tuple(_finish(schedule(tasks, arch, depth=depth, order=order)) for order in orders)
    return Draft(network=network, emitter=emitter, orders=steps)


def _check_sizes(network: QuantNetwork, infos: Mapping[str, TensorInfo], arch: Arch) -> None:
    """Refuse a tensor that memory has no room for, before its instructions are made."""
    sources = {op.out: op.source for op in network.ops}
    for name, info in infos.items():
        if info.nbytes(arch) > ADDRESS_SPACE:
            raise LoweringError(
                f"{sources.get(name) or 'the module'}: tensor {name!r} {info.shape} takes {info.nbytes(arch):,} bytes, more than "
                f"the {ADDRESS_SPACE:,} that addresses reach: compile for a smaller batch or length, or divide the module"
            )


def _finish(steps: list[Step]) -> list[Step]:
    """With tables, dependences and the end."""
    return [*assign_dependences(insert_tables(hold_columns(steps))), Step(op=-1, opcode=Opcode.HALT, note="end")]


def _safe_depth(network: QuantNetwork, arch: Arch, depth: int) -> int:
    """With three softmaxes in flight the queries of the third must not keep the probabilities of the first out of the
    lanes for good."""
    for op in network.ops:
        if isinstance(op, Attention):
            batch, keys, channels = network.tensors[op.k].shape
            if RowPlacement(batch, keys, arch.rows).longest_span + channels // op.groups > arch.lane_depth:
                return min(depth, 1)
    return depth


def emit_tasks(emitter: Emitter, network: QuantNetwork) -> list[Task]:
    """Tasks of all operators, in the order of their dependences."""
    groups = side_by_side(network, order_operators(network))
    return [task for group in groups for task in _emit(emitter, network, group)]


def _emit(emitter: Emitter, network: QuantNetwork, group: Sequence[int]) -> list[Task]:
    """Tasks of one operator, or of several side by side, over all row tiles."""
    index, op = group[0], network.ops[group[0]]
    if isinstance(op, Attention):
        return emit_attention(emitter, index, op)
    if isinstance(op, MatMul):
        return emit_matmul(emitter, index, op)
    if isinstance(op, Conv):
        return emit_convolution(emitter, index, op, network)
    if isinstance(op, MaxPool):
        return emit_max_pool(emitter, index, op, network)
    if isinstance(op, Rearrange):
        return emit_rearrange(emitter, index, op)
    if isinstance(op, Transpose):
        return emit_transpose(emitter, index, op)
    if isinstance(op, Product):
        return emit_product(emitter, index, op)
    if isinstance(op, Softmax):
        return emit_softmax(emitter, index, op)
    if isinstance(op, Linear):
        return _linears(emitter, network, group)
    return emitter.pointwise(index, op)


def _linears(emitter: Emitter, network: QuantNetwork, group: Sequence[int]) -> list[Task]:
    """Row tile by row tile, the chains of all Linears of a group in one task, then their copies."""
    ops = [(index, op) for index in group if isinstance(op := network.ops[index], Linear)]
    tasks: list[Task] = []
    for parts in zip(*(emitter.linear(index, op) for index, op in ops), strict=True):
        tasks.append(join([chain for chains, _ in parts for chain in chains]))
        tasks += [Task((step,)) for _, copies in parts for step in copies]
    return tasks


def order_operators(network: QuantNetwork) -> list[int]:
    """Numbers of the operators in the order in which they are emitted, each over all its row tiles.

    An operator comes right before the first one that needs it, and values are made before keys, keys before
    queries: the first scores wait for all keys but only one row tile of queries, and the values have until
    the first softmax is done.
    """
    producers = {op.out: index for index, op in enumerate(network.ops)}
    needs = [[producers[name] for name in _operands(op) if name in producers] for op in network.ops]
    needed = {index for indices in needs for index in indices}
    order: dict[int, None] = {}
    for sink in range(len(needs)):
        stack = [] if sink in needed else [sink]
        while stack:
            waiting = [index for index in needs[stack[-1]] if index not in order]
            if waiting:
                stack.append(waiting[0])
            else:
                order[stack.pop()] = None
    return list(order)


def _operands(op: Op) -> list[str]:
    """Tensors an operator reads, in the order in which they are to be made."""
    if isinstance(op, Attention):
        return [op.v, op.k, op.q]
    if isinstance(op, Rearrange):
        return list(dict.fromkeys(part.tensor for part in op.sources))
    second = op.y if isinstance(op, Product | MatMul) else None
    return [name for name in (second, op.x, op.residual.tensor if op.residual else None) if name is not None]


def choose_layouts(network: QuantNetwork, arch: Arch) -> dict[str, TensorInfo]:
    """Layout of every tensor: transposed if it is only ever the values of attentions with one number of
    heads, and whoever writes it can write it so; that of keys if it is only ever the keys; else columns (attention then
    makes a copy)."""
    value_heads: dict[str, set[int]] = {}
    keys: set[str] = set()
    plain: set[str] = set()
    for op in network.ops:
        if isinstance(op, Attention):
            value_heads.setdefault(op.v, set()).add(op.groups)
            keys.add(op.k)
            plain.add(op.q)
        elif isinstance(op, Rearrange | Transpose | Product | Softmax):
            plain.update((op.out, *_operands(op)))
        elif op.x is not None:
            plain.add(op.x)
        if isinstance(op, MatMul):
            value_heads.setdefault(op.y, set()).add(1)
        if not isinstance(op, Attention) and op.residual is not None:
            plain.add(op.residual.tensor)
    producers = {op.out: op for op in network.ops}
    patches = choose_grids(network, arch)
    infos = {}
    for name, tensor in network.tensors.items():
        heads = value_heads.get(name, set())
        turned = len(heads) == 1 and name not in plain | keys
        if turned and name in producers:
            turned = _writes_transposed(producers[name], tensor.shape[2] // min(heads), arch)
            turned &= not isinstance(producers[name], MatMul) or RowPlacement(*tensor.shape[:2], arch.rows).share == 1
        only_keys = name in keys - plain and not heads and RowPlacement(*tensor.shape[:2], arch.rows).share > 1
        layout: Layout = (
            "keymask" if tensor.dtype == "keymask" else "transposed" if turned else "keys" if only_keys else "columns"
        )
        infos[name] = TensorInfo(
            name=name,
            of=name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            scale=float(tensor.scale),
            layout=layout,
            heads=min(heads) if turned else 1,
            address=0,
            written=-1,
            last_use=-1,
            kept=True,
            patches=patches.get(name),
            pitch=align_up(tensor.shape[2], arch.rows) if isinstance(producers.get(name), Transpose) else 0,
        )
    return infos


def _writes_transposed(op: Op, head_dim: int, arch: Arch) -> bool:
    if isinstance(op, Attention | Conv | MaxPool) or (isinstance(op, Pointwise) and op.channels is not None):
        return False
    if head_dim % arch.lanes == 0:
        return True
    # one instruction per head; a row normalisation needs the whole row in one
    return not isinstance(op, MatMul) and op.norm is None


def assemble(made: Draft, order: int, *, constants: NDArray[np.uint8], constants_address: int, reuse: bool) -> Lowered:
    """The second half of `lower`: memory plan, code and tables of one order of a draft; activations come behind the
    constants, the image of the draft's `Constants`."""
    emitter, network, steps = made.emitter, made.network, made.orders[order]
    arch, align = emitter.arch, burst_alignment(emitter.arch)
    sizes = {
        info.name: info.nbytes(arch) for info in emitter.tensors.values() if info.layout != "keymask"
    } | emitter.tails
    masks = _mask_tables(emitter)
    sizes |= {name: table.batch * table.stride for name, table in masks.items()}
    plan = plan_buffers(
        sizes,
        steps,
        pinned=frozenset({*network.constants, *masks}),
        given=frozenset(network.inputs),
        results=frozenset(network.outputs),
        base=align_up(constants_address + len(constants), align),
        align=align,
        reuse=reuse,
    )
    addresses = {name: constants_address + offset for name, offset in emitter.constants.offsets.items()}
    addresses |= plan.addresses
    ranges = live_ranges(steps)
    completed = {buffer: index for index, step in enumerate(steps) for buffer, _ in step.writes}
    spans = _spans(steps)
    infos = [
        info
        if info.layout == "keymask"
        else replace(
            info,
            address=plan.addresses[info.name],
            written=completed.get(info.name, -1),
            last_use=ranges.get(info.name, (-1, -1))[1],
        )
        for info in emitter.tensors.values()
    ]
    return Lowered(
        code=encode(steps, addresses),
        constants=constants,
        constants_address=constants_address,
        memory_bytes=plan.end,
        tensors=tuple(_mark_kept(infos, {plan.addresses[name]: size for name, size in emitter.tails.items()}, arch)),
        operators=tuple(_operator_info(emitter, network, index, spans.get(index, ())) for index in range(len(network.ops))),
        masks=tuple(replace(table, address=addresses[name]) for name, table in masks.items()),
    )


def _mask_tables(emitter: Emitter) -> dict[str, MaskTable]:
    tables = {}
    for (tensor, mult, shift), name in emitter.tables.items():
        batch, _, keys = emitter.tensors[tensor].shape
        tables[name] = MaskTable(
            tensor=tensor,
            address=0,
            stride=mask_stride(RowPlacement(batch, keys, emitter.arch.rows), emitter.arch),
            batch=batch,
            keys=keys,
            mult=mult,
            shift=shift,
        )
    return tables


def _mark_kept(infos: list[TensorInfo], scratch: Mapping[int, int], arch: Arch) -> list[TensorInfo]:
    """`kept` is False for tensors whose bytes a later tensor or scratch buffer (size by address) takes. Tensors that share
    bytes do not live at the same time."""
    spans = [(info, info.address, info.address + info.nbytes(arch)) for info in infos]
    return [
        replace(
            info,
            kept=not any(
                other.written > info.written and start < other_stop and other_start < stop
                for other, other_start, other_stop in spans
            )
            and not any(start < address + size and address < stop for address, size in scratch.items()),
        )
        for info, start, stop in spans
    ]


def _operator_info(
    emitter: Emitter, network: QuantNetwork, index: int, spans: Sequence[tuple[int, int]]
) -> OperatorInfo:
    op, tensors = network.ops[index], network.tensors
    batch, rows, channels = tensors[op.out].shape
    weight_bytes, weight_format, pattern, density = 0, "", "", 1.0
    if isinstance(op, Linear):
        kind: Kind = "linear"
        shape = (batch * rows, op.weight.shape[1], channels)
        weight_bytes, weight_format = emitter.weights[index]
        pattern = "dense" if weight_format == Format.DENSE.name else str(op.pattern)
        density = op.pattern.n / op.pattern.m if op.pattern is not None else 1.0
        macs = shape[0] * shape[1] * shape[2]
    elif isinstance(op, Conv):
        kind, shape = "convolution", (batch * rows, op.weight[0].size, channels)
        weight_bytes, weight_format = emitter.weights[index]
        pattern = "dense" if op.pattern is None else str(op.pattern)
        density = op.pattern.n / op.pattern.m if op.pattern is not None else 1.0
        macs = shape[0] * shape[1] * shape[2]
    elif isinstance(op, MatMul):
        kind, shape = "matmul", (batch * rows, tensors[op.x].shape[2], channels)
        macs = shape[0] * shape[1] * shape[2]
    elif isinstance(op, Product):
        kind, shape = "product", (batch * rows, tensors[op.x].shape[2], channels)
        macs = shape[0] * shape[1] * shape[2]
    elif isinstance(op, Softmax):
        kind, shape, macs = "softmax", (batch * rows, channels, channels), 0
    elif isinstance(op, Rearrange | Transpose):
        kind, shape, macs = "rearrangement", (batch * rows, channels, channels), 0
    elif isinstance(op, MaxPool):
        kind, shape, macs = "pooling", (batch * rows, channels, channels), 0
    elif isinstance(op, Attention):
        kind = "attention"
        shape = (batch * op.heads * rows, tensors[op.k].shape[1], channels // op.heads)
        macs = 2 * shape[0] * shape[1] * shape[2]
        density = visible_share(op)
    else:
        kind, shape, macs = "pointwise", (batch * rows, channels, channels), 0
    return OperatorInfo(
        name=op.name,
        source=op.source,
        kind=kind,
        pattern=pattern,
        shape=shape,
        macs=macs,
        effective_macs=macs * density,
        weight_bytes_dense=op.weight.size if isinstance(op, Linear | Conv) else 0,
        weight_bytes=weight_bytes,
        weight_format=weight_format.lower(),
        spans=tuple(spans),
    )


def _spans(steps: Sequence[Step]) -> dict[int, list[tuple[int, int]]]:
    """Instructions of each operator, by its number: first and one behind the last of each piece."""
    found: dict[int, list[tuple[int, int]]] = {}
    for i, step in enumerate(steps):
        spans = found.setdefault(step.op, [])
        if spans and spans[-1][1] == i:
            spans[-1] = (spans[-1][0], i + 1)
        else:
            spans.append((i, i + 1))
    return found
