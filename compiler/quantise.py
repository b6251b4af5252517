"""The quantiser: a fused float `Graph` and calibration data become a `QuantNetwork`.

`compiler.calibrate` runs the graph in float and watches every value that needs a scale; `compiler.scales` chooses the grid of
each tensor; here `Builder` writes integer operators, one for each node (and one to bring a 16-bit tensor to 8 bits where both
are needed), with the numbers of `compiler.parameters` and `compiler.tables`.

Biases are free, so an 8-bit tensor that only Linear layers read need not be symmetric: 0 stands for the
middle of a channel's range after a norm, for the middle of the table's range after a function, and the biases
of the readers make up for it. `Grids.offsets` has these values. Measured on MiniLM-L6 (pooled cosine to
float): 0.975 without, 0.991 with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from algo.observers import Observer
from compiler import ops
from compiler.calibrate import Calibration, Progress, calibrate_together
from compiler.graph import (
    Attention,
    CompileError,
    Convolution,
    Fixed,
    Graph,
    Input,
    KeyMask,
    Linear,
    MatMul,
    MaxPool,
    Node,
    Pointwise,
    Rearrange,
    Unfold,
)
from compiler.mixed import check_patterns, matching, most_sensitive
from compiler.parameters import LOG2E_256, Offset, finest_for_norm, multiplier, norm_parameters, score_bias, weight_and_requant
from compiler.passes import optimise
from compiler.row_operators import row_operator
from compiler.scales import WIDE_MARGIN, Grids
from compiler.smooth import divided_tensors, migrate, smoothing_factors_together
from compiler.tables import activation_table, table_input

__all__ = ["Builder", "PostGrids", "alike", "quantise", "quantise_together", "resize"]


def quantise(
    graph: Graph,
    calibration_batches: Iterable[Any],
    *,
    observer: str | Callable[[], Observer] = "mse",
    residual_bits: Literal[8, 16] = 8,
    bits16: str | Sequence[str] = (),
    smooth: float | None = None,
    bias_correction: bool = True,
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
    observer
        How 8-bit ranges are chosen: see `algo.observers.observer_factory`.
    residual_bits
        Bits of a normalised tensor where it is a residual (post-LN networks). 16 costs one more operator for
        each such tensor (MiniLM-L6: 0.994 instead of 0.991). Sums that are not normalised (the residual
        stream of pre-LN networks) always have 16.
    bits16
        Globs of names or module paths of further tensors with 16 bits (`compiler.mixed.candidates` are possible), or "auto":
        those whose rounding to 8 bits the result feels most (`compiler.mixed.most_sensitive`).
    smooth
        Alpha in [0, 1] of `compiler.smooth.smooth`; None: off.
    bias_correction
        Let biases take up what rounding a weight does to the mean of its inputs (Nagel et al., arXiv 1906.04721,
        section 4.2, with the mean of the calibration data).
    wide
        16 bits for inputs and outputs, where no operator needs 8: for a part of a network, between other parts.
    progress
        Called after each batch.

    Returns
    -------
    QuantNetwork
        Tensors have the graph's names; masks have the name of their input. ``meta["keep.<mask>"]`` is "1" or
        "0": the mask's value for a key that takes part. ``meta["offset.<tensor>"]`` holds the real values
        that 0 stands for, one for each channel or one for all, where they are not 0; ``meta["divided.<tensor>"]``
        what `smooth` divided its channels by: `sim.reference.dequantise` knows about both. Inputs and outputs have none.

    Raises
    ------
    ValueError
        No calibration data, unknown method, a NaN or an infinity in weights or data (CompileError names the
        layer).
    """
    (network,) = quantise_together(
        [(graph, calibration_batches)], observer=observer, residual_bits=residual_bits, bits16=bits16, smooth=smooth,
        bias_correction=bias_correction, wide=wide, progress=progress,
    )  # fmt: skip
    return network


