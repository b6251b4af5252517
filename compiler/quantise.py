"""The quantiser: a fused float `Graph` and calibration data become a `QuantNetwork`.

Two steps. `calibrate` runs the graph in float and watches every value that needs a scale; `_Builder` then
chooses scales and writes integer operators, one for each node (and one to bring a 16-bit tensor to 8 bits
where both are needed).

Biases are free, so an 8-bit tensor that only Linear layers read need not be symmetric: 0 stands for the
middle of a channel's range after a norm, for the middle of the table's range after a function, and the biases
of the readers make up for it. `_Builder.offsets` has these values. Measured on MiniLM-L6 (pooled cosine to
float): 0.975 without, 0.991 with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algo.quantize import Method, Observer, quantize_weight, requant_array, requant_params
from compiler import ops
from compiler.graph import (
    Attention,
    CompileError,
    Convolution,
    Fold,
    Function,
    Graph,
    Input,
    KeyMask,
    Linear,
    MaxPool,
    Node,
    Norm,
    Pointwise,
    Product,
    Rearrange,
    Softmax,
    Transpose,
    Unfold,
)
from compiler.passes import optimise

__all__ = ["Calibration", "activation_table", "calibrate", "norm_parameters", "quantise", "resize", "score_bias", "stored_name"]

Progress = Callable[[int, "int | None"], None]
"""Called after each calibration batch with the batches done and the number of batches, if known."""

MAX_SHIFT = 63
LOG2E_256 = 256 / np.log(2)
"""Scores are in units of 2^-8 in the log2 domain."""
SCORE_FLOOR = 2.0**-14
"""Smallest score multiplier: below it MASK_BIAS would not saturate a masked key's score."""
Offset = NDArray[np.float64] | float
WIDE_MARGIN = 1 << 14
"""A 16-bit grid puts the largest calibrated magnitude here: half the range is left for larger values."""
_SAMPLE = 1 << 16


def quantise(
    graph: Graph,
    calibration_batches: Iterable[Any],
    *,
    activation_observer: Method | Callable[[], Observer] = "mse",
    residual_bits: Literal[8, 16] = 8,
    wide: bool = False,
    progress: Progress | None = None,
) -> ops.QuantNetwork:
    """Choose scales from calibration data and turn every node into an integer operator.

    Parameters
    ----------
    graph
        From `compiler.frontend.trace`, optimised or not.
    calibration_batches
        Inputs as for `Graph.run`: a tensor, a sequence or a dict for each batch; batch size and length may
        differ from the trace.
    activation_observer
        How 8-bit ranges are chosen: a method of `algo.quantize.Observer`, or a function that makes an
        observer. "mse" was best on MiniLM-L6 (0.991; "minmax" 0.990, "percentile" 0.989).
    residual_bits
        Bits of a normalised tensor where it is a residual (post-LN networks). 16 costs one more operator for
        each such tensor (MiniLM-L6: 0.994 instead of 0.991). Sums that are not normalised (the residual
        stream of pre-LN networks) always have 16.
    wide
        16 bits for inputs and outputs, where no operator needs 8: for a part of a network, between other parts.
    progress
        Called after each batch.

    Returns
    -------
    QuantNetwork
        Tensors have the graph's names; masks have the name of their input. ``meta["keep.<mask>"]`` is "1" or
        "0": the mask's value for a key that takes part. ``meta["offset.<tensor>"]`` holds the real values
        that 0 stands for, one for each channel or one for all, where they are not 0:
        `sim.reference.dequantise` knows about it. Inputs and outputs have none.

    Raises
    ------
    ValueError
        No calibration data, unknown method, a NaN or an infinity in weights or data (CompileError names the
        layer).
    """
    if residual_bits not in (8, 16):
        raise ValueError(f"residual_bits must be 8 or 16, not {residual_bits!r}")
    if graph.stage != "fuse":
        graph = optimise(graph)
    return _Builder(
        graph, calibrate(graph, calibration_batches, activation_observer, progress), residual_bits, wide
    ).network()


# -- calibration ---------------------------------------------------------------------------------------------


