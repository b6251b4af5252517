"""The integer reference: a `QuantNetwork` operator by operator on logical shapes.

What RTL and ISA engine are compared with. It knows no tiles, no packing and no addresses; the arithmetic is
that of `docs/numerics.md`, the row operations are the models of `hw.row`.

Sums of products run through floating-point matrix products, which are many times faster than integer ones,
and exact here: every partial sum, in whatever order and with or without fused multiply-add, is an integer of
magnitude at most ``max over outputs of sum |weight| * max |activation|``. If that bound is at most 2^24 every
partial sum is a float32 number; at most 2^53, a float64 number; then no rounding ever happens. `_Weight` and
`_attention` check the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

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
    ResidualInput,
    Softmax,
    Transpose,
    Window,
)
from hw.numerics import MASK_BIAS, residual_multiplier
from hw.row import layernorm_rows, norm_constants, softmax_rows

__all__ = ["dequantise", "quantise_inputs", "run_reference"]

_RANGE = {"int8": (-128, 127), "int16": (-32768, 32767), "keymask": (0, 1)}
_DTYPE = {"int8": np.int8, "int16": np.int16, "keymask": np.uint8}
_CHUNK = 1 << 22
"""Elements worked on at once, so that temporaries stay in memory that is near."""


def quantise_inputs(network: QuantNetwork, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Integers for the network's inputs from the module's own arguments.

    Parameters
    ----------
    network
        Its `meta` says how masks read (``"keep.<name>"``: the value of a key that takes part).
    inputs
        By name: float (rows, C) or (B, S, C) data; (B, S) masks of any integer type or bool. Batch and rows
        may differ from the network's, if they agree among themselves.

    Returns
    -------
    dict[str, NDArray]
        int8 or int16 ``clip(round(x / scale))`` of shape (B, S, C), half to even; uint8 (B, 1, S) for masks.

    Raises
    ------
    ValueError
        A missing or unknown name, a wrong shape, a NaN or an infinity.
    """
    unknown, missing = (
        sorted(set(inputs) - set(network.inputs)),
        [name for name in network.inputs if name not in inputs],
    )
    if unknown or missing:
        raise ValueError(
            f"the network's inputs are {', '.join(network.inputs)}, not {', '.join(inputs) or 'none'}"
        )
    result = {name: _integers(network, network.tensors[name], inputs[name]) for name in network.inputs}
    _check_inputs(network, result)
    return result


def _integers(network: QuantNetwork, tensor: QuantTensor, value: Tensor) -> NDArray[Any]:
    if not isinstance(value, Tensor):
        raise TypeError(f"input {tensor.name!r} must be a torch.Tensor, not {type(value).__name__}")
    if tensor.dtype == "keymask":
        if value.ndim != 2:
            raise ValueError(
                f"input {tensor.name!r} must be a mask of shape (batch, keys), not {tuple(value.shape)}"
            )
        keep = network.meta.get(f"keep.{tensor.name}", "1") == "1"
        return ((value != 0) == keep)[:, None, :].numpy().astype(np.uint8)
    if value.ndim == 2:
        value = value[None]
    if value.ndim != 3:
        raise ValueError(
            f"input {tensor.name!r} must be (rows, channels) or (batch, rows, channels), "
            f"not {tuple(value.shape)}"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"input {tensor.name!r} has a NaN or an infinity")
    low, high = _RANGE[tensor.dtype]
    quantised = torch.round(value.detach().double() / tensor.scale).clamp_(low, high)
    return quantised.numpy().astype(_DTYPE[tensor.dtype])


def dequantise(network: QuantNetwork, name: str, values: NDArray[Any]) -> Tensor:
    """Real values of a tensor: float32 ``(scale * values + offset) * divided``, same shape; most offsets are 0, most tensors
    divided by nothing (`compiler.smooth`)."""
    offset, divided = (
        np.array([float(text) for text in network.meta.get(f"{key}.{name}", default).split()])
        for key, default in (("offset", "0"), ("divided", "1"))
    )
    return torch.from_numpy((np.asarray(values, np.float64) * network.tensors[name].scale + offset) * divided).float()