def quantise_together(
    parts: Sequence[tuple[Graph, Iterable[Any]]],
    *,
    observer: str | Callable[[], Observer] = "mse",
    residual_bits: Literal[8, 16] = 8,
    bits16: str | Sequence[str] = (),
    smooth: float | None = None,
    bias_correction: bool = True,
    wide: bool = False,
    progress: Progress | None = None,
) -> list[ops.QuantNetwork]:
    """`quantise` graphs of one network for several shapes, each with its own batches: tensors and layers of one name have one
    grid. Graphs that are not `alike` do not go together. ``bits16="auto"`` looks at the first graph that has batches."""
    if residual_bits not in (8, 16):
        raise ValueError(f"residual_bits must be 8 or 16, not {residual_bits!r}")
    graphs = [graph if graph.stage == "fuse" else optimise(graph) for graph, _ in parts]
    if not wide:
        check_patterns(graphs, bits16)
    batches = [batches for _, batches in parts]
    if smooth is not None or bits16 == "auto":
        batches = [list(those) for those in batches]
    divided: list[dict[str, Tensor]] = [{} for _ in graphs]
    if smooth is not None:
        factors = smoothing_factors_together(list(zip(graphs, batches, strict=True)), smooth)
        divided = [divided_tensors(graph, factors) for graph in graphs]
        graphs = [migrate(graph, factors) for graph in graphs]
    calibration = calibrate_together(list(zip(graphs, batches, strict=True)), observer, progress)
    options: dict[str, Any] = {"residual_bits": residual_bits, "wide": wide, "bias_correction": bias_correction}
    sensitive: frozenset[str] = frozenset()
    if bits16 == "auto":
        graph, those = next((graph, those) for graph, those in zip(graphs, batches, strict=True) if those)
        plain = Builder(graph, calibration, **options)
        plain.network()
        sensitive = most_sensitive(graph, those, plain)
    networks = []
    for graph, factors_of in zip(graphs, divided, strict=True):
        chosen = sensitive if bits16 == "auto" else matching(graph, bits16)
        network = Builder(graph, calibration, bits16=chosen, **options).network()
        for name, values in factors_of.items():
            network.meta[f"divided.{name}"] = " ".join(f"{value:.9g}" for value in values.tolist())
        networks.append(network)
    return networks


def alike(graph: Graph, other: Graph) -> bool:
    """Whether nodes of one name are the same operator of the same module in both, with as many channels where layers read them.
    A mean over tokens is a convolution whose kernel has their number, scores have as many channels."""
    users, others = graph.users(), other.users()
    return all(
        _identity(node, users[name]) == _identity(other.nodes[name], others[name])
        for name, node in graph.nodes.items() if name in other.nodes
    )  # fmt: skip


def _identity(node: Node, users: Sequence[Node]) -> tuple[Any, ...]:
    parameters = node.weight.shape[:2] if isinstance(node, Linear | Convolution) else None
    told_apart = any(isinstance(user, Linear | Convolution | Rearrange) for user in users)
    return type(node), node.source, parameters, node.shape[-1] if told_apart else None


@dataclass(frozen=True)
class PostGrids:
    """Grids within the post-processing of a node: scale of the sum, what its 0 stands for (in all or each channel), scale of the
    function."""

    sum: float
    zero: Offset
    function: float


GROWTH = 1.25
"""By how much more than its range something may be added to an input that keeps its scale."""


