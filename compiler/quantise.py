"""The quantiser: a fused float `Graph` and calibration data become a `QuantNetwork`.

Two steps. `calibrate` runs the graph in float and watches every value that needs a scale; `_Builder` then chooses scales and writes
integer operators, one for each node (and one to bring a 16-bit tensor to 8 bits where both are needed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algo.quantize import Method, Observer, quantize_weight, requant_array, requant_params
from compiler import ops
from compiler.graph import Attention, CompileError, Function, Graph, Input, KeyMask, Linear, Node, Norm, Pointwise
from compiler.passes import optimise

__all__ = ["Calibration", "activation_table", "calibrate", "norm_parameters", "quantise", "resize"]

Progress = Callable[[int, "int | None"], None]
"""Called after each calibration batch with the batches done and the number of batches, if known."""

MAX_SHIFT = 63
LOG2E_256 = 256 / np.log(2)
"""Scores are in units of 2^-8 in the log2 domain."""
SCORE_FLOOR = 2.0**-14
"""Smallest score multiplier: below it MASK_BIAS would not saturate a masked key's score."""
WIDE_MARGIN = 1 << 14
"""A 16-bit grid puts the largest calibrated magnitude here: half the range is left for larger values."""
_SAMPLE = 1 << 16


def quantise(
    graph: Graph,
    calibration_batches: Iterable[Any],
    *,
    activation_observer: Method | Callable[[], Observer] = "mse",
    residual_bits: Literal[8, 16] = 8,
    progress: Progress | None = None,
) -> ops.QuantNetwork:
    """Choose scales from calibration data and turn every node into an integer operator.

    Parameters
    ----------
    graph
        From `compiler.frontend.trace`, optimised or not.
    calibration_batches
        Inputs as for `Graph.run`: a tensor, a sequence or a dict for each batch; batch size and length may differ from the trace.
    activation_observer
        How 8-bit ranges are chosen: a method of `algo.quantize.Observer`, or a function that makes an observer.
    residual_bits
        Bits of a normalised tensor where it is a residual (post-LN networks). 16 costs one more operator for each such tensor.
        Sums that are not normalised (the residual stream of pre-LN networks) always have 16.
    progress
        Called after each batch.

    Returns
    -------
    QuantNetwork
        Tensors have the graph's names; masks have the name of their input. ``meta["keep.<mask>"]`` is "1" or "0": the mask's value
        for a key that takes part.

    Raises
    ------
    ValueError
        No calibration data, unknown method, a NaN or an infinity in weights or data (CompileError names the layer).
    """
    if residual_bits not in (8, 16):
        raise ValueError(f"residual_bits must be 8 or 16, not {residual_bits!r}")
    if graph.stage != "fuse":
        graph = optimise(graph)
    return _Builder(graph, calibrate(graph, calibration_batches, activation_observer, progress), residual_bits).network()


