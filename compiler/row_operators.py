"""Integer operators of what moves rows, and of products and softmaxes outside attention: scales and numbers of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from compiler import ops
from compiler.graph import Attention, Node, Product, Rearrange, Softmax, Transpose
from compiler.parameters import LOG2E_256, multiplier
from compiler.scales import WIDE_MARGIN

if TYPE_CHECKING:
    from compiler.quantise import Builder

__all__ = ["row_operator"]


def row_operator(builder: Builder, node: Node) -> None:
    """Add the operator of a node, and its result's tensor, if it is of these kinds."""
    if isinstance(node, Rearrange):
        _rearrange(builder, node)
    elif isinstance(node, Transpose):
        _transpose(builder, node)
    elif isinstance(node, Product):
        _product(builder, node)
    elif isinstance(node, Softmax):
        _softmax(builder, node)


def _rearrange(builder: Builder, node: Rearrange) -> None:
    """One source keeps its scale and its value at 0; several are brought to one scale. A constant has 16 bits where it is only
    added."""
    names = [builder.operand8(name) for name in node.inputs]
    dtype, scale = _grid(builder, node, names)
    out = builder.tensor(node, dtype, scale)
    if len(names) == 1 and names[0] in builder.offsets:
        builder.shift(node.name, builder.offsets[names[0]])
    factors = [multiplier(builder.tensors[name].scale / out.scale, node.source or node.name) for name in names]
    limit = np.iinfo(dtype)
    fill = None if node.fill is None else np.rint(node.fill.double().numpy() / out.scale).clip(limit.min, limit.max)
    sources = [
        ops.RowSource(
            tensor=names[part.operand], rows=part.rows.numpy(), to=part.to.numpy(), start=part.start, at=part.at,
            width=part.width, mult=factors[part.operand][0], shift=factors[part.operand][1],
        )
        for part in node.parts
    ]  # fmt: skip
    builder.ops.append(ops.Rearrange(
        name=node.name, out=node.name, source=node.source, sources=tuple(sources),
        fill=None if fill is None else fill.astype(dtype),
    ))  # fmt: skip


def _grid(builder: Builder, node: Rearrange, names: list[str]) -> tuple[ops.TensorDtype, float]:
    """dtype and scale of a rearrangement's result."""
    if not names and not builder.needs8(node.name) and node.name not in builder.outputs:
        return "int16", max(builder.calibration.peak(node.name, "out"), 1e-30) / WIDE_MARGIN
    scale = builder.out_scale(node.name)
    given = builder.tensors[names[0]].scale if len(names) == 1 else 0.0
    scored = any(isinstance(user, Attention) and node.name in user.inputs[:2] for user in builder.users[node.name])
    if given and node.fill is None:
        return "int8", max(scale, given) if scored else given
    return "int8", max(scale, given)


def _transpose(builder: Builder, node: Transpose) -> None:
    x = builder.operand8(node.inputs[0])
    out = builder.tensor(node, "int8", builder.tensors[x].scale)
    builder.ops.append(ops.Transpose(name=node.name, x=x, out=out.name, source=node.source))


def _product(builder: Builder, node: Product) -> None:
    x, y = (builder.operand8(name) for name in node.inputs)
    wide = not builder.needs8(node.name) and (builder.wide or node.name not in builder.outputs)
    scale = max(builder.calibration.peak(node.name, "out"), 1e-30) / WIDE_MARGIN if wide else builder.out_scale(node.name)
    out = builder.tensor(node, "int16" if wide else "int8", scale)
    mult, shift = multiplier(builder.tensors[x].scale * builder.tensors[y].scale / out.scale, node.source or node.name)
    builder.ops.append(ops.Product(name=node.name, x=x, y=y, out=out.name, mult=mult, shift=shift, source=node.source))


def _softmax(builder: Builder, node: Softmax) -> None:
    (x,), what = node.inputs, node.source or node.name
    out = builder.tensor(node, "int8", builder.out_scale(node.name))
    inner = multiplier(builder.tensors[x].scale * LOG2E_256, what)
    outer = multiplier(1 / ops.Softmax.ONE / out.scale, what)
    builder.ops.append(ops.Softmax(
        name=node.name, x=x, out=out.name, source=node.source, in_mult=inner[0], in_shift=inner[1], out_mult=outer[0],
        out_shift=outer[1],
    ))  # fmt: skip
