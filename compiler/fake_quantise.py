"""Quantisation-aware fine-tuning: a module that computes in float what its integer network will compute.

`FakeQuantised` takes the place of a model in any training loop. Each forward pass puts the model's parameters, as they are now,
through the compiler's front end and passes, and rounds every tensor to the grid that the compiler chose for it; gradients pass
through the rounding straight (Bengio et al., arXiv 1308.3432), and not at all where a value is clipped. What training changes are
the model's own parameters, through the masks of sparse layers. Scales of activations are those of the calibration and stay, so
that the fine-tuned model compiles to integers with the same grids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from algo.quantize import quantize_weight
from compiler import ops
from compiler.calibrate import calibrate
from compiler.exported import Exported, export
from compiler.frontend import import_whole
from compiler.graph import (
    Attention,
    CompileError,
    Convolution,
    Fold,
    Graph,
    Input,
    KeyMask,
    Linear,
    MaxPool,
    Node,
    Pointwise,
    Rearrange,
    Transpose,
    Unfold,
)
from compiler.mixed import matching
from compiler.parameters import LOG2E_256
from compiler.passes import optimise
from compiler.quantise import Builder, PostGrids
from compiler.smooth import divided_tensors, migrate, smoothing_factors

__all__ = ["FakeQuantised"]

PROBABILITY = 255.0
"""The largest probability of the accelerator's softmax."""
MASKED = -1e30