class _Watched:
    """What is remembered of one value ``(..., C)``: an observer, the range of each channel, some rows."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.low = self.high = torch.empty(0)
        self.rows = torch.empty(0)

    def update(self, values: Tensor) -> None:
        self.observer.update(values)
        rows = values.reshape(-1, values.shape[-1])
        low, high = rows.aminmax(dim=0)
        if len(self.rows):
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        self.low, self.high = low, high
        limit = max(64, _SAMPLE // rows.shape[-1])
        self.rows = torch.cat([self.rows.reshape(-1, rows.shape[-1]), rows[:: -(-len(rows) * 4 // limit)]])
        if len(self.rows) > 2 * limit:
            self.rows = self.rows[::2]


class Calibration:
    """Ranges of the values of a graph, by node and stage: "product", "sum", "function" or "out"."""

    def __init__(self, make: Callable[[], Observer]) -> None:
        self._make = make
        self._peaks: dict[tuple[str, str], float] = {}
        self._watched: dict[tuple[str, str], _Watched] = {}

    def update(self, name: str, stage: str, values: Tensor, *, watched: bool = True) -> None:
        """Take in one batch; only the peak counts if not ``watched``."""
        if values.numel() == 0:
            return
        peak = float(values.abs().max())
        if not np.isfinite(peak):
            raise CompileError(f"calibration: {name} has a NaN or an infinity")
        self._peaks[name, stage] = max(self._peaks.get((name, stage), 0.0), peak)
        if watched:
            self._watched.setdefault((name, stage), _Watched(self._make())).update(values)

    def peak(self, name: str, stage: str) -> float:
        """Largest magnitude; 0 for a stage that the node does not have."""
        return self._peaks.get((name, stage), 0.0)

    def scale(self, name: str, stage: str) -> float:
        """Real value of one int8 step by the observer's method."""
        return self._watched[name, stage].observer.scale(8)

    def sample(self, name: str, stage: str) -> Tensor:
        """Some of the values (rows, C)."""
        return self._watched[name, stage].rows

    def mean(self, name: str, stage: str) -> NDArray[np.float64]:
        """Mean of each channel."""
        return self._watched[name, stage].rows.double().mean(0).numpy()

    def centred(self, name: str, stage: str) -> tuple[float, NDArray[np.float64]]:
        """Scale of an int8 step, and the middle of each channel's range, for the values less the middle."""
        watched = self._watched[name, stage]
        middle = ((watched.low + watched.high) / 2).double()
        observer = self._make()
        observer.update(watched.rows - middle)
        observer.update(torch.stack([watched.low, watched.high]) - middle)
        return observer.scale(8), middle.numpy()

    def from_low(self, name: str, stage: str) -> tuple[float, float]:
        """Scale of an int8 step and the value at 0, from the smallest value to the largest worth keeping."""
        watched = self._watched[name, stage]
        limit = watched.observer.threshold(9)
        low, high = max(float(watched.low.min()), -limit), min(float(watched.high.max()), limit)
        if not high > low:
            return watched.observer.scale(8), 0.0
        scale = (high - low) / 255
        return scale, low + 128 * scale


def calibrate(
    graph: Graph,
    batches: Iterable[Any],
    method: Method | Callable[[], Observer],
    progress: Progress | None = None,
) -> Calibration:
    """Run the fused graph on each batch and watch its values; rows of masked keys do not count."""
    if not callable(method) and method not in get_args(Method):
        raise ValueError(
            f"activation_observer must be one of {', '.join(get_args(Method))} or a function, not {method!r}"
        )
    calibration = Calibration(method if callable(method) else lambda: Observer(method))
    total = len(batches) if isinstance(batches, Sized) else None
    masks = [node for node in graph.nodes.values() if isinstance(node, KeyMask)]
    done = 0
    for done, batch in enumerate(batches, 1):
        inputs = graph.bind(batch)
        keep = masks[0].evaluate(inputs[masks[0].inputs[0]])[:, 0] if len(masks) == 1 else None
        _watch(graph, inputs, keep, calibration)
        if progress is not None:
            progress(done, total)
    if not done:
        raise ValueError("quantise needs at least one calibration batch")
    return calibration


def _watch(graph: Graph, inputs: dict[str, Tensor], keep: Tensor | None, calibration: Calibration) -> None:
    """Run one batch; rows of tokens that ``keep`` (batch, rows) masks do not count."""
    masked = keep is not None and bool(keep.any())

    def seen(values: Tensor) -> Tensor:
        fits = keep is not None and values.ndim == 3 and values.shape[:2] == keep.shape
        return values[keep] if masked and fits else values

    def observe(node: Node, operands: tuple[Tensor, ...], value: Tensor) -> None:
        if isinstance(node, Linear | Convolution | Pointwise) and not node.post.is_empty:
            x = node.product(operands[0]) if isinstance(node, Linear | Convolution) else operands[0]
            calibration.update(node.name, "product", seen(x), watched=False)
            for stage, result in node.post.stages(x, *operands[1:]):
                watched = node.post.function is not None and stage in ("sum", "function")
                calibration.update(node.name, stage, seen(result), watched=watched)
        if not isinstance(node, KeyMask):
            calibration.update(node.name, "out", seen(value))

    for node in graph.inputs:
        if inputs[node.name].is_floating_point():
            calibration.update(node.name, "out", seen(inputs[node.name]))
    graph.run(inputs, observe=observe)