def run_reference(
    network: QuantNetwork,
    inputs: Mapping[str, NDArray[Any]],
    *,
    keep: Callable[[str], bool] | None = None,
) -> dict[str, NDArray[Any]]:
    """Execute a network in integer arithmetic.

    Parameters
    ----------
    network
        The arithmetic does not depend on batch and rows, so inputs of another batch size or length are fine.
    inputs
        As `quantise_inputs` gives them: int8 or int16 (B, S, C), masks uint8 (B, 1, S).
    keep
        Which tensors to return, by name; others are forgotten as soon as nobody reads them. All by default.

    Returns
    -------
    dict[str, NDArray]
        int8 or int16 (B, S, C) of every tensor, inputs included.

    Raises
    ------
    ValueError
        An input is missing, unknown, or has the wrong shape, dtype or range.
    """
    _check_inputs(network, inputs)
    wanted = keep if keep is not None else lambda name: True
    values = {name: np.asarray(inputs[name]) for name in network.inputs}
    batch = next((len(value) for value in values.values()), 1)
    own = network.tensors[network.inputs[0]].shape[0] if network.inputs else 1
    for name, fixed in network.constants.items():
        copies = network.tensors[name].shape[0] * batch // own
        values[name] = np.broadcast_to(fixed, (copies, *fixed.shape[1:])).copy()
    last = {name: i for i, op in enumerate(network.ops) for name in _reads(op)}
    result = {name: value for name, value in values.items() if wanted(name)}
    for i, op in enumerate(network.ops):
        values[op.out] = _execute(op, values, network)
        if wanted(op.out):
            result[op.out] = values[op.out]
        for name in {*_reads(op), op.out}:
            if last.get(name, i) == i:
                del values[name]
    return result


def _check_inputs(network: QuantNetwork, inputs: Mapping[str, NDArray[Any]]) -> None:
    if set(inputs) != set(network.inputs):
        raise ValueError(
            f"the network's inputs are {', '.join(network.inputs)}, not {', '.join(inputs) or 'none'}"
        )
    batches: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for name in network.inputs:
        tensor, value = network.tensors[name], np.asarray(inputs[name])
        low, high = _RANGE[tensor.dtype]
        if not np.issubdtype(value.dtype, np.integer) or value.ndim != 3 or value.size == 0:
            raise ValueError(
                f"input {name!r} must be integers like {tensor.shape}, not {value.dtype} {value.shape}"
            )
        if value.min() < low or value.max() > high:
            found = f"{value.min()}..{value.max()}"
            raise ValueError(
                f"input {name!r} is {tensor.dtype}: values must be in {low}..{high}, not {found}"
            )
        free, fixed = (2, 1) if tensor.dtype == "keymask" else (1, 2)
        if value.shape[fixed] != tensor.shape[fixed]:
            raise ValueError(f"input {name!r} must have a shape like {tensor.shape}, not {value.shape}")
        # inputs of one batch and length in the network must be of one batch and length here
        agreed = (
            batches.setdefault(tensor.shape[0], value.shape[0]),
            sizes.setdefault(tensor.shape[free], value.shape[free]),
        )
        if agreed != (value.shape[0], value.shape[free]):
            raise ValueError(
                f"input {name!r} {value.shape} does not fit the other inputs: batch, rows = {agreed}"
            )


def _reads(op: Op) -> tuple[str, ...]:
    """Names of the tensors that an operator reads."""
    if isinstance(op, Attention):
        return tuple(name for name in (op.q, op.k, op.v, op.mask) if name is not None)
    if isinstance(op, Rearrange):
        return tuple(part.tensor for part in op.sources)
    if isinstance(op, Product):
        return op.x, op.y
    residual = op.residual.tensor if op.residual is not None else None
    second = op.y if isinstance(op, MatMul) else None
    return tuple(name for name in (op.x, second, residual) if name is not None)


