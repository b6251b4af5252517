"""The law of a `QuantNetwork`: what lowering and the reference may rely on. Messages name operator, module
path and shapes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiler.graph import CompileError
from compiler.ops import (
    Attention,
    Conv,
    LayerNorm,
    Linear,
    MatMul,
    MaxPool,
    Op,
    Pointwise,
    Product,
    QuantNetwork,
    QuantTensor,
    Rearrange,
    Softmax,
    Transpose,
)
from hw.arch import Arch

__all__ = ["LoweringError", "check_network", "describe"]

Shape = tuple[int, int, int]


class LoweringError(CompileError):
    """A network that breaks a rule, or that this architecture cannot run."""


def describe(op: Op) -> str:
    """How messages name an operator: its name, and the module it came from."""
    return f"{op.name} ({op.source})" if op.source and op.source != op.name else op.name


def check_network(network: QuantNetwork, arch: Arch | None = None) -> None:
    """Check every operator against the tensors it names, and against the limits of `arch`.

    Raises
    ------
    LoweringError
        The first violation.
    """
    for name, tensor in network.tensors.items():
        if tensor.name != name or len(tensor.shape) != 3 or min(tensor.shape) < 1:
            raise LoweringError(
                f"tensor {name!r} must have that name and a shape of three numbers >= 1, not {tensor}"
            )
    known: set[str] = set()
    for name in network.inputs:
        if name not in network.tensors:
            raise LoweringError(f"input {name!r} is no tensor of the network")
        known.add(name)
    for name, values in network.constants.items():
        _check_constant(name, values, network)
        known.add(name)
    for op in network.ops:
        for role, name in _operands(op):
            if name not in network.tensors or name not in known:
                raise LoweringError(f"{describe(op)}: {role} {name!r} is not written before it is read")
        if op.out not in network.tensors or op.out in known:
            raise LoweringError(f"{describe(op)}: output {op.out!r} is unknown or written twice")
        _check_op(op, network.tensors)
        if arch is not None:
            _check_limits(op, network.tensors, arch)
        known.add(op.out)
    for name in network.tensors:
        if name not in known:
            raise LoweringError(f"tensor {name!r} is neither an input nor written by any operator, nor a constant")
    for name in network.outputs:
        if name not in known or network.tensors[name].dtype == "keymask":
            raise LoweringError(f"output {name!r} is not written by any operator")


def _check_constant(name: str, values: NDArray[Any], network: QuantNetwork) -> None:
    tensor = network.tensors.get(name)
    if tensor is None or name in network.inputs:
        raise LoweringError(f"constant {name!r} is no tensor of the network, or an input")
    fits = values.shape in (tensor.shape, (1, *tensor.shape[1:])) and values.dtype.name == tensor.dtype in ("int8", "int16")
    if not fits:
        raise LoweringError(
            f"constant {name!r} must be {tensor.dtype} of shape {tensor.shape} or (1, ...), not {values.dtype} {values.shape}"
        )


def _operands(op: Op) -> Iterator[tuple[str, str]]:
    """(role, tensor name) of what an operator reads."""
    if isinstance(op, Rearrange):
        yield from (("source", part.tensor) for part in op.sources)
    if isinstance(op, Product | MatMul):
        yield "y", op.y
    names = ("q", "k", "v", "mask") if isinstance(op, Attention) else ("x",)
    for role in names:
        if getattr(op, role) is not None:
            yield role, getattr(op, role)
    if not isinstance(op, Attention) and op.residual is not None:
        yield "residual", op.residual.tensor


def _check_op(op: Op, tensors: dict[str, QuantTensor]) -> None:
    out = tensors[op.out]
    _require(op, out.dtype in ("int8", "int16"), f"output must be int8 or int16, not {out.dtype}")
    if isinstance(op, Attention):
        _check_attention(op, tensors)
        return
    if isinstance(op, Rearrange):
        _check_rearrange(op, tensors)
        return
    if isinstance(op, Transpose | Product | Softmax):
        _check_whole(op, tensors)
        return
    if op.x is not None:
        _dtype(op, "x", tensors[op.x], "int8")
    if isinstance(op, Conv | MaxPool):
        _check_window(op, tensors)
    if isinstance(op, Conv):
        _check_conv(op, tensors)
    elif isinstance(op, MaxPool):
        _require(op, tensors[op.x].dtype == out.dtype == "int8", "x and output must be int8")
        _require(op, tensors[op.x].shape[2] == out.shape[2], "x and output must have the same channels")
    elif isinstance(op, Linear):
        _check_linear(op, tensors)
    elif isinstance(op, MatMul):
        x, y = tensors[op.x], tensors[op.y]
        _dtype(op, "y", y, "int8")
        _shape(op, "y", y, (x.shape[0], x.shape[2], out.shape[2]))
        _shape(op, "output", out, (x.shape[0], x.shape[1], y.shape[2]))
        _require(op, 0 <= op.mult < 1 << 15 and 1 <= op.shift <= 63, f"mult, shift out of range: {op.mult}, {op.shift}")
    else:
        _require(
            op,
            op.x is not None or op.residual is not None,
            "neither x nor a residual: the output would be constant",
        )
        if op.x is not None and op.channels is None:
            _shape(op, "x", tensors[op.x], out.shape)
        if op.x is not None and op.channels is not None:
            _check_channels(op, op.channels, tensors[op.x], out)
        _require(
            op,
            0 <= op.mult < 1 << 15 and 1 <= op.shift <= 63,
            f"mult, shift out of range: {op.mult}, {op.shift}",
        )
    if op.residual is not None:
        residual = tensors[op.residual.tensor]
        _shape(op, "residual", residual, out.shape)
        _require(
            op, residual.dtype in ("int8", "int16"), f"residual must be int8 or int16, not {residual.dtype}"
        )
        mult, shift = op.residual.mult, op.residual.shift
        _require(
            op,
            op.residual.multiply or (0 <= mult < 1 << 15 and 1 <= shift <= 63),
            f"residual mult, shift out of range: {mult}, {shift}",
        )
        _require(op, op.x is not None or not op.residual.multiply, "a product needs x and a residual")
    if op.table is not None:
        _require(op, op.table.dtype == np.int8 and op.table.shape == (256,), "table must be 256 int8 entries")
    if op.norm is not None:
        _check_norm(op, op.norm, out.shape[2])


def _check_channels(op: Pointwise, channels: NDArray[Any], x: QuantTensor, out: QuantTensor) -> None:
    _require(op, x.shape[:2] == out.shape[:2], f"x {x.shape} must have the batch and rows of the output {out.shape}")
    fits = channels.dtype == np.int32 and channels.shape == out.shape[2:]
    _require(op, fits, f"channels must be int32 of shape {out.shape[2:]}, not {channels.dtype} {channels.shape}")
    _require(op, bool(((channels >= 0) & (channels < x.shape[2])).all()), f"channels must be in 0..{x.shape[2] - 1}")


def _check_linear(op: Linear, tensors: dict[str, QuantTensor]) -> None:
    x, out, weight = tensors[op.x], tensors[op.out], op.weight
    _require(
        op,
        weight.dtype == np.int8 and weight.ndim == 2,
        f"weight must be int8 (out, in), not {weight.dtype} {weight.shape}",
    )
    _require(
        op,
        x.shape == (*out.shape[:2], weight.shape[1]),
        f"x {x.shape} does not fit weight {weight.shape} and output {out.shape}",
    )
    _require(op, out.shape[2] == weight.shape[0], f"output {out.shape} does not fit weight {weight.shape}")
    requant, cols = op.requant, weight.shape[0]
    _parameters(op, "requant", cols, bias=requant.bias, mult=requant.mult, shift=requant.shift)


def _check_window(op: Conv | MaxPool, tensors: dict[str, QuantTensor]) -> None:
    for role, tensor in (("x", tensors[op.x]), ("output", tensors[op.out])):
        image = tensor.image
        _require(
            op, image is not None and image[0] * image[1] == tensor.shape[1],
            f"{role} ({tensor.name!r}) must be an image, its rows the pixels; it has shape {tensor.shape} and image {image}",
        )  # fmt: skip
    _require(op, tensors[op.x].shape[0] == tensors[op.out].shape[0], "x and output must have the same batch")
    window = op.window
    small = min(*window.kernel, *window.stride, *window.dilation) < 1
    _require(op, not small, f"kernel, stride and dilation must be >= 1: {window}")


def _check_conv(op: Conv, tensors: dict[str, QuantTensor]) -> None:
    weight, inputs, outputs = op.weight, tensors[op.x].shape[2], tensors[op.out].shape[2]
    _require(
        op, op.groups >= 1 and inputs % op.groups == 0 and outputs % op.groups == 0,
        f"{inputs} and {outputs} channels cannot be cut into {op.groups} groups",
    )  # fmt: skip
    wanted = (outputs, *op.window.kernel, inputs // op.groups)
    _require(
        op, weight.dtype == np.int8 and weight.shape == wanted,
        f"weight must be int8 (out, kernel height, kernel width, in / groups) = {wanted}, not {weight.dtype} {weight.shape}",
    )  # fmt: skip
    _parameters(op, "requant", outputs, bias=op.requant.bias, mult=op.requant.mult, shift=op.requant.shift)


def _check_rearrange(op: Rearrange, tensors: dict[str, QuantTensor]) -> None:
    out = tensors[op.out]
    rows, channels = out.shape[0] * out.shape[1], out.shape[2]
    _require(op, out.dtype == "int8" or not op.sources, "an output with sources must be int8")
    _require(op, bool(op.sources) or op.fill is not None, "neither sources nor a fill: the output would be zero")
    if op.fill is not None:
        _require(
            op, op.fill.shape == (rows, channels) and op.fill.dtype == out.dtype,
            f"fill must be {out.dtype} {(rows, channels)}, not {op.fill.dtype} {op.fill.shape}",
        )  # fmt: skip
    for part in op.sources:
        x = tensors[part.tensor]
        _dtype(op, "source", x, "int8")
        inside = part.rows.shape == part.to.shape and len(part.rows) > 0 and min(part.rows.min(), part.to.min()) >= 0
        inside = inside and part.rows.max() < x.shape[0] * x.shape[1] and part.to.max() < rows
        inside = inside and len(np.unique(part.to)) == len(part.to)
        _require(op, bool(inside), f"rows of source {part.tensor!r} are not distinct rows of it and of the output")
        columns = part.width >= 1 and part.start >= 0 <= part.at
        columns = columns and part.start + part.width <= x.shape[2] and part.at + part.width <= channels
        _require(op, columns, f"columns of source {part.tensor!r} are not within it and the output")
        _require(op, 0 <= part.mult < 1 << 15 and 1 <= part.shift <= 63, f"mult, shift out of range: {part.mult}, {part.shift}")


def _check_whole(op: Transpose | Product | Softmax, tensors: dict[str, QuantTensor]) -> None:
    """Operators of whole activations, without post-processing."""
    x, out = tensors[op.x], tensors[op.out]
    batch, rows, channels = x.shape
    if isinstance(op, Softmax):
        _require(op, x.dtype in ("int8", "int16") and out.dtype == "int8", "x must be int8 or int16, the output int8")
        _shape(op, "output", out, x.shape)
        inner, outer = (op.in_mult, op.in_shift), (op.out_mult, op.out_shift)
        _require(op, 0 <= inner[0] < 1 << 15 and 1 <= inner[1] <= 63, f"in_mult, in_shift out of range: {inner}")
        _require(op, 0 <= outer[0] < 1 << 16 and 1 <= outer[1] <= 40, f"out_mult, out_shift out of range: {outer}")
        return
    _dtype(op, "x", x, "int8")
    if isinstance(op, Transpose):
        _dtype(op, "output", out, "int8")
        _shape(op, "output", out, (batch, channels, rows))
        return
    y = tensors[op.y]
    _dtype(op, "y", y, "int8")
    _require(op, y.shape[0] == batch and y.shape[2] == channels, f"x {x.shape} and y {y.shape} do not fit")
    _shape(op, "output", out, (batch, rows, y.shape[1]))
    _require(op, 0 <= op.mult < 1 << 15 and 1 <= op.shift <= 63, f"mult, shift out of range: {op.mult}, {op.shift}")


def _check_norm(op: Linear | Pointwise | Conv, norm: LayerNorm, cols: int) -> None:
    _parameters(op, "norm", cols, beta=norm.beta, gamma=norm.gamma, shift=norm.shift)
    _require(op, norm.groups >= 1 and cols % norm.groups == 0, f"{cols} columns cannot be cut into {norm.groups} parts")
    alone = isinstance(op, Pointwise) and op.channels is None
    _require(op, norm.groups == 1 or alone, "only a Pointwise of whole rows has a norm of several parts")
    _require(op, 0 <= norm.eps < 1 << 32, f"norm.eps must fit 32 bits, not {norm.eps}")


def _parameters(op: Op, what: str, cols: int, **arrays: NDArray[Any]) -> None:
    """Column parameters, in the order of `hw.numerics.PARAM_DTYPE`: int32, int16, and shifts."""
    for (name, array), dtype in zip(arrays.items(), ("int32", "int16", "uint8"), strict=True):
        _require(
            op,
            array.shape == (cols,) and array.dtype == dtype,
            f"{what}.{name} must be {dtype} of shape {(cols,)}, not {array.dtype} {array.shape}",
        )
    shift = arrays["shift"]
    _require(op, bool(((shift >= 1) & (shift <= 63)).all()), f"{what}.shift must be in 1..63")


def _check_attention(op: Attention, tensors: dict[str, QuantTensor]) -> None:
    q, k, v, out = (tensors[name] for name in (op.q, op.k, op.v, op.out))
    for role, tensor in (("q", q), ("k", k), ("v", v)):
        _dtype(op, role, tensor, "int8")
    _require(
        op,
        op.heads >= 1 and q.shape[2] % op.heads == 0,
        f"{q.shape[2]} channels do not divide into {op.heads} heads",
    )
    _require(
        op,
        op.groups >= 1 and op.heads % op.groups == 0,
        f"{op.heads} heads do not divide into {op.groups} heads of keys and values",
    )
    _require(
        op,
        k.shape == v.shape and k.shape[0] == q.shape[0] and k.shape[2] * op.heads == q.shape[2] * op.groups,
        f"q {q.shape}, k {k.shape} and v {v.shape} do not fit",
    )
    _shape(op, "output", out, q.shape)
    _dtype(op, "output", out, "int8")
    if op.mask is not None:
        _dtype(op, "mask", tensors[op.mask], "keymask")
        _shape(op, "mask", tensors[op.mask], (k.shape[0], 1, k.shape[1]))
    if op.bias is not None:
        values, full = op.bias.values, (q.shape[0], op.heads, q.shape[1], k.shape[1])
        _require(
            op,
            values.dtype in (np.int8, np.int16)
            and values.ndim == 4
            and values.shape[2:] == full[2:]
            and all(size in (1, whole) for size, whole in zip(values.shape[:2], full[:2], strict=True)),
            f"bias must be int8 or int16 like {full}, not {values.dtype} {values.shape}",
        )
        _require(
            op,
            0 <= op.bias.mult < 1 << 15 and 1 <= op.bias.shift <= 63,
            f"bias mult, shift out of range: {op.bias.mult}, {op.bias.shift}",
        )
    _require(
        op,
        0 <= op.score_mult < 1 << 15 and 1 <= op.score_shift <= 63,
        f"score_mult, score_shift out of range: {op.score_mult}, {op.score_shift}",
    )
    _require(
        op,
        0 <= op.out_mult < 1 << 16 and 1 <= op.out_shift <= 40,
        f"out_mult, out_shift out of range: {op.out_mult}, {op.out_shift}",
    )


def _check_limits(op: Op, tensors: dict[str, QuantTensor], arch: Arch) -> None:
    channels = tensors[op.out].shape[2]
    if isinstance(op, Attention | MatMul) and not arch.attention:
        raise LoweringError(
            f"{describe(op)}: attention needs as many rows as lanes, {arch.name} has {arch.rows} rows and {arch.lanes} lanes: "
            f"use a preset with a square array, such as sta1024"
        )
    if isinstance(op, Transpose | Product | Softmax) and not arch.attention:
        raise LoweringError(
            f"{describe(op)}: needs as many rows as lanes, {arch.name} has {arch.rows} rows and {arch.lanes} lanes"
        )
    if isinstance(op, Softmax) and channels > min(arch.row_depth, arch.lane_depth):
        raise LoweringError(
            f"{describe(op)}: rows of {channels} columns do not fit row_depth {arch.row_depth} or lane_depth {arch.lane_depth} "
            f"of {arch.name}"
        )
    if not isinstance(op, Attention) and op.norm is not None and op.norm.width > arch.row_depth:
        raise LoweringError(
            f"{describe(op)}: the norm's rows of {op.norm.width} columns do not fit "
            f"row_depth = {arch.row_depth} of {arch.name}"
        )


def _require(op: Op, holds: bool, message: str) -> None:
    if not holds:
        raise LoweringError(f"{describe(op)}: {message}")


def _dtype(op: Op, role: str, tensor: QuantTensor, dtype: str) -> None:
    _require(op, tensor.dtype == dtype, f"{role} ({tensor.name!r}) must be {dtype}, not {tensor.dtype}")


def _shape(op: Op, role: str, tensor: QuantTensor, shape: Shape) -> None:
    _require(
        op, tensor.shape == shape, f"{role} ({tensor.name!r}) must have the shape {shape}, not {tensor.shape}"
    )