# -- numbers -------------------------------------------------------------------------------------------------


def norm_parameters(norm: Norm, *, in_scale: float, out_scale: float, offset: Offset = 0.0) -> ops.LayerNorm:
    """Integer parameters of a norm, from a grid of ``in_scale`` to one of ``out_scale`` with ``offset`` at 0.

    ``z`` has 10 fraction bits, so ``gamma / out_scale * 2^-10 = g * 2^-shift``: as large a shift as keeps g
    in 16 bits and beta in 31.
    """
    gamma = norm.gamma.detach().double().numpy() / out_scale / 1024
    beta = (norm.beta.detach().double().numpy() - offset) / out_scale
    shift = np.minimum(_room(gamma, (1 << 15) - 1), _room(beta, (1 << 30) - 1)).clip(1, 30)
    cols = len(gamma)
    eps = round(min(norm.eps * cols**2 / in_scale**2, (1 << 32) - 1))
    return ops.LayerNorm(
        gamma=np.rint(gamma * 2.0**shift).clip(-(1 << 15), (1 << 15) - 1).astype(np.int16),
        beta=np.rint(beta * 2.0**shift).clip(-(1 << 30), 1 << 30).astype(np.int32),
        shift=shift.astype(np.uint8),
        eps=eps,
        rms=norm.rms,
    )