def _execute(op: Op, values: Mapping[str, NDArray[Any]], network: QuantNetwork) -> NDArray[Any]:
    out = network.tensors[op.out]
    if isinstance(op, Attention):
        mask = values[op.mask] if op.mask is not None else None
        result = _attention(op, values[op.q], values[op.k], values[op.v], mask)
        return _stored(result, out)
    if isinstance(op, Conv | MaxPool):
        return _image(op, values, network)
    if isinstance(op, MatMul):
        return _stored(_matmul(op, values), out)
    if isinstance(op, Rearrange):
        return _rearranged(op, values, out)
    if isinstance(op, Transpose):
        return np.ascontiguousarray(values[op.x].swapaxes(1, 2))
    if isinstance(op, Product):
        return _product(op, values, out)
    if isinstance(op, Softmax):
        return _softmax(op, values[op.x], out)
    reference = values[op.x] if op.x is not None else values[op.residual.tensor]  # type: ignore[union-attr]
    batch, rows, _ = reference.shape
    residual = values[op.residual.tensor] if op.residual is not None else None
    result = np.empty((batch * rows, out.shape[2]), _DTYPE[out.dtype])
    step = max(1, _CHUNK // max(out.shape[2], reference.shape[2]))
    weight = _Weight(op.weight) if isinstance(op, Linear) else None
    for start in range(0, batch * rows, step):
        part = slice(start, start + step)
        x = None if op.x is None else _tensor(values[op.x].reshape(batch * rows, -1)[part])
        if isinstance(op, Pointwise) and op.channels is not None and x is not None:
            x = x[:, torch.from_numpy(op.channels.astype(np.int64))]
        r = None if residual is None else _tensor(residual.reshape(batch * rows, -1)[part])
        result[part] = _stored(_rows(op, weight, x, r), out)
    return result.reshape(batch, rows, -1)


def _rows(
    op: Linear | Pointwise, weight: _Weight | None, x: Tensor | None, residual: Tensor | None
) -> NDArray[Any]:
    """TILE steps 1 to 5 on rows: x (rows, in) int8, residual (rows, out); gives (rows, out)."""
    if isinstance(op, Linear) and weight is not None and x is not None:
        requant = op.requant
        mult = _mult(op, requant.mult, residual)
        q = _requantise(weight.product(x), requant.bias, mult, requant.shift, weight.bound)
    elif isinstance(op, Pointwise) and x is not None:
        mult = _mult(op, np.array([op.mult]), residual)
        q = _requantise(x.double(), np.zeros(1, np.int32), mult, np.array([op.shift]), 128)
    else:
        q = torch.zeros_like(residual, dtype=torch.float64)  # type: ignore[arg-type]
    return _finish(op, q, residual)


def _mult(op: Linear | Pointwise | Conv | MatMul, mult: NDArray[Any], residual: Tensor | None) -> NDArray[Any]:
    """The multiplier of each sum: the requantisation's, with the residual of a product in it."""
    if op.residual is None or residual is None or not op.residual.multiply:
        return mult
    return residual_multiplier(residual.numpy(), mult, 8 * residual.element_size())


def _matmul(op: MatMul, values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """(batch, rows, channels); sums of up to 2^39 products are exact in float64."""
    acc = _tensor(values[op.x]).double() @ _tensor(values[op.y]).double()
    residual = None if op.residual is None else _tensor(values[op.residual.tensor])
    mult = _mult(op, np.array([op.mult]), residual)
    bound = values[op.x].shape[-1] << 14
    return _finish(op, _requantise(acc, np.zeros(1, np.int32), mult, np.array([op.shift]), bound), residual)


def _finish(op: Linear | Pointwise | Conv | MatMul, q: Tensor, residual: Tensor | None) -> NDArray[Any]:
    """Residual, table and norm on float64 integers (rows, out)."""
    if op.residual is not None and residual is not None and not op.residual.multiply:
        q = _add(q, residual, op.residual)
    if op.table is not None:
        q = torch.from_numpy(op.table.astype(np.float64))[q.clamp(-128, 127).long() + 128]
    return _norm(q.numpy(), op.norm) if op.norm is not None else q.numpy()


def _rearranged(op: Rearrange, values: Mapping[str, NDArray[Any]], out: QuantTensor) -> NDArray[Any]:
    result = np.zeros((out.shape[0] * out.shape[1], out.shape[2]), np.int64) if op.fill is None else op.fill.astype(np.int64)
    for part in op.sources:
        x = values[part.tensor]
        x = x.reshape(-1, x.shape[2])[part.rows, part.start : part.start + part.width]
        taken = _requantise(_tensor(x).double(), np.zeros(1, np.int32), np.array([part.mult]), np.array([part.shift]), 128)
        result[part.to, part.at : part.at + part.width] = taken.numpy()
    return _stored(result.reshape(out.shape), out)


def _product(op: Product, values: Mapping[str, NDArray[Any]], out: QuantTensor) -> NDArray[Any]:
    x, y = _tensor(values[op.x]), _tensor(values[op.y])
    exact = torch.float32 if x.shape[2] * 128 * 128 < 1 << 24 else torch.float64
    acc = (x.to(exact) @ y.to(exact).transpose(1, 2)).double()
    q = _requantise(acc, np.zeros(1, np.int32), np.array([op.mult]), np.array([op.shift]), x.shape[2] << 14)
    return _stored(q.numpy(), out)


def _softmax(op: Softmax, x: NDArray[Any], out: QuantTensor) -> NDArray[Any]:
    rows = _tensor(x).reshape(-1, x.shape[2])
    s = _add(torch.zeros(rows.shape, dtype=torch.float64), rows, ResidualInput("", op.in_mult, op.in_shift))
    p, m, shift = softmax_rows(s.numpy().astype(np.int64), op.out_mult, op.out_shift)
    shares = _requantise(torch.from_numpy(p).double() * op.ONE, np.zeros(1, np.int32), m[..., None], shift[..., None], 255 * 128)
    return _stored(shares.numpy(), out).reshape(x.shape)


def _image(op: Conv | MaxPool, values: Mapping[str, NDArray[Any]], network: QuantNetwork) -> NDArray[Any]:
    """A convolution or pooling, image by image."""
    out, size = network.tensors[op.out], network.tensors[op.x].image
    if size is None or out.image is None:
        raise ValueError(f"{op.name}: {op.x!r} and {op.out!r} must be images")
    results = []
    for index, x in enumerate(values[op.x]):
        image = _tensor(x).reshape(*size, -1).permute(2, 0, 1)[None]
        if isinstance(op, MaxPool):
            results.append(_rows_of(_pooled(image.double(), op.window, out.image)).numpy())
            continue
        bound = int(np.abs(op.weight.astype(np.int64)).reshape(len(op.weight), -1).sum(1).max()) * 128
        exact = torch.float32 if bound < 1 << 24 else torch.float64
        acc = _rows_of(_convolved(image.to(exact), _tensor(op.weight).to(exact), op, out.image)).double()
        residual = None if op.residual is None else _tensor(values[op.residual.tensor][index])
        q = _requantise(acc, op.requant.bias, _mult(op, op.requant.mult, residual), op.requant.shift, bound)
        results.append(_finish(op, q, residual))
    return _stored(np.stack(results), out)


def _convolved(image: Tensor, weight: Tensor, op: Conv, out: tuple[int, int]) -> Tensor:
    """(1, out channels, pixels), as a matrix product: a library's convolution may well take another way, which rounds."""
    window = op.window
    columns = F.unfold(_padded(image, window, out, 0.0), window.kernel, window.dilation, 0, window.stride)
    columns = columns.reshape(op.groups, -1, columns.shape[-1])
    return (weight.permute(0, 3, 1, 2).reshape(op.groups, -1, columns.shape[1]) @ columns).reshape(1, len(weight), -1)


def _pooled(image: Tensor, window: Window, out: tuple[int, int]) -> Tensor:
    return F.max_pool2d(_padded(image, window, out, -math.inf), window.kernel, window.stride, 0, window.dilation)


def _padded(image: Tensor, window: Window, out: tuple[int, int], value: float) -> Tensor:
    """The image with what the windows see around it; cut off at the end where they do not reach."""
    (top, bottom), (left, right) = (
        (before, (count - 1) * stride + (kernel - 1) * dilation + 1 - before - size)
        for before, count, stride, kernel, dilation, size in zip(
            window.padding, out, window.stride, window.kernel, window.dilation, image.shape[2:], strict=True
        )
    )
    return F.pad(image, (left, right, top, bottom), value=value)


def _rows_of(image: Tensor) -> Tensor:
    """(1, channels, height, width) or (1, channels, pixels) to (pixels, channels)."""
    return image[0].flatten(1).t()


class _Weight:
    """A weight for exact products with int8 rows: (in, out) float32 where the bound allows, else float64."""

    def __init__(self, weight: NDArray[np.int8]) -> None:
        self.bound = int(np.abs(weight.astype(np.int64)).sum(1).max()) * 128
        self.exact = torch.float32 if self.bound < 1 << 24 else torch.float64
        self.matrix = torch.from_numpy(weight.astype(np.float32)).to(self.exact).t()

    def product(self, x: Tensor) -> Tensor:
        """float64 integers ``x @ weight.T``."""
        return (x.to(self.exact) @ self.matrix).double()


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))  # arrays of a program may be read-only