class FakeQuantised(nn.Module):
    """A model that rounds as its integer network does, with gradients.

    Parameters
    ----------
    model
        Trained in place: `parameters` are its own. It is traced in eval mode (no dropout, fixed statistics of batch
        normalisation), and all of it must be work for the accelerator.
    example_inputs
        As for `compiler.compile.compile_model`.
    calibration
        Batches from which scales are chosen, once.
    observer, residual_bits, bits16, smooth, bias_correction
        See `compiler.quantise.quantise`; ``bits16="auto"`` is not for training.

    Raises
    ------
    compiler.graph.CompileError
        As `compile_model` with ``host="forbid"``.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        calibration: Iterable[Any],
        *,
        observer: str | Any = "mse",
        residual_bits: Literal[8, 16] = 8,
        bits16: str | tuple[str, ...] = (),
        smooth: float | None = None,
        bias_correction: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.exported = export(model, example_inputs)
        graph, batches = optimise(import_whole(self.exported)), list(calibration)
        self._factors = {} if smooth is None else smoothing_factors(graph, batches, smooth)
        self._divided = divided_tensors(graph, self._factors)
        graph = migrate(graph, self._factors)
        self._calibration = calibrate(graph, batches, observer)
        self._options = {"residual_bits": residual_bits, "bits16": matching(graph, bits16), "wide": False}
        self._bias_correction = bias_correction
        self._grids = self._builder(graph)
        self._grids.network()

    def _builder(self, graph: Graph) -> Builder:
        return Builder(graph, self._calibration, bias_correction=self._bias_correction, **self._options)

    def graph(self) -> Graph:
        """The fused graph of the parameters as they are; differentiable where gradients are recorded."""
        exported = replace(self.exported, values=_values(self.model, self.exported))
        return migrate(optimise(import_whole(exported)), self._factors)

    def network(self) -> ops.QuantNetwork:
        """The integer network of the parameters as they are, with the scales of the calibration."""
        with torch.no_grad():
            network = self._builder(self.graph()).network()
        for name, factors in self._divided.items():
            network.meta[f"divided.{name}"] = " ".join(f"{value:.9g}" for value in factors.tolist())
        return network

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """As the model's, of any batch size that the graph takes."""
        values = self.values(*args, **kwargs)
        shapes = [tuple(node.meta["val"].shape) for node in self.exported.outputs]
        results = [_as_model(values[name], shape) for name, shape in zip(self._grids.graph.outputs, shapes, strict=True)]
        return results[0] if len(results) == 1 else tuple(results)

    def values(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """All tensors of the graph by name, on their grids."""
        graph = self.graph()
        names = [node.name for node in graph.inputs]
        given = graph.bind(dict(zip(names, args, strict=False)) | kwargs)
        values: dict[str, Tensor] = {}
        run = _Run(self._grids, values)
        for node in graph.nodes.values():
            values[node.name] = run.input(node, given) if isinstance(node, Input) else run.node(node)
        return values


def _as_model(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result in the model's own dimensions; the graph has one for rows, of which a pooled image has one."""
    return value if value.ndim == len(shape) else value.reshape(-1, *shape[1:])


def _values(model: nn.Module, exported: Exported) -> dict[str, Tensor]:
    """Parameters and buffers as the model has them now, masks of layers in sparse training applied."""
    found = {}
    for name in (*exported.program.state_dict,):
        owner, _, leaf = name.rpartition(".")
        found[name] = getattr(model.get_submodule(owner), leaf)
    return found


class _Run:
    """One forward pass: values by name, and the grids they are on."""

    def __init__(self, grids: Builder, values: dict[str, Tensor]) -> None:
        self.grids = grids
        self.values = values
        self._narrow: dict[str, Tensor] = {}

    def input(self, node: Input, given: dict[str, Tensor]) -> Tensor:
        value = given[node.name]
        if node.name not in self.grids.tensors or not value.is_floating_point():
            return value
        return self.stored(value, node.name, half_up=False)

    def node(self, node: Node) -> Tensor:
        known = not isinstance(node, Linear | Convolution | Pointwise) or not node.post.multiply
        if not known or (isinstance(node, Pointwise) and node.channels is not None):
            raise CompileError(f"{node.source or node.name}: fine-tuning does not know how a product of two activations rounds")
        if isinstance(node, Linear | Convolution):
            return self.post(node, self.product(node))
        if isinstance(node, Pointwise):
            wide = self.grids.tensors[node.inputs[-1]].dtype == "int16"
            x = self.values[node.inputs[0]] if len(node.inputs) == 1 and wide else self._first(node)
            return self.post(node, x)
        if isinstance(node, Attention):
            return self.stored(self.attention(node), node.name)
        if isinstance(node, MaxPool):
            return node.evaluate(self.operand8(node.inputs[0]))
        if isinstance(node, Rearrange | Transpose):
            return self.stored(node.evaluate(*map(self.operand8, node.inputs)), node.name)
        if not isinstance(node, KeyMask | Unfold | Fold):
            raise CompileError(f"{node.source or node.name}: fine-tuning does not know how {node.operator} rounds")
        value = node.evaluate(*(self.values[name] for name in node.inputs))
        return self.stored(value, node.name, half_up=False) if isinstance(node, Unfold) else value

    def _first(self, node: Pointwise) -> Tensor:
        """The operand that is not the residual."""
        first = sorted(node.inputs, key=lambda name: self.grids.tensors[name].dtype == "int16")[0]
        return self.operand8(first)

    # -- rounding --------------------------------------------------------------------------------------------------

    def stored(self, value: Tensor, name: str, *, half_up: bool = True) -> Tensor:
        """On the grid of a tensor of the network."""
        tensor = self.grids.tensors[name]
        offset = self.grids.offsets.get(name)
        zero = 0.0 if offset is None else torch.from_numpy(offset).to(value)
        limit = 128 if tensor.dtype == "int8" else 1 << 15
        return _round(value, tensor.scale, zero, limit, half_up=half_up)

    def operand8(self, name: str) -> Tensor:
        """What a product reads: the tensor, or its copy in 8 bits."""
        small = self.grids.narrow.get(name)
        if small is None:
            return self.values[name]
        if name not in self._narrow:
            self._narrow[name] = self.stored(self.values[name], small)
        return self._narrow[name]

    # -- operators -------------------------------------------------------------------------------------------------

    def product(self, node: Linear | Convolution) -> Tensor:
        """With the weight on its grid, and the bias corrected for that."""
        x = self.operand8(node.inputs[0])
        weight = _rounded_weight(node.weight)
        bias = node.bias
        if self.grids.bias_correction:
            lost = (node.weight - weight).detach()
            mean = torch.from_numpy(self.grids.mean(node.inputs[0])).to(lost)
            if isinstance(node, Convolution):
                mean = mean.view(node.groups, 1, -1).expand(-1, len(lost) // node.groups, -1).flatten(0, 1)
                correction = (lost.flatten(2).sum(2) * mean).sum(1)
            else:
                correction = lost @ mean
            bias = correction if bias is None else bias + correction
        return replace(node, weight=weight, bias=bias).product(x)

    def post(self, node: Linear | Convolution | Pointwise, x: Tensor) -> Tensor:
        """Requantise, residual, function, norm: each on its grid."""
        grids, post = self.grids.posts[node.name], node.post
        q = self._summed(node, x, grids)
        if post.function is not None:
            q = post.function.apply(q)
            if post.norm is not None:
                q = _round(q, grids.function, 0.0, 128)
        return self.stored(q if post.norm is None else post.norm.apply(q), node.name)

    def _summed(self, node: Linear | Convolution | Pointwise, x: Tensor, grids: PostGrids) -> Tensor:
        """Sum of product and residual in steps of the sum's grid; a residual's value at 0 is in the bias."""
        limit = 1 << 15 if node.post.function is None else 128
        name, zero = self._residual(node), torch.as_tensor(grids.zero).to(x)
        if name is None:
            return _round(x, grids.sum, zero, limit)
        offset = self.grids.offsets.get(name)
        shift = 0.0 if offset is None else torch.from_numpy(offset).to(x)
        first = _round(x + shift - zero, grids.sum, 0.0, 1 << 15)
        second = _round(self.values[name] - shift, grids.sum, 0.0, 1 << 31)
        return _round(first + second + zero, grids.sum, zero, limit)

    def _residual(self, node: Linear | Convolution | Pointwise) -> str | None:
        """Name of the operand that is added."""
        if not node.post.residual:
            return None
        if not isinstance(node, Pointwise):
            return node.inputs[1]
        return sorted(node.inputs, key=lambda name: self.grids.tensors[name].dtype == "int16")[-1]

    def attention(self, node: Attention) -> Tensor:
        """Scores in steps of 2^-8 in the log2 domain, probabilities of 8 bits that are not normalised until the end."""
        groups = node.kv_heads or node.heads
        operands = zip((self.operand8(name) for name in node.inputs[:3]), (node.heads, groups, groups), strict=True)
        q, k, v = (x.unflatten(-1, (n, -1)).transpose(-2, -3) for x, n in operands)
        k, v = (x.repeat_interleave(node.heads // groups, -3) for x in (k, v))
        scores = _round(q @ k.transpose(-1, -2) * node.scale, 1 / LOG2E_256, 0.0, 1 << 15)
        if node.bias is not None:
            bias = (node.bias * (LOG2E_256 / 2)).round() * (2 / LOG2E_256)
            scores = scores + (bias if q.ndim == 4 else bias[0])
        if len(node.inputs) > 3:
            keep = self.values[node.inputs[3]]
            scores = scores.masked_fill(~(keep[:, None] if q.ndim == 4 else keep), -torch.inf)
        seen = ~scores.isneginf()
        scores = scores.masked_fill(~seen, MASKED)
        exact = scores.softmax(-1) * seen  # zeros where all keys are masked
        with torch.no_grad():
            whole = torch.floor(PROBABILITY * (scores - scores.amax(-1, keepdim=True)).exp() * seen + 0.5)
            rounded = whole / whole.sum(-1, keepdim=True).clamp_min(1.0)
        probabilities = exact + (rounded - exact).detach()
        return (probabilities @ v).transpose(-2, -3).flatten(-2)


def _round(value: Tensor, scale: float, zero: Tensor | float, limit: int, *, half_up: bool = True) -> Tensor:
    """On the grid ``zero + scale * q``, q in [-limit, limit - 1], straight through."""
    low, high = (torch.as_tensor(zero + bound * scale).to(value) for bound in (-limit, limit - 1))
    clipped = torch.minimum(torch.maximum(value, low), high)
    with torch.no_grad():
        steps = (clipped - zero) / scale
        steps = (torch.floor(steps + 0.5) if half_up else torch.round(steps)).clamp(-limit, limit - 1)
        rounded = steps * scale + zero
    return clipped + (rounded - clipped).detach()


def _rounded_weight(weight: Tensor) -> Tensor:
    """On the grid of its output channels, straight through."""
    quantised, scales = quantize_weight(weight)
    rounded = quantised * scales.view(-1, *[1] * (weight.ndim - 1))
    return weight + (rounded - weight).detach()