def _room(values: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """Largest power of two that each value can be multiplied with within a limit."""
    magnitude = np.maximum(np.abs(values), 1e-30)
    return np.floor(np.log2(limit / magnitude)).astype(np.int64)


def activation_table(
    function: Function, *, in_scale: float, out_scale: float, in_offset: float = 0.0, out_offset: float = 0.0
) -> NDArray[np.int8]:
    """256 entries for q = -128..127: ``round((f(q * in_scale + in_offset) - out_offset) / out_scale)``
    clipped to int8.

    Exact to half a step where it does not clip.
    """
    x = torch.arange(-128, 128, dtype=torch.float64) * in_scale + in_offset
    y = (function.apply(x) - out_offset) / out_scale
    if not bool(torch.isfinite(y).all()):
        raise CompileError(
            f"function {function.name!r} is not finite everywhere on {float(x[0]):.4g}..{float(x[-1]):.4g}"
        )
    return torch.round(y).clamp(-128, 127).to(torch.int8).numpy()


def _table_input(
    function: Function, sample: Tensor, *, out_scale: float, out_offset: float, symmetric: bool
) -> tuple[float, float]:
    """Scale and offset of a table's input with the least squared error of the result on a sample."""
    flat = sample.flatten().double()
    x = torch.cat([flat[:: max(1, len(flat) // 16384)], flat.aminmax().min[None], flat.aminmax().max[None]])
    exact, low, high = function.apply(x) - out_offset, float(x.min()), float(x.max())
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    if not high > low:
        return 1.0, 0.0
    best, least = (1.0, 0.0), np.inf
    for top in np.linspace(0.3, 1.0, 29):
        for bottom in (-top,) if symmetric else np.linspace(0.1, 1.0, 13):
            first = min(low, 0.0) * abs(bottom) + max(low, 0.0)
            scale = (max(high, 0.0) * top + min(high, 0.0) - first) / 255
            offset = 0.0 if symmetric else first + 128 * scale
            table = activation_table(
                function, in_scale=scale, in_offset=offset, out_scale=out_scale, out_offset=out_offset
            )
            index = torch.round((x - offset) / scale).clamp_(-128, 127).long() + 128
            error = float((torch.from_numpy(table * out_scale)[index] - exact).square().mean())
            if error <= least:
                best, least = (scale, offset), error
    return best


def _multiplier(value: float, what: str) -> tuple[int, int]:
    """mult and shift of a multiplier; 0 for one so small that it makes nothing of any 32-bit value."""
    if 0 <= value < 2.0**-40:
        return 0, 1
    try:
        return requant_params(value, max_shift=MAX_SHIFT)
    except ValueError as error:
        raise CompileError(f"{what}: {error}") from error


def _weight_and_requant(
    node: Linear,
    *,
    in_scale: float,
    out_scale: float,
    in_offset: Offset,
    mean: NDArray[np.float64],
    added: Offset,
) -> tuple[NDArray[np.int8], ops.Requant]:
    """int8 weight, and bias and requantisation from ``in_scale`` and weight to ``out_scale``.

    The bias also takes up what costs nothing there: ``in_offset`` (in,), the value at 0 of the input's
    channels; ``added`` (out,), what the residual and the output grid want added; and what rounding the weight
    does to the ``mean`` of the input, (in,) or, where outputs see different inputs, (out, in).
    """
    what = node.source or node.name
    try:
        quantised, scales = quantize_weight(node.weight)
    except ValueError as error:
        raise CompileError(f"{what}: {error}") from error
    bias = np.zeros(len(scales)) if node.bias is None else node.bias.detach().double().numpy()
    if not np.isfinite(bias).all():
        raise CompileError(f"{what}: the bias has a NaN or an infinity")
    weight, real = quantised.numpy(), scales.double().numpy()
    bias = (
        bias
        + _sums(node.weight.detach().double().numpy(), mean)
        - _sums(weight * real[:, None], mean - in_offset)
        + added
    )
    # The bias needs room in the int32 sum, next to the products; a channel without weights takes its scale
    # from the bias.
    least = np.abs(bias) / in_scale / (1 << 30)
    real = np.where((weight == 0).all(1), np.maximum(least, out_scale / in_scale * 2.0**-12), real)
    coarse = least > real
    if coarse.any():
        real = np.maximum(real, least)
        again = np.rint(node.weight.detach().double().numpy() / real[:, None]).clip(-127, 127).astype(np.int8)
        weight = np.where(coarse[:, None], again, weight)
    factor = in_scale * real / out_scale
    try:
        mult, shift = requant_array(np.where(factor < 2.0**-48, 0.0, factor), max_shift=MAX_SHIFT)
    except ValueError as error:
        raise CompileError(f"{what}: {error}") from error
    requant = ops.Requant(
        bias=np.rint(bias / (in_scale * real)).astype(np.int32),
        mult=mult.astype(np.int16),
        shift=shift.astype(np.uint8),
    )
    return np.ascontiguousarray(weight), requant


def _sums(weight: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    return weight @ mean if mean.ndim == 1 else (weight * mean).sum(1)


def stored_name(graph: Graph, name: str) -> str:
    """The node behind an output that the host only rearranges."""
    node = graph.nodes[name]
    return node.inputs[0] if isinstance(node, Fold) else name


def score_bias(bias: Tensor) -> ops.ScoreBias:
    """Integers for a float bias of scores (-inf: masked): 8 bits if it only masks, else 16 bits in steps of 2 (2^-7 in the
    log2 domain), clipped at +-177."""
    masked = bias.isneginf()
    finite = torch.where(masked, torch.tensor(0.0), bias).double()
    if not bool(finite.any()):
        return ops.ScoreBias(torch.where(masked, -128, 0).to(torch.int8).numpy(), (1 << 15) - 1, 1)
    steps = torch.round(finite * LOG2E_256 / 2).clamp_(-32767, 32767)
    return ops.ScoreBias(torch.where(masked, -32768.0, steps).to(torch.int16).numpy(), 1 << 14, 13)


# -- the network ---------------------------------------------------------------------------------------------


class _Builder:
    """Scales and operators of one network."""

    def __init__(self, graph: Graph, calibration: Calibration, residual_bits: int, wide: bool) -> None:
        self.graph = graph
        self.calibration = calibration
        self.residual_bits = residual_bits
        self.wide = wide
        self.tensors: dict[str, ops.QuantTensor] = {}
        self.ops: list[ops.Op] = []
        self.meta: dict[str, str] = {}
        self.users = graph.users()
        self.outputs = tuple(stored_name(graph, name) for name in graph.outputs)
        self.narrow: dict[str, str] = {}  # 16-bit tensor -> its 8-bit version
        self.offsets: dict[str, NDArray[np.float64]] = {}  # value at 0 of the channels, where it is not 0

    def network(self) -> ops.QuantNetwork:
        for node in self.graph.nodes.values():
            if isinstance(node, Input) and not any(
                isinstance(user, KeyMask | Unfold) for user in self.users[node.name]
            ):
                self.input(node)
            elif isinstance(node, KeyMask):
                self.mask(node)
            elif isinstance(node, Attention):
                self.attention(node)
            elif isinstance(node, Linear):
                self.linear(node)
            elif isinstance(node, Convolution):
                self.convolution(node)
            elif isinstance(node, MaxPool):
                self.max_pool(node)
            elif isinstance(node, Unfold):
                self.tensor(node, "int8", self.out_scale(node.name))
            elif isinstance(node, Pointwise):
                self.pointwise(node)
            elif isinstance(node, Rearrange):
                self.rearrange(node)
            elif isinstance(node, Transpose):
                self.transpose(node)
            elif isinstance(node, Product):
                self.product(node)
            elif isinstance(node, Softmax):
                self.softmax(node)
        given = [node.name for node in self.graph.nodes.values() if isinstance(node, Input | Unfold)]
        inputs = [name for name in given if name in self.tensors]
        return ops.QuantNetwork(
            tensors=self.tensors,
            ops=tuple(self.ops),
            inputs=tuple(inputs),
            outputs=self.outputs,
            meta=self.meta,
        )

    # -- tensors ---------------------------------------------------------------------------------------------

    def tensor(self, node: Node, dtype: ops.TensorDtype, scale: float) -> ops.QuantTensor:
        shape = node.shape if len(node.shape) == 3 else (1, *node.shape)
        made = ops.QuantTensor(node.name, tuple(shape), dtype, float(scale))  # type: ignore[arg-type]
        self.tensors[node.name] = made
        return made

    def input(self, node: Input) -> None:
        read = self.users[node.name]
        added = any(not isinstance(user, Attention) and not self.multiplies(user, node.name) for user in read)
        if self.wide and added:
            self.tensor(node, "int16", max(self.calibration.peak(node.name, "out"), 1e-30) / WIDE_MARGIN)
        else:
            self.tensor(node, "int8", self.out_scale(node.name))

    @staticmethod
    def multiplies(user: Node, name: str) -> bool:
        """Whether an operator multiplies or moves a tensor, rather than adding it to something."""
        return isinstance(user, Rearrange | Transpose | Product) or (isinstance(user, Linear | Convolution | MaxPool) and user.inputs[0] == name)

    def needs8(self, name: str) -> bool:
        """Whether some operator multiplies the tensor."""
        return any(
            self.multiplies(user, name)
            or (isinstance(user, Attention) and name in user.inputs[:3])
            for user in self.users[name]
        )

    def is_wide(self, node: Node) -> bool:
        """Whether a result is kept in 16 bits."""
        if not isinstance(node, Linear | Convolution | Pointwise) or node.post.function is not None:
            return False
        read = self.users[node.name]
        if self.wide and node.name in self.graph.outputs:
            return True
        if node.post.norm is not None:
            added = any(
                isinstance(user, Linear | Convolution | Pointwise) and node.name in user.inputs[1:] for user in read
            )
            return self.residual_bits == 16 and added
        if node.post.residual:
            return True
        return bool(read) and not self.needs8(node.name) and node.name not in self.outputs

    def operand8(self, name: str) -> str:
        """The tensor, or its 8-bit version."""
        tensor = self.tensors[name]
        if tensor.dtype == "int8":
            return name
        if name not in self.narrow:
            shifted = name in self.offsets
            scale = self.calibration.centred(name, "out")[0] if shifted else self.out_scale(name)
            small = replace(tensor, name=f"{name}.int8", dtype="int8", scale=scale)
            mult, shift = _multiplier(tensor.scale / small.scale, name)
            self.tensors[small.name] = small
            if shifted:
                self.shift(small.name, self.offsets[name])
            residual, source = ops.ResidualInput(name, mult, shift), self.graph.nodes[name].source
            self.ops.append(
                ops.Pointwise(
                    name=small.name, x=None, out=small.name, mult=0, shift=1, residual=residual, source=source
                )
            )
            self.narrow[name] = small.name
        return self.narrow[name]

    def out(self, node: Linear | Convolution | Pointwise) -> ops.QuantTensor:
        """The result's tensor."""
        wide = self.is_wide(node)
        if node.post.norm is not None and self.may_shift(node):
            scale, offset = self.calibration.centred(node.name, "out")
            if wide:
                scale = max(self.peak(node, "out"), 1e-30) / WIDE_MARGIN
            self.shift(node.name, offset)
            return self.tensor(node, "int16" if wide else "int8", scale)
        if wide:
            return self.tensor(node, "int16", max(self.peak(node, "out"), 1e-30) / WIDE_MARGIN)
        if node.post.function is not None and node.post.norm is None and self.may_shift(node):
            scale, zero = self.calibration.from_low(node.name, "out")
            self.shift(node.name, np.full(node.shape[-1], zero))
            return self.tensor(node, "int8", scale)
        return self.tensor(node, "int8", self.out_scale(node.name))

    def may_shift(self, node: Node) -> bool:
        """Whether the value at 0 may be any: all readers have a bias to make up for it."""
        read = self.users[node.name]
        return (
            bool(read)
            and node.name not in self.outputs
            and all(isinstance(user, Linear) or (moves_whole_rows(user) and self.may_shift(user)) for user in read)
        )

    def shift(self, name: str, offset: NDArray[np.float64]) -> None:
        """Let 0 of a tensor's channels stand for these values; rounded so that `meta` holds them exactly."""
        texts = [f"{value:.5g}" for value in offset]
        self.offsets[name] = np.array([float(text) for text in texts])
        self.meta[f"offset.{name}"] = " ".join(texts if len(set(texts)) > 1 else texts[:1])

    def out_scale(self, name: str) -> float:
        """Scale of an 8-bit tensor; coarser where the scores of an attention would be too fine."""
        scale = self.calibration.scale(name, "out")
        coarser = [1.0]
        for user in self.users[name]:
            if isinstance(user, Attention) and name in user.inputs[:2]:
                q, k = (self.calibration.scale(operand, "out") for operand in user.inputs[:2])
                coarser.append(1.001 * np.sqrt(SCORE_FLOOR / (q * k * user.scale * LOG2E_256)))
        return scale * max(coarser)

    def peak(self, node: Linear | Convolution | Pointwise, stage: str) -> float:
        """Largest magnitude of a value, and of what is added up to it."""
        found = [self.calibration.peak(node.name, stage)]
        if stage == "sum" or node.post.norm is None:
            offsets = [
                float(np.abs(self.offsets[name]).max()) for name in node.inputs[1:] if name in self.offsets
            ]
            found.append(self.calibration.peak(node.name, "product") + sum(offsets))
            found += [self.calibration.peak(name, "out") for name in node.inputs[1:]]
        return max(found)

    def mask(self, node: KeyMask) -> None:
        (name,) = node.inputs
        keep = self.meta.setdefault(f"keep.{name}", str(int(node.keep)))
        if keep != str(int(node.keep)):
            raise CompileError(f"{node.source}: input {name!r} is used as a key mask with both meanings")
        self.tensors[name] = ops.QuantTensor(name, node.shape, "keymask", 1.0)  # type: ignore[arg-type]

    # -- operators -------------------------------------------------------------------------------------------

    def post(self, node: Linear | Convolution | Pointwise, residual: str | None) -> tuple[float, float, dict[str, Any]]:
        """Scale and offset of the sum's grid, and the fields of the post-processing."""
        out, post = self.out(node), node.post
        offset = self.offsets.get(node.name, np.zeros(1))
        grid, zero, table, norm = out.scale, 0.0, None, None
        if post.function is not None:
            last = post.norm is None
            result, at = (
                (out.scale, float(offset[0]))
                if last
                else (self.calibration.scale(node.name, "function"), 0.0)
            )
            sample, symmetric = self.calibration.sample(node.name, "sum"), isinstance(node, Pointwise)
            grid, zero = _table_input(
                post.function, sample, out_scale=result, out_offset=at, symmetric=symmetric
            )
            table = activation_table(
                post.function, in_scale=grid, in_offset=zero, out_scale=result, out_offset=at
            )
        elif post.norm is not None:
            grid = max(self.peak(node, "sum"), 1e-30) / WIDE_MARGIN
        if post.norm is not None:
            inner = grid if post.function is None else self.calibration.scale(node.name, "function")
            norm = norm_parameters(post.norm, in_scale=inner, out_scale=out.scale, offset=offset)
        fields: dict[str, Any] = {
            "out": out.name,
            "table": table,
            "norm": norm,
            "source": node.source,
            "name": node.name,
        }
        fields["residual"] = None if residual is None else self.residual(residual, grid, node)
        return grid, zero, fields

    def residual(self, name: str, grid: float, node: Node) -> ops.ResidualInput:
        mult, shift = _multiplier(
            self.tensors[name].scale / grid, f"{node.source or node.name}, residual {name!r}"
        )
        return ops.ResidualInput(name, mult, shift)

    def linear(self, node: Linear) -> None:
        x = self.operand8(node.inputs[0])
        grid, zero, fields = self.post(node, node.inputs[1] if node.post.residual else None)
        added = self.offsets.get(node.inputs[1], 0.0) if node.post.residual else 0.0
        weight, requant = _weight_and_requant(
            node, in_scale=self.tensors[x].scale, out_scale=grid, in_offset=self.offsets.get(x, 0.0),
            mean=self.calibration.mean(node.inputs[0], "out"), added=added - zero,
        )  # fmt: skip
        self.ops.append(ops.Linear(x=x, weight=weight, pattern=node.pattern, requant=requant, **fields))

    def convolution(self, node: Convolution) -> None:
        """As a Linear layer of each window; the weight with the channels last, as it is stored."""
        x = self.operand8(node.inputs[0])
        if x in self.offsets:
            raise CompileError(f"{node.source or node.name}: the input of a convolution has an offset")
        grid, zero, fields = self.post(node, node.inputs[1] if node.post.residual else None)
        added = self.offsets.get(node.inputs[1], 0.0) if node.post.residual else 0.0
        outputs, inputs, *kernel = node.weight.shape
        flat = node.weight.permute(0, 2, 3, 1).flatten(1)
        group = np.arange(outputs) // (outputs // node.groups)
        mean = self.calibration.mean(node.inputs[0], "out").reshape(node.groups, inputs)[group]
        weight, requant = _weight_and_requant(
            Linear(name=node.name, shape=node.shape, source=node.source, weight=flat, bias=node.bias),
            in_scale=self.tensors[x].scale, out_scale=grid, in_offset=0.0, mean=np.tile(mean, kernel[0] * kernel[1]),
            added=added - zero,
        )  # fmt: skip
        self.image(x, node.size)
        self.image(node.name, node.out_size)
        window = ops.Window(
            kernel=(kernel[0], kernel[1]), stride=node.stride, padding=node.padding, dilation=node.dilation
        )  # fmt: skip
        self.ops.append(ops.Conv(
            x=x, weight=weight.reshape(outputs, *kernel, inputs), window=window, groups=node.groups, pattern=node.pattern,
            requant=requant, **fields,
        ))  # fmt: skip

    def max_pool(self, node: MaxPool) -> None:
        x = self.operand8(node.inputs[0])
        self.tensor(node, "int8", self.tensors[x].scale)
        self.image(x, node.size)
        self.image(node.name, node.out_size)
        window = ops.Window(kernel=node.kernel, stride=node.stride, padding=node.padding, dilation=node.dilation)
        self.ops.append(ops.MaxPool(name=node.name, x=x, out=node.name, window=window, source=node.source))

    def image(self, name: str, size: tuple[int, int]) -> None:
        """Say that the rows of a tensor are the pixels of an image."""
        self.tensors[name] = replace(self.tensors[name], image=size)

    def pointwise(self, node: Pointwise) -> None:
        """One operand: by the residual path if it has 16 bits. Two: the one with 16 bits is the residual."""
        operands = sorted(node.inputs, key=lambda name: self.tensors[name].dtype == "int16")
        x: str | None = (
            self.operand8(operands[0])
            if len(operands) == 2 or self.tensors[operands[0]].dtype == "int8"
            else None
        )
        grid, _, fields = self.post(node, operands[-1] if len(operands) == 2 or x is None else None)
        mult, shift = (
            (0, 1) if x is None else _multiplier(self.tensors[x].scale / grid, node.source or node.name)
        )
        self.ops.append(ops.Pointwise(x=x, mult=mult, shift=shift, **fields))

    def rearrange(self, node: Rearrange) -> None:
        """One source keeps its scale and its value at 0; several are brought to one scale. A constant has 16 bits where it is
        only added."""
        names = [self.operand8(name) for name in node.inputs]
        scale = self.out_scale(node.name)
        if len(names) == 1 and (node.fill is None or self.tensors[names[0]].scale >= scale):
            scale = max(scale, self.tensors[names[0]].scale) if self.scored(node) else self.tensors[names[0]].scale
        wide = not names and not self.needs8(node.name)
        if wide:
            scale = max(self.calibration.peak(node.name, "out"), 1e-30) / WIDE_MARGIN
        out = self.tensor(node, "int16" if wide else "int8", scale)
        if len(names) == 1 and names[0] in self.offsets:
            self.shift(node.name, self.offsets[names[0]])
        factors = [_multiplier(self.tensors[name].scale / out.scale, node.source or node.name) for name in names]
        limit = np.iinfo(out.dtype)
        fill = None if node.fill is None else np.rint(node.fill.double().numpy() / out.scale).clip(limit.min, limit.max)
        self.ops.append(ops.Rearrange(
            name=node.name, out=node.name, source=node.source, fill=None if fill is None else fill.astype(out.dtype),
            sources=tuple(
                ops.RowSource(
                    tensor=names[part.operand], rows=part.rows.numpy(), to=part.to.numpy(), start=part.start, at=part.at,
                    width=part.width, mult=factors[part.operand][0], shift=factors[part.operand][1],
                )
                for part in node.parts
            ),
        ))  # fmt: skip

    def transpose(self, node: Transpose) -> None:
        x = self.operand8(node.inputs[0])
        out = self.tensor(node, "int8", self.tensors[x].scale)
        self.ops.append(ops.Transpose(name=node.name, x=x, out=out.name, source=node.source))

    def product(self, node: Product) -> None:
        x, y = (self.operand8(name) for name in node.inputs)
        wide = not self.needs8(node.name) and (self.wide or node.name not in self.graph.outputs)
        peak = max(self.calibration.peak(node.name, "out"), 1e-30)
        out = self.tensor(node, "int16" if wide else "int8", peak / WIDE_MARGIN if wide else self.out_scale(node.name))
        mult, shift = _multiplier(self.tensors[x].scale * self.tensors[y].scale / out.scale, node.source or node.name)
        self.ops.append(ops.Product(name=node.name, x=x, y=y, out=out.name, mult=mult, shift=shift, source=node.source))

    def softmax(self, node: Softmax) -> None:
        (x,), what = node.inputs, node.source or node.name
        out = self.tensor(node, "int8", self.out_scale(node.name))
        inner = _multiplier(self.tensors[x].scale * LOG2E_256, what)
        outer = _multiplier(1 / ops.Softmax.ONE / out.scale, what)
        self.ops.append(ops.Softmax(
            name=node.name, x=x, out=out.name, source=node.source, in_mult=inner[0], in_shift=inner[1], out_mult=outer[0],
            out_shift=outer[1],
        ))  # fmt: skip

    def scored(self, node: Node) -> bool:
        """Whether an attention multiplies a tensor with another to scores."""
        return any(isinstance(user, Attention) and node.name in user.inputs[:2] for user in self.users[node.name])

    def attention(self, node: Attention) -> None:
        q, k, v = (self.operand8(name) for name in node.inputs[:3])
        out = self.tensor(node, "int8", self.out_scale(node.name))
        what = node.source or node.name
        score = _multiplier(self.tensors[q].scale * self.tensors[k].scale * node.scale * LOG2E_256, what)
        output = _multiplier(self.tensors[v].scale / out.scale, what)
        mask = self.graph.nodes[node.inputs[3]].inputs[0] if len(node.inputs) == 4 else None
        self.ops.append(
            ops.Attention(
                name=node.name, q=q, k=k, v=v, out=out.name, heads=node.heads, mask=mask, source=node.source,
                score_mult=score[0], score_shift=score[1], out_mult=output[0], out_shift=output[1],
                kv_heads=node.kv_heads,
                bias=None if node.bias is None else score_bias(node.bias),
            )
        )  # fmt: skip


def moves_whole_rows(node: Node) -> bool:
    """Whether a node's rows are all whole rows of one operand."""
    if not isinstance(node, Rearrange) or len(node.inputs) != 1 or node.fill is not None:
        return False
    channels = node.shape[-1]
    whole = all((part.start, part.at, part.width) == (0, 0, channels) for part in node.parts)
    return whole and sum(len(part.to) for part in node.parts) * channels == math.prod(node.shape)


def resize(network: ops.QuantNetwork, *, batch: int, rows: int) -> ops.QuantNetwork:
    """The same network for another batch size and number of rows; scales and weights stay.

    Raises
    ------
    ValueError
        Not positive, or a network with sequences of several lengths.
    """
    if batch < 1 or rows < 1:
        raise ValueError(f"batch and rows must be >= 1, not {batch} and {rows}")
    if any(isinstance(op, ops.Attention) and op.bias is not None for op in network.ops):
        raise ValueError("a network with causal or other constant masks cannot be resized")
    lengths = {tensor.shape[2 if tensor.dtype == "keymask" else 1] for tensor in network.tensors.values()}
    if len(lengths) > 1:
        raise ValueError(f"a network with sequences of several lengths {sorted(lengths)} cannot be resized")
    tensors = {
        name: replace(
            tensor, shape=(batch, 1, rows) if tensor.dtype == "keymask" else (batch, rows, tensor.shape[2])
        )
        for name, tensor in network.tensors.items()
    }
    return replace(network, tensors=tensors)