def _requantise(
    acc: Tensor, bias: NDArray[Any], mult: NDArray[Any], shift: NDArray[Any], bound: int
) -> Tensor:
    """``sat16(rshr(wrap32(acc + bias) * mult, shift))`` on float64 integers; |acc| <= bound.

    Exact: the product has at most 31 + 15 bits. Scaling by 2^-shift is exact, and for shift <= 53 so is
    adding a half: the sum is a multiple of 2^-shift and fits 53 bits. For a larger shift the scaled product
    is below 2^-7, and floor gives 0 either way.
    """
    biases = torch.from_numpy(np.asarray(bias, np.float64))
    v = acc + biases
    if bound + int(np.abs(np.asarray(bias, np.int64)).max()) >= 1 << 31:
        v = v.long().to(torch.int32).double()  # wrap32
    factor = np.ldexp(np.asarray(mult, np.float64), -np.asarray(shift, np.int32))
    return v.mul_(torch.from_numpy(factor)).add_(0.5).floor_().clamp_(-32768, 32767)


def _add(q: Tensor, residual: Tensor, operand: ResidualInput) -> Tensor:
    """``sat16(q + rshr(r * mult, shift))``: exact as in `_requantise`, the product has 31 bits."""
    scaled = residual.double().mul_(float(np.ldexp(float(operand.mult), -operand.shift))).add_(0.5).floor_()
    return (scaled + q).clamp_(-32768, 32767)