# -- calibration -----------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Range:
    """What calibration remembers of one value: an observer, and a sample for functions."""

    observer: Observer
    sample: Tensor = field(default_factory=lambda: torch.empty(0))

    def update(self, values: Tensor, *, sampled: bool) -> None:
        self.observer.update(values)
        if sampled:
            flat = values.flatten()
            part = flat[:: max(1, flat.numel() // (_SAMPLE // 8))]
            self.sample = torch.cat([self.sample, part, flat.min()[None], flat.max()[None]])
            if len(self.sample) > 2 * _SAMPLE:
                self.sample = torch.cat([self.sample[::2], self.sample.min()[None], self.sample.max()[None]])


class Calibration:
    """Ranges of the values of a graph: ``(node, stage)`` with stage "product", "sum", "function", "norm" or "out"."""

    def __init__(self, make: Callable[[], Observer]) -> None:
        self._make = make
        self._ranges: dict[tuple[str, str], _Range] = {}

    def update(self, name: str, stage: str, values: Tensor, *, sampled: bool = False) -> None:
        self._ranges.setdefault((name, stage), _Range(self._make())).update(values, sampled=sampled)

    def absmax(self, name: str, stage: str) -> float:
        """Largest magnitude."""
        return self._ranges[name, stage].observer.absmax

    def scale(self, name: str, stage: str, bits: int = 8) -> float:
        """Real value of one integer step by the observer's method."""
        return self._ranges[name, stage].observer.scale(bits)

    def sample(self, name: str, stage: str) -> Tensor:
        """Some of the values, the smallest and the largest among them."""
        return self._ranges[name, stage].sample


def calibrate(
    graph: Graph, batches: Iterable[Any], method: Method | Callable[[], Observer], progress: Progress | None = None
) -> Calibration:
    """Run the fused graph on each batch and watch its values; rows of masked keys do not count."""
    if not callable(method) and method not in get_args(Method):
        raise ValueError(f"activation_observer must be one of {', '.join(get_args(Method))} or a function, not {method!r}")
    calibration = Calibration(method if callable(method) else lambda: Observer(method))
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    done = 0
    masks = [node for node in graph.nodes.values() if isinstance(node, KeyMask)]
    for batch in batches:
        inputs = graph.bind(batch)
        keep = masks[0].evaluate(inputs[masks[0].inputs[0]])[:, 0] if len(masks) == 1 else None
        _watch(graph, inputs, keep, calibration)
        done += 1
        if progress is not None:
            progress(done, total)
    if not done:
        raise ValueError("quantise needs at least one calibration batch")
    return calibration


def _watch(graph: Graph, inputs: dict[str, Tensor], keep: Tensor | None, calibration: Calibration) -> None:
    def seen(values: Tensor) -> Tensor:
        return values[keep] if keep is not None and values.ndim == 3 and values.shape[:2] == keep.shape else values

    def observe(node: Node, operands: tuple[Tensor, ...], value: Tensor) -> None:
        if isinstance(node, Linear | Pointwise):
            x = node.product(operands[0]) if isinstance(node, Linear) else operands[0]
            if isinstance(node, Linear):
                calibration.update(node.name, "product", seen(x))
            for stage, result in node.post.stages(x, *operands[1:]):
                calibration.update(node.name, stage, seen(result), sampled=stage == "sum" and node.post.function is not None)
        if not isinstance(node, KeyMask):
            calibration.update(node.name, "out", seen(value))

    for node in graph.inputs:
        if inputs[node.name].is_floating_point():
            calibration.update(node.name, "out", seen(inputs[node.name]))
    try:
        graph.run(inputs, observe=observe)
    except ValueError as error:
        raise CompileError(f"calibration: {error}") from error


# -- numbers ---------------------------------------------------------------------------------------------------------------------------


def norm_parameters(norm: Norm, *, in_scale: float, out_scale: float) -> ops.LayerNorm:
    """Integer parameters of a norm from a grid of ``in_scale`` to one of ``out_scale``.

    ``z`` has 10 fraction bits, so ``gamma / out_scale * 2^-10 = g * 2^-shift``: as large a shift as keeps g in 16 bits and beta in 31.
    """
    gamma = norm.gamma.detach().double().numpy() / out_scale / 1024
    beta = norm.beta.detach().double().numpy() / out_scale
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


def activation_table(function: Function, *, in_scale: float, out_scale: float) -> NDArray[np.int8]:
    """256 entries for -128..127: ``round(f(q * in_scale) / out_scale)`` clipped to int8, exact to half a step."""
    x = torch.arange(-128, 128, dtype=torch.float64) * in_scale
    y = function.apply(x) / out_scale
    if not bool(torch.isfinite(y).all()):
        raise CompileError(f"function {function.name!r} is not finite everywhere on {float(x[0]):.4g}..{float(x[-1]):.4g}")
    return torch.round(y).clamp(-128, 127).to(torch.int8).numpy()


def _table_scale(function: Function, sample: Tensor, out_scale: float) -> float:
    """Input grid of an activation table with the least squared error of the function's result on a sample."""
    limit = float(sample.abs().max())
    if limit == 0:
        return 1.0
    exact = function.apply(sample.double())
    best, least = limit / 127, np.inf
    for share in np.linspace(0.2, 1.0, 65):
        scale = limit * share / 127
        table = torch.from_numpy(activation_table(function, in_scale=scale, out_scale=out_scale).astype(np.float64))
        index = torch.round(sample.double() / scale).clamp(-128, 127).long() + 128
        error = float(((table[index] * out_scale - exact) ** 2).mean())
        if error <= least:
            best, least = scale, error
    return best


def _multiplier(value: float, what: str) -> tuple[int, int]:
    """mult and shift of a multiplier; so small that it makes nothing of any int16: 0."""
    if value < 2.0**-40:
        return 0, 1
    try:
        return requant_params(value, max_shift=MAX_SHIFT)
    except ValueError as error:
        raise CompileError(f"{what}: {error}") from error


def _weight_and_requant(node: Linear, in_scale: float, out_scale: float) -> tuple[NDArray[np.int8], ops.Requant]:
    """int8 weight, and bias and requantisation from ``in_scale`` and weight to ``out_scale``."""
    try:
        quantised, scales = quantize_weight(node.weight)
    except ValueError as error:
        raise CompileError(f"{node.source or node.name}: {error}") from error
    bias = torch.zeros(len(scales)) if node.bias is None else node.bias.detach()
    if not bool(torch.isfinite(bias).all()):
        raise CompileError(f"{node.source or node.name}: the bias has a NaN or an infinity")
    # The bias needs room in the int32 sum: 2^30 next to the products; a channel without weights takes its scale from the bias.
    least = bias.abs().double().numpy() / in_scale / (1 << 30)
    real = scales.double().numpy()
    empty = (quantised == 0).all(1).numpy()
    real = np.where(empty, np.maximum(least * 64, out_scale / in_scale * 2.0**-12), real)
    coarse = least > real
    if coarse.any():
        real = np.maximum(real, least)
        weight = torch.round(node.weight.detach().double() / torch.from_numpy(real)[:, None]).clamp(-127, 127)
        quantised = torch.where(torch.from_numpy(coarse)[:, None], weight.to(torch.int8), quantised)
    factor = in_scale * real / out_scale
    mult, shift = requant_array(np.where(factor < 2.0**-48, 0.0, factor), max_shift=MAX_SHIFT)
    requant = ops.Requant(
        bias=np.rint(bias.double().numpy() / (in_scale * real)).astype(np.int32),
        mult=mult.astype(np.int16),
        shift=shift.astype(np.uint8),
    )
    return np.ascontiguousarray(quantised.numpy()), requant


# -- the network -----------------------------------------------------------------------------------------------------------------------


class _Builder:
    """Scales and operators of one network."""

    def __init__(self, graph: Graph, calibration: Calibration, residual_bits: int) -> None:
        self.graph = graph
        self.calibration = calibration
        self.residual_bits = residual_bits
        self.tensors: dict[str, ops.QuantTensor] = {}
        self.ops: list[ops.Op] = []
        self.meta: dict[str, str] = {}
        self.users = graph.users()
        self.narrow: dict[str, str] = {}  # 16-bit tensor -> its 8-bit version

    def network(self) -> ops.QuantNetwork:
        inputs: list[str] = []
        for node in self.graph.nodes.values():
            if isinstance(node, Input) and not any(isinstance(user, KeyMask) for user in self.users[node.name]):
                self.tensor(node, "int8", self.calibration.scale(node.name, "out"))
            elif isinstance(node, KeyMask):
                self.mask(node)
            elif isinstance(node, Attention):
                self.attention(node)
            elif isinstance(node, Linear):
                self.linear(node)
            elif isinstance(node, Pointwise):
                self.pointwise(node)
        inputs = [node.name for node in self.graph.inputs if node.name in self.tensors]
        return ops.QuantNetwork(
            tensors=self.tensors, ops=tuple(self.ops), inputs=tuple(inputs), outputs=self.graph.outputs, meta=self.meta
        )

    # -- tensors -----------------------------------------------------------------------------------------------------------------

    def tensor(self, node: Node, dtype: ops.TensorDtype, scale: float) -> ops.QuantTensor:
        shape = node.shape if len(node.shape) == 3 else (1, *node.shape)
        made = ops.QuantTensor(node.name, tuple(shape), dtype, float(scale))  # type: ignore[arg-type]
        self.tensors[node.name] = made
        return made

    def needs8(self, name: str) -> bool:
        """Whether some operator multiplies the tensor."""
        return any(
            (isinstance(user, Linear) and user.inputs[0] == name) or (isinstance(user, Attention) and name in user.inputs[:3])
            for user in self.users[name]
        )

    def is_wide(self, node: Node) -> bool:
        """Whether a result is kept in 16 bits."""
        if not isinstance(node, Linear | Pointwise) or node.post.function is not None:
            return False
        read = self.users[node.name]
        if node.post.norm is not None:
            added = any(isinstance(user, Linear | Pointwise) and node.name in user.inputs[1:] for user in read)
            return self.residual_bits == 16 and added
        if node.post.residual:
            return True
        return bool(read) and not self.needs8(node.name) and node.name not in self.graph.outputs

    def operand8(self, name: str) -> str:
        """The tensor, or its 8-bit version."""
        tensor = self.tensors[name]
        if tensor.dtype == "int8":
            return name
        if name not in self.narrow:
            small = replace(tensor, name=f"{name}.int8", dtype="int8", scale=self.calibration.scale(name, "out"))
            mult, shift = _multiplier(tensor.scale / small.scale, name)
            self.tensors[small.name] = small
            residual = ops.ResidualInput(name, mult, shift)
            self.ops.append(
                ops.Pointwise(
                    name=small.name, x=None, out=small.name, mult=0, shift=1, residual=residual, source=self.graph.nodes[name].source
                )
            )
            self.narrow[name] = small.name
        return self.narrow[name]

    def out(self, node: Linear | Pointwise) -> ops.QuantTensor:
        """The result's tensor."""
        if not self.is_wide(node):
            return self.tensor(node, "int8", self.out_scale(node))
        return self.tensor(node, "int16", max(self.peaks(node, "out"), 1e-30) / WIDE_MARGIN)

    def out_scale(self, node: Node) -> float:
        """Scale of an 8-bit result; coarser where an attention score would be too fine."""
        scale = self.calibration.scale(node.name, "out")
        for user in self.users[node.name]:
            if isinstance(user, Attention) and node.name in user.inputs[:2]:
                product = user.scale * LOG2E_256
                for name in user.inputs[:2]:
                    product *= self.calibration.scale(name, "out")
                if product < SCORE_FLOOR:
                    scale *= (SCORE_FLOOR / max(product, 1e-30)) ** (1.0 if user.inputs[0] == user.inputs[1] else 0.5) * 1.001
        return scale

    def peaks(self, node: Linear | Pointwise, *stages: str) -> float:
        """Largest magnitude of any of these values, and of what is added up to them."""
        found = [self.calibration.absmax(node.name, stage) for stage in stages]
        if node.post.norm is None or "sum" in stages:
            found += [self.calibration.absmax(node.name, "product")] if isinstance(node, Linear) else []
            found += [self.calibration.absmax(name, "out") for name in node.inputs[1:]]
        return max(found)

    def mask(self, node: KeyMask) -> None:
        (name,) = node.inputs
        keep = self.meta.setdefault(f"keep.{name}", str(int(node.keep)))
        if keep != str(int(node.keep)):
            raise CompileError(f"{node.source}: input {name!r} is used as a key mask with both meanings")
        self.tensors[name] = ops.QuantTensor(name, node.shape, "keymask", 1.0)  # type: ignore[arg-type]

    # -- operators ---------------------------------------------------------------------------------------------------------------

    def post(self, node: Linear | Pointwise, residual: str | None) -> tuple[float, dict[str, Any]]:
        """Grid of the sum, and the fields of the post-processing."""
        out, post = self.out(node), node.post
        grid, table, norm = out.scale, None, None
        if post.function is not None:
            result = out.scale if post.norm is None else self.calibration.scale(node.name, "function")
            grid = _table_scale(post.function, self.calibration.sample(node.name, "sum"), result)
            table = activation_table(post.function, in_scale=grid, out_scale=result)
        elif post.norm is not None:
            grid = max(self.peaks(node, "sum"), 1e-30) / WIDE_MARGIN
        if post.norm is not None:
            inner = self.calibration.scale(node.name, "function") if post.function is not None else grid
            norm = norm_parameters(post.norm, in_scale=inner, out_scale=out.scale)
        fields: dict[str, Any] = {"out": out.name, "table": table, "norm": norm, "source": node.source, "name": node.name}
        fields["residual"] = None if residual is None else self.residual(residual, grid, node)
        return grid, fields

    def residual(self, name: str, grid: float, node: Node) -> ops.ResidualInput:
        mult, shift = _multiplier(self.tensors[name].scale / grid, f"{node.source or node.name}, residual {name!r}")
        return ops.ResidualInput(name, mult, shift)

    def linear(self, node: Linear) -> None:
        x = self.operand8(node.inputs[0])
        grid, fields = self.post(node, node.inputs[1] if node.post.residual else None)
        weight, requant = _weight_and_requant(node, self.tensors[x].scale, grid)
        self.ops.append(ops.Linear(x=x, weight=weight, pattern=node.pattern, requant=requant, **fields))

    def pointwise(self, node: Pointwise) -> None:
        """One operand: by the residual path if it has 16 bits. Two: the one with 16 bits is the residual."""
        operands = sorted(node.inputs, key=lambda name: self.tensors[name].dtype == "int16")
        x: str | None = self.operand8(operands[0]) if len(operands) == 2 or self.tensors[operands[0]].dtype == "int8" else None
        grid, fields = self.post(node, operands[-1] if len(operands) == 2 or x is None else None)
        mult, shift = (0, 1) if x is None else _multiplier(self.tensors[x].scale / grid, node.source or node.name)
        self.ops.append(ops.Pointwise(x=x, mult=mult, shift=shift, **fields))

    def attention(self, node: Attention) -> None:
        q, k, v = (self.operand8(name) for name in node.inputs[:3])
        out = self.tensor(node, "int8", self.out_scale(node))
        what = node.source or node.name
        score = _multiplier(self.tensors[q].scale * self.tensors[k].scale * node.scale * LOG2E_256, what)
        output = _multiplier(self.tensors[v].scale / out.scale, what)
        mask = self.graph.nodes[node.inputs[3]].inputs[0] if len(node.inputs) == 4 else None
        self.ops.append(
            ops.Attention(
                name=node.name, q=q, k=k, v=v, out=out.name, heads=node.heads, mask=mask, source=node.source,
                score_mult=score[0], score_shift=score[1], out_mult=output[0], out_shift=output[1],
            )
        )  # fmt: skip


def resize(network: ops.QuantNetwork, *, batch: int, rows: int) -> ops.QuantNetwork:
    """The same network for another batch size and number of rows; scales and weights stay."""
    if batch < 1 or rows < 1:
        raise ValueError(f"batch and rows must be >= 1, not {batch} and {rows}")
    tensors = {
        name: replace(tensor, shape=(batch, 1, rows) if tensor.dtype == "keymask" else (batch, rows, tensor.shape[2]))
        for name, tensor in network.tensors.items()
    }
    return replace(network, tensors=tensors)