class Builder(Grids):
    """Operators of one network."""

    def __init__(self, graph: Graph, calibration: Calibration, *, bias_correction: bool = True, **options: Any) -> None:
        super().__init__(graph, calibration, **options)
        self.bias_correction = bias_correction
        self.ops: list[ops.Op] = []
        self.constants: dict[str, NDArray[np.integer]] = {}
        self.narrow: dict[str, str] = {}  # 16-bit tensor -> its 8-bit version
        self.posts: dict[str, PostGrids] = {}  # by name of the node

    def network(self) -> ops.QuantNetwork:
        for node in self.graph.nodes.values():
            if isinstance(node, Input) and not any(
                isinstance(user, KeyMask | Unfold) for user in self.users[node.name]
            ):
                self.input(node)
            elif isinstance(node, KeyMask):
                self.mask(node)
            elif isinstance(node, Fixed):
                self.constants[node.name] = self.fixed(node)
            elif isinstance(node, Attention):
                self.attention(node)
            elif isinstance(node, Linear):
                self.linear(node)
            elif isinstance(node, MatMul):
                self.matmul(node)
            elif isinstance(node, Convolution):
                self.convolution(node)
            elif isinstance(node, MaxPool):
                self.max_pool(node)
            elif isinstance(node, Unfold):
                self.tensor(node, "int8", self.out_scale(node.name))
            elif isinstance(node, Pointwise):
                self.pointwise(node)
            else:
                row_operator(self, node)
        arguments = [node.name for node in self.graph.inputs]
        read = [node for node in self.graph.nodes.values() if isinstance(node, Input | Unfold) and node.name in self.tensors]
        read.sort(key=lambda node: arguments.index(node.inputs[0] if isinstance(node, Unfold) else node.name))
        inputs = [node.name for node in read]
        return ops.QuantNetwork(
            tensors=self.tensors,
            ops=tuple(self.ops),
            inputs=tuple(inputs),
            outputs=self.outputs,
            constants=self.constants,
            meta=self.meta,
        )

    def mask(self, node: KeyMask) -> None:
        (name,) = node.inputs
        keep = self.meta.setdefault(f"keep.{name}", str(int(node.keep)))
        if keep != str(int(node.keep)):
            raise CompileError(f"{node.source}: input {name!r} is used as a key mask with both meanings")
        self.tensors[name] = ops.QuantTensor(name, node.shape, "keymask", 1.0)  # type: ignore[arg-type]

    def operand8(self, name: str) -> str:
        """The tensor, or its 8-bit version."""
        tensor = self.tensors[name]
        if tensor.dtype == "int8":
            return name
        if name not in self.narrow:
            shifted = name in self.offsets
            scale = self.calibration.centred(name, "out")[0] if shifted else self.out_scale(name)
            small = replace(tensor, name=f"{name}.int8", dtype="int8", scale=scale)
            mult, shift = multiplier(tensor.scale / small.scale, name)
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

    def post(self, node: Linear | Convolution | Pointwise, residual: str | None) -> tuple[float, Offset, dict[str, Any]]:
        """Scale and offset of the sum's grid, and the fields of the post-processing."""
        out, post = self.out(node), node.post
        offset = self.offsets.get(node.name, np.zeros(1))
        grid, table, norm, inner = out.scale, None, None, 0.0
        zero: Offset = self.offsets.get(node.name, 0.0) if post.function is None and post.norm is None else 0.0
        normed = self.calibration.peak(node.name, "sum" if post.function is None else "function")
        finest = 0.0 if post.norm is None else finest_for_norm(post.norm, normed)
        if post.function is not None:
            last = post.norm is None
            inner = out.scale if last else max(finest, self.calibration.scale(node.name, "function"))
            at = float(offset[0]) if last else 0.0
            sample, symmetric = self.calibration.sample(node.name, "sum"), isinstance(node, Pointwise) or post.multiply
            grid, zero = table_input(post.function, sample, out_scale=inner, out_offset=at, symmetric=symmetric)
            table = activation_table(post.function, in_scale=grid, in_offset=zero, out_scale=inner, out_offset=at)
        elif post.norm is not None:
            grid = max(finest, self.peak(node, "sum") / WIDE_MARGIN, 1e-30)
        if post.norm is not None:
            summed = grid if post.function is None else inner
            norm = norm_parameters(post.norm, in_scale=summed, out_scale=out.scale, offset=offset)
        self.posts[node.name] = PostGrids(grid, zero, inner)
        fields: dict[str, Any] = {
            "out": out.name,
            "table": table,
            "norm": norm,
            "source": node.source,
            "name": node.name,
        }
        fields["residual"] = None if residual is None else self.residual(residual, grid, node)
        return grid, zero, fields

    def residual(self, name: str, grid: float, node: Linear | Convolution | Pointwise) -> ops.ResidualInput:
        if node.post.multiply:
            return ops.ResidualInput(name, multiply=True)
        mult, shift = multiplier(
            self.tensors[name].scale / grid, f"{node.source or node.name}, residual {name!r}"
        )
        return ops.ResidualInput(name, mult, shift)

    def mean(self, name: str) -> NDArray[np.float64]:
        """Mean of a tensor's channels that biases are corrected for."""
        mean = self.calibration.mean(name, "out")
        return mean if self.bias_correction else np.zeros_like(mean)

    def factor(self, residual: ops.ResidualInput | None) -> float:
        """What a product's residual makes of a multiplier: its scale, for 2^-bits of the product."""
        if residual is None or not residual.multiply:
            return 1.0
        tensor = self.tensors[residual.tensor]
        return tensor.scale * (1 << (16 if tensor.dtype == "int16" else 8))

    def linear(self, node: Linear) -> None:
        if node.wide and self.tensors[node.inputs[0]].dtype == "int16":
            self.wide_linear(node)
            return
        x = self.operand8(node.inputs[0])
        grid, zero, fields = self.post(node, node.inputs[1] if node.post.residual else None)
        added = self.offsets.get(node.inputs[1], 0.0) if node.post.residual else 0.0
        scale = grid / self.factor(fields["residual"])
        weight, requant = weight_and_requant(
            node, in_scale=self.tensors[x].scale, out_scale=scale, in_offset=self.offsets.get(x, 0.0),
            mean=self.mean(node.inputs[0]), added=added - zero,
        )  # fmt: skip
        self.ops.append(ops.Linear(x=x, weight=weight, pattern=node.pattern, requant=requant, **fields))

    def wide_linear(self, node: Linear) -> None:
        """Of x = low - 256 * high, both int8 (the second with its sign changed, since multipliers have none): the sum of both
        products."""
        x = self.tensors[node.inputs[0]]
        high, low, part = (replace(x, name=f"{node.name}.{name}", dtype="int8") for name in ("high", "low", "part"))
        high = replace(high, scale=256 * x.scale)
        grid, zero, fields = self.post(node, node.inputs[1] if node.post.residual else None)
        part = replace(self.tensors[node.name], name=part.name, dtype="int16", scale=grid)
        self.tensors |= {made.name: made for made in (high, low, part)}
        given, negative = ops.ResidualInput(x.name, 1, 8), np.arange(128, -128, -1).clip(-128, 127).astype(np.int8)
        self.ops.append(ops.Pointwise(
            name=high.name, x=None, out=high.name, mult=0, shift=1, residual=given, table=negative, source=node.source,
        ))  # fmt: skip
        self.ops.append(ops.Pointwise(
            name=low.name, x=high.name, out=low.name, mult=1 << 14, shift=6, residual=ops.ResidualInput(x.name, 2, 1),
            source=node.source,
        ))  # fmt: skip
        added = (self.offsets.get(node.inputs[1], 0.0) if node.post.residual else 0.0) - zero
        none: dict[str, Any] = {"in_offset": 0.0, "out_scale": grid, "added": 0.0, "mean": np.zeros(node.weight.shape[1])}
        weight, requant = weight_and_requant(replace(node, bias=None), in_scale=low.scale, **none)
        first = {**fields, "name": part.name, "out": part.name}
        self.ops.append(ops.Linear(x=low.name, weight=weight, pattern=node.pattern, requant=requant, **first))
        weight, requant = weight_and_requant(replace(node, weight=-node.weight), in_scale=high.scale, **{**none, "added": added})
        last = {**fields, "residual": ops.ResidualInput(part.name, 2, 1)}
        self.ops.append(ops.Linear(x=high.name, weight=weight, pattern=node.pattern, requant=requant, **last))

    def matmul(self, node: MatMul) -> None:
        """An input of 8 bits that the product is added to gives its scale, if the sum is not much larger: a cache keeps its
        bytes, whatever is put into it."""
        x, y = (self.operand8(name) for name in node.inputs[:2])
        residual = self.tensors[node.inputs[2]] if node.post.residual else None
        kept = residual is not None and residual.dtype == "int8" and isinstance(self.graph.nodes[residual.name], Input)
        kept = kept and residual is not None and self.calibration.peak(node.name, "out") < GROWTH * 127 * residual.scale
        out = self.tensor(node, "int8", residual.scale if residual is not None and kept else self.out_scale(node.name))
        what = node.source or node.name
        mult, shift = multiplier(self.tensors[x].scale * self.tensors[y].scale / out.scale, what)
        added = None if residual is None else ops.ResidualInput(residual.name, *multiplier(residual.scale / out.scale, what))
        self.ops.append(
            ops.MatMul(name=node.name, x=x, y=y, out=out.name, mult=mult, shift=shift, residual=added, source=node.source)
        )

    def convolution(self, node: Convolution) -> None:
        """As a Linear layer of each window; the weight with the channels last, as it is stored."""
        x = self.operand8(node.inputs[0])
        if x in self.offsets:
            raise CompileError(f"{node.source or node.name}: the input of a convolution has an offset")
        grid, zero, fields = self.post(node, node.inputs[1] if node.post.residual else None)
        added = self.offsets.get(node.inputs[1], 0.0) if node.post.residual else 0.0
        scale = grid / self.factor(fields["residual"])
        outputs, inputs, *kernel = node.weight.shape
        flat = node.weight.permute(0, 2, 3, 1).flatten(1)
        group = np.arange(outputs) // (outputs // node.groups)
        mean = self.mean(node.inputs[0]).reshape(node.groups, inputs)[group]
        weight, requant = weight_and_requant(
            Linear(name=node.name, shape=node.shape, source=node.source, weight=flat, bias=node.bias),
            in_scale=self.tensors[x].scale, out_scale=scale, in_offset=0.0, mean=np.tile(mean, kernel[0] * kernel[1]),
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

    def pointwise(self, node: Pointwise) -> None:
        """One operand: by the residual path if it has 16 bits. Two: the one with 16 bits is the residual."""
        operands = list(node.inputs)
        if node.channels is None:
            operands.sort(key=lambda name: (name in self.constants, self.tensors[name].dtype == "int16"))
        x: str | None = (
            self.operand8(operands[0])
            if len(operands) == 2 or node.channels is not None or self.tensors[operands[0]].dtype == "int8"
            else None
        )
        grid, _, fields = self.post(node, operands[-1] if len(operands) == 2 or x is None else None)
        factor = self.factor(fields["residual"]) / grid
        mult, shift = (0, 1) if x is None else multiplier(self.tensors[x].scale * factor, node.source or node.name)
        channels = None if node.channels is None else np.array(node.channels, np.int32)
        self.ops.append(ops.Pointwise(x=x, mult=mult, shift=shift, channels=channels, **fields))

    def attention(self, node: Attention) -> None:
        q, k, v = (self.operand8(name) for name in node.inputs[:3])
        out = self.tensor(node, "int8", self.out_scale(node.name))
        what = node.source or node.name
        score = multiplier(self.tensors[q].scale * self.tensors[k].scale * node.scale * LOG2E_256, what)
        output = multiplier(self.tensors[v].scale / out.scale, what)
        mask = self.graph.nodes[node.inputs[3]].inputs[0] if len(node.inputs) == 4 else None
        self.ops.append(
            ops.Attention(
                name=node.name, q=q, k=k, v=v, out=out.name, heads=node.heads, mask=mask, source=node.source,
                score_mult=score[0], score_shift=score[1], out_mult=output[0], out_shift=output[1],
                kv_heads=node.kv_heads,
                bias=None if node.bias is None else score_bias(node.bias),
            )
        )  # fmt: skip


def resize(network: ops.QuantNetwork, *, batch: int, rows: int) -> ops.QuantNetwork:
    """The same network for another batch size and number of rows; scales and weights stay.

    Raises
    ------
    ValueError
        Not positive, or a network with sequences of several lengths.
    """
    if batch < 1 or rows < 1:
        raise ValueError(f"batch and rows must be >= 1, not {batch} and {rows}")
    if network.constants or any(isinstance(op, ops.Attention) and op.bias is not None for op in network.ops):
        raise ValueError("a network with constant masks or tensors cannot be resized")
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