def _norm_part(norm: LayerNorm, part: slice) -> LayerNorm:
    """The norm of one part of the columns."""
    return replace(norm, gamma=norm.gamma[part], beta=norm.beta[part], shift=norm.shift[part], groups=1)


def _norm(q: NDArray[Any], norm: LayerNorm) -> NDArray[Any]:
    if norm.groups > 1:
        parts = [slice(i * norm.width, (i + 1) * norm.width) for i in range(norm.groups)]
        return np.concatenate([_norm(q[..., part], _norm_part(norm, part)) for part in parts], -1)
    ln_inv, ln_shift, row_mult, row_shift = norm_constants(q.shape[-1])
    return layernorm_rows(
        q.astype(np.int64), norm.gamma, norm.beta, norm.shift,
        ln_inv=ln_inv, ln_shift=ln_shift, eps=norm.eps, row_mult=row_mult, row_shift=row_shift, rms=norm.rms,
    )  # fmt: skip


def _attention(
    op: Attention, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: NDArray[Any] | None
) -> NDArray[Any]:
    """(B, S, C): for each batch entry and head, scores, softmax, values."""
    batch, rows, channels = q.shape
    heads, width, keys = op.heads, channels // op.heads, k.shape[1]
    result = np.empty((batch, rows, channels), np.float64)
    qh, kh, vh = (_tensor(x).view(batch, -1, x.shape[2] // width, width).transpose(1, 2) for x in (q, k, v))
    kh, vh = (x.repeat_interleave(heads // op.groups, 1) for x in (kh, vh))
    bias = (
        np.zeros((batch, 1, 1, keys), np.int64)
        if mask is None
        else np.where(mask == 0, MASK_BIAS, 0)[:, :, None, :]
    )
    step = max(1, _CHUNK // (heads * rows * max(keys, width)))
    score_dtype = torch.float32 if width * 128 * 128 < 1 << 24 else torch.float64
    value_dtype = torch.float32 if keys * 255 * 128 < 1 << 24 else torch.float64
    for start in range(0, batch, step):
        part = slice(start, start + step)
        scores = (qh[part].to(score_dtype) @ kh[part].to(score_dtype).transpose(-1, -2)).double()
        s = _requantise(
            scores, bias[part], np.array([op.score_mult]), np.array([op.score_shift]), width << 14
        )
        if op.bias is not None:
            added = op.bias.values if len(op.bias.values) == 1 else op.bias.values[part]
            s = _add(s, _tensor(added), ResidualInput("", op.bias.mult, op.bias.shift))
        p, m, shift = softmax_rows(s.numpy().astype(np.int64), op.out_mult, op.out_shift)
        mixed = (torch.from_numpy(p).to(value_dtype) @ vh[part].to(value_dtype)).double()
        out = _requantise(mixed, np.zeros(1, np.int32), m[..., None], shift[..., None], keys * 255 * 128)
        result[part] = out.transpose(1, 2).reshape(-1, rows, channels).numpy()
    return result


def _stored(q: NDArray[Any], out: QuantTensor) -> NDArray[Any]:
    """TILE step 6."""
    low, high = _RANGE[out.dtype]
    return np.clip(q, low, high).astype(_DTYPE[out.dtype])
