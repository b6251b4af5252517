"""The float graph: what the front end makes of a module, what the passes rewrite, what calibration runs.

A `Graph` is named nodes in execution order. There is one frozen dataclass for each kind of operator;
`compiler.legality` says which kinds may stand where. A graph can be executed at any time (`Graph.run`), so
every pass can be checked against the module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from algo.nm import NM
from compiler.layout import Layout

__all__ = [
    "Activation",
    "Add",
    "Aten",
    "Attention",
    "CompileError",
    "Constant",
    "Convolution",
    "Fixed",
    "Fold",
    "Function",
    "Gather",
    "Graph",
    "Input",
    "KeyMask",
    "LayerNorm",
    "Linear",
    "MatMul",
    "MaxPool",
    "Move",
    "Mul",
    "Node",
    "Norm",
    "Operand",
    "Part",
    "Pointwise",
    "Post",
    "Problem",
    "Product",
    "Rearrange",
    "Scale",
    "ScaledDotProduct",
    "Softmax",
    "Transpose",
    "Unfold",
    "View",
    "named_inputs",
    "windows",
]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """Something that the accelerator cannot do.

    Members
    -------
    text
        One line for people: module path, operator, shapes, reason.
    origin
        The exported operators to blame.
    reason
        The reason alone.
    """

    text: str
    origin: tuple[str, ...] = ()
    reason: str = ""


class CompileError(ValueError):
    """A module that cannot be compiled; the message names module path, operator and shapes.

    ``problems`` lists all of them where each can be blamed on operators that the host could run instead.
    """

    def __init__(self, message: str, problems: Iterable[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Function:
    """A function of one number, by name: what an activation table will hold."""

    name: str
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm (``rms``: RMSNorm) over the last dimension, or each of ``groups`` equal parts of it: gamma, beta float32 (C,)."""

    gamma: Tensor
    beta: Tensor
    eps: float
    rms: bool = False
    groups: int = 1

    @property
    def width(self) -> int:
        """Columns that are normalised together."""
        return len(self.gamma) // self.groups

    def apply(self, x: Tensor) -> Tensor:
        parts, shape = x.unflatten(-1, (self.groups, -1)), (self.width,)
        made = F.rms_norm(parts, shape, None, self.eps) if self.rms else F.layer_norm(parts, shape, None, None, self.eps)
        return made.flatten(-2) * self.gamma + self.beta


@dataclass(frozen=True, eq=False)
class Post:
    """What follows a sum, in this order: residual (the node's last operand; ``multiply``: it multiplies), function, norm."""

    residual: bool = False
    multiply: bool = False
    function: Function | None = None
    norm: Norm | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing follows."""
        return not self.residual and self.function is None and self.norm is None

    def apply(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        *_, (_, result) = self.stages(x, residual)
        return result

    def stages(self, x: Tensor, residual: Tensor | None = None) -> Iterable[tuple[str, Tensor]]:
        """The values that calibration has to see: "sum" (after the residual), then "function" and "norm"."""
        if residual is not None:
            x = x * residual if self.multiply else x + residual
        yield "sum", x
        if self.function is not None:
            x = self.function.apply(x)
            yield "function", x
        if self.norm is not None:
            x = self.norm.apply(x)
            yield "norm", x


@dataclass(frozen=True, eq=False, kw_only=True)
class Node:
    """An operator and its result.

    Members
    -------
    name
        Of the result, unique in the graph.
    inputs
        Names of the operands.
    shape
        Of the result, as traced. A graph without `View`, `Aten` and `ScaledDotProduct` runs on other batch
        sizes and lengths, too.
    source
        Module path, for messages.
    origin
        Names of the exported operators that it stands for.
    """

    name: str
    inputs: tuple[str, ...] = ()
    shape: Shape
    source: str = ""
    origin: tuple[str, ...] = ()

    def evaluate(self, *operands: Tensor) -> Tensor:
        """The node's float value."""
        raise NotImplementedError(type(self).__name__)

    @property
    def operator(self) -> str:
        """Name of the operator in messages."""
        return type(self).__name__


@dataclass(frozen=True, eq=False, kw_only=True)
class Input(Node):
    """An argument of the module: float32 data, or a mask of any integer type or bool. ``given``: its shape there, if that has one
    dimension or more than three, of which the inner ones are joined."""

    dtype: torch.dtype
    given: Shape | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Constant(Node):
    """A parameter, a buffer, or what the front end computed from them. ``source`` is the parameter's name."""

    value: Tensor

    def evaluate(self, *operands: Tensor) -> Tensor:
        return self.value


@dataclass(frozen=True)
class Operand:
    """Place of operand ``index`` within the arguments of an `Aten` node."""

    index: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Aten(Node):
    """A torch operator carried along as it is: mask arithmetic until `fold_masks`, otherwise unsupported."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: int | None = None  #: which one, of an operator with several

    @property
    def operator(self) -> str:
        return str(self.target)

    def evaluate(self, *operands: Tensor) -> Tensor:
        made = self.target(*_fill(self.args, operands), **_fill(self.kwargs, operands))
        return made if self.result is None else made[self.result]


@dataclass(frozen=True, eq=False, kw_only=True)
class Move(Aten):
    """A torch operator that only moves elements, and perhaps puts zeros between them: it does the same to numbers of elements as
    to their values, so that `compiler.passes.rows` learns what goes where by running it."""

    def evaluate(self, *operands: Tensor) -> Tensor:
        try:
            return super().evaluate(*operands)
        except RuntimeError:  # torch has some for floating point only, and numbers of elements are integers
            if all(x.is_floating_point() for x in operands):
                raise
            return super().evaluate(*(x.double() for x in operands)).long()


@dataclass(frozen=True, eq=False, kw_only=True)
class View(Node):
    """Reshape, transpose, select and slice in one."""

    layout: Layout

    def evaluate(self, *operands: Tensor) -> Tensor:
        return self.layout.apply(operands[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Node):
    """``post(x @ weight.T + bias)``; inputs x [, residual].

    weight float32 (out, in), N:M along in if ``pattern``. ``wide``: all 16 bits of x count, if it has them.
    """

    weight: Tensor
    bias: Tensor | None
    pattern: NM | None = None
    post: Post = Post()
    wide: bool = False

    def evaluate(self, *operands: Tensor) -> Tensor:
        return self.post.apply(self.product(operands[0]), *operands[1:])

    def product(self, x: Tensor) -> Tensor:
        """Before the post-processing."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """Rows ``to`` of a `Rearrange`, columns [at, at + width), are rows ``rows`` of an operand, columns from ``start`` on; both
    int64 (n,), counted over all dimensions but the last."""

    operand: int
    rows: Tensor
    to: Tensor
    start: int
    at: int
    width: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Rearrange(Node):
    """Rows and ranges of columns of the operands in other places: ``parts``, and ``fill`` float32 (rows, columns) where there is
    none of them (None: zero). Without parts, a constant."""

    parts: tuple[Part, ...] = ()
    fill: Tensor | None = None

    def evaluate(self, *operands: Tensor) -> Tensor:
        rows = math.prod(self.shape[:-1])
        made = torch.zeros(rows, self.shape[-1]) if self.fill is None else self.fill.clone()
        for part in self.parts:
            x = operands[part.operand].reshape(-1, operands[part.operand].shape[-1])
            made[part.to, part.at : part.at + part.width] = x[part.rows, part.start : part.start + part.width]
        return made.reshape(self.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Transpose(Node):
    """Rows and channels change places: (batch, rows, channels) to (batch, channels, rows)."""

    def evaluate(self, *operands: Tensor) -> Tensor:
        return operands[0].transpose(-1, -2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Product(Node):
    """``x @ y.T`` of two activations (batch, rows, in) and (batch, columns, in)."""

    def evaluate(self, *operands: Tensor) -> Tensor:
        return operands[0] @ operands[1].transpose(-1, -2)


Pair = tuple[int, int]


def _around(size: Pair, out: Pair, kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, ...]:
    """Pixels to the left, to the right, above and below an image that windows see; negative for those that they do not."""
    ends = [(out[i] - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1 - padding[i] - size[i] for i in range(2)]
    return padding[1], ends[1], padding[0], ends[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Convolution(Node):
    """``post(convolution of x + bias)`` of an image as rows of pixels (batch, pixels, channels); inputs x [, residual].

    weight float32 (out, in / groups, kernel height, kernel width), N:M along the second axis if ``pattern``; ``size`` and
    ``out_size``: (height, width) of x and of the result. ``padding``: zeros above and to the left of the image, negative for
    pixels that no window sees; below and to the right, as many as the output needs.
    """

    weight: Tensor
    bias: Tensor | None
    size: Pair
    out_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int = 1
    pattern: NM | None = None
    post: Post = Post()

    def evaluate(self, *operands: Tensor) -> Tensor:
        return self.post.apply(self.product(operands[0]), *operands[1:])

    def product(self, x: Tensor) -> Tensor:
        """Before the post-processing."""
        around = _around(self.size, self.out_size, self.weight.shape[2:], self.stride, self.padding, self.dilation)
        image = F.pad(x.transpose(1, 2).unflatten(2, self.size), around)
        result = F.conv2d(image, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        return result.flatten(2).transpose(1, 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Node):
    """The largest value of each window of an image (batch, pixels, channels), channel by channel."""

    size: Pair
    out_size: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def evaluate(self, *operands: Tensor) -> Tensor:
        around = _around(self.size, self.out_size, self.kernel, self.stride, self.padding, self.dilation)
        image = F.pad(operands[0].transpose(1, 2).unflatten(2, self.size), around, value=-torch.inf)
        result = F.max_pool2d(image, self.kernel, self.stride, 0, self.dilation)
        return result.flatten(2).transpose(1, 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Unfold(Node):
    """An input image (batch, channels, height, width), or line (batch, channels, length), as rows (batch, pixels of ``out_size``,
    kernel height * kernel width * channels), which the host writes: its pixels themselves, or the windows that a convolution
    sees."""

    out_size: Pair
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def evaluate(self, *operands: Tensor) -> Tensor:
        return windows(operands[0], self.out_size, self.kernel, self.stride, self.padding, self.dilation)


@dataclass(frozen=True, eq=False, kw_only=True)
class Fold(Node):
    """An output (batch, pixels, channels) as the image (batch, channels, height, width) or line, which the host reads."""

    size: tuple[int, ...]

    def evaluate(self, *operands: Tensor) -> Tensor:
        return operands[0].transpose(1, 2).unflatten(2, self.size)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pointwise(Node):
    """``post(x)``: post-processing without a product; inputs x [, residual]. ``channels``: the channel of x that each of the
    result's is (None: all in their order)."""

    post: Post
    channels: tuple[int, ...] | None = None

    def evaluate(self, *operands: Tensor) -> Tensor:
        return self.post.apply(self.product(operands[0]), *operands[1:])

    def product(self, x: Tensor) -> Tensor:
        """Before the post-processing."""
        return x if self.channels is None else x[..., self.channels]


@dataclass(frozen=True, eq=False, kw_only=True)
class MatMul(Node):
    """``a @ b`` of two activations; inputs a, b [, residual]."""

    post: Post = Post()

    def evaluate(self, *operands: Tensor) -> Tensor:
        return self.post.apply(operands[0] @ operands[1], *operands[2:])


@dataclass(frozen=True, eq=False, kw_only=True)
class Scale(Node):
    """``x * factor``."""

    factor: float

    def evaluate(self, *operands: Tensor) -> Tensor:
        return operands[0] * self.factor


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Node):
    """``a + b``."""

    def evaluate(self, *operands: Tensor) -> Tensor:
        return operands[0] + operands[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class Mul(Node):
    """``a * b``."""

    def evaluate(self, *operands: Tensor) -> Tensor:
        return operands[0] * operands[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class Fixed(Node):
    """A constant tensor that data is added to, multiplied or attended with."""

    value: Tensor

    def evaluate(self, *operands: Tensor) -> Tensor:
        return self.value


@dataclass(frozen=True, eq=False, kw_only=True)
class Gather(Node):
    """``x[..., channels]``."""

    channels: tuple[int, ...]

    def evaluate(self, *operands: Tensor) -> Tensor:
        return operands[0][..., self.channels]


@dataclass(frozen=True, eq=False, kw_only=True)
class Softmax(Node):
    """Softmax over the last dimension."""

    def evaluate(self, *operands: Tensor) -> Tensor:
        return operands[0].softmax(-1)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerNorm(Node):
    """Normalisation over the last dimension."""

    norm: Norm

    def evaluate(self, *operands: Tensor) -> Tensor:
        return self.norm.apply(operands[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class Activation(Node):
    """A function of each element."""

    function: Function

    def evaluate(self, *operands: Tensor) -> Tensor:
        return self.function.apply(operands[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyMask(Node):
    """Which keys take part: bool (batch, 1, keys) from a mask input (batch, keys).

    ``keep`` is the input's value for a key that takes part.
    """

    keep: bool

    def evaluate(self, *operands: Tensor) -> Tensor:
        return ((operands[0] != 0) == self.keep)[:, None, :]


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaledDotProduct(Node):
    """``softmax(scale * q @ k.T, masked) @ v`` over the last two dimensions; inputs q, k, v [, mask].

    A mask operand is what the module gave (bool or additive, broadcast to the scores), or a `KeyMask`
    (``key_mask``). ``bias`` of the scores' shape is added to them (-inf: the key is masked).
    """

    scale: float
    key_mask: bool = False
    bias: Tensor | None = None

    def evaluate(self, *operands: Tensor) -> Tensor:
        q, k, v, *mask = operands
        bias = mask[0] if mask else None
        if bias is not None and self.key_mask:
            keep = bias[:, None]  # (batch, 1, 1, keys)
            bias = keep if q.ndim == 4 else keep.expand(-1, q.shape[0] // len(keep), 1, -1).flatten(0, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_joined(bias, self.bias), scale=self.scale)


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention(Node):
    """Multi-head softmax attention on (..., rows, heads * head_dim); inputs q, k, v [, `KeyMask`].

    k and v have ``kv_heads`` heads (None: as many as q), each for as many neighbouring heads of q. ``bias`` (batch or 1,
    heads or 1, rows, keys) is added to the scores (-inf: the key is masked).
    """

    heads: int
    scale: float
    kv_heads: int | None = None
    bias: Tensor | None = None

    def evaluate(self, *operands: Tensor) -> Tensor:
        groups = self.kv_heads or self.heads
        counts = (self.heads, groups, groups)
        q, k, v = (x.unflatten(-1, (n, -1)).transpose(-2, -3) for x, n in zip(operands[:3], counts, strict=True))
        k, v = (x.repeat_interleave(self.heads // groups, -3) for x in (k, v))
        mask = operands[3] if len(operands) > 3 else None
        if mask is not None:
            mask = mask[:, None] if q.ndim == 4 else mask
        bias = self.bias if self.bias is None or q.ndim == 4 else self.bias[0]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_joined(mask, bias), scale=self.scale)
        return mixed.transpose(-2, -3).flatten(-2)


def named_inputs(names: Sequence[str], inputs: Any, whose: str) -> dict[str, Any]:
    """Give a tensor, a sequence or a dict of tensors names, in order.

    Raises
    ------
    ValueError
        A missing or surplus one; ``whose``, such as "the module", begins the message.
    """
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, Mapping):
        inputs = tuple(inputs)
        if len(inputs) != len(names):
            raise ValueError(f"{whose} has {len(names)} inputs ({', '.join(names)}), not {len(inputs)}")
        inputs = dict(zip(names, inputs, strict=True))
    if set(inputs) != set(names):
        raise ValueError(f"{whose}'s inputs are {', '.join(names)}, not {', '.join(map(str, inputs)) or 'none'}")
    return dict(inputs)


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in execution order, by name, and the names of the results.

    Members
    -------
    stage
        The latest pass that ran (``"trace"`` for none); `compiler.legality` has the law of each.
    """

    nodes: Mapping[str, Node]
    outputs: tuple[str, ...]
    stage: str = "trace"

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The arguments, in order."""
        return tuple(node for node in self.nodes.values() if isinstance(node, Input))

    def users(self) -> dict[str, list[Node]]:
        """The nodes that read each node; one that reads it twice is there twice."""
        found: dict[str, list[Node]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for name in node.inputs:
                found[name].append(node)
        return found

    def bind(self, inputs: Any) -> dict[str, Tensor]:
        """Give a tensor, a sequence or a dict of tensors the names of the graph's inputs.

        Raises
        ------
        ValueError
            A missing or surplus input, or one of another rank, dtype or number of channels.
        """
        inputs = named_inputs([node.name for node in self.inputs], inputs, "the graph")
        masks = {name for node in self.nodes.values() if isinstance(node, KeyMask) for name in node.inputs}
        for node in self.inputs:
            value = inputs[node.name]
            if not isinstance(value, Tensor):
                raise ValueError(f"input {node.name!r} must be a tensor, not {type(value).__name__}")
            if node.given is not None and value.ndim == len(node.given):
                inputs[node.name] = value = value.flatten(1, -2) if value.ndim > 3 else value[None]
            fits = value.ndim == len(node.shape)
            if fits and node.dtype == torch.float32 and node.name not in masks:
                fits = value.dtype == torch.float32 and value.shape[-1] == node.shape[-1]
            if not fits:
                wanted, given = f"{node.dtype} like {node.shape}", f"{value.dtype} {tuple(value.shape)}"
                raise ValueError(f"input {node.name!r} must be {wanted}, not {given}".replace("torch.", ""))
        return inputs

    @torch.no_grad()
    def run(
        self, inputs: Any, *, observe: Callable[[Node, tuple[Tensor, ...], Tensor], None] | None = None
    ) -> dict[str, Tensor]:
        """Execute in float.

        Parameters
        ----------
        inputs
            A tensor, a sequence in the order of `inputs`, or a dict by name.
        observe
            Called after each node with the node, its operands and its value.

        Returns
        -------
        dict[str, Tensor]
            The values of `outputs`.
        """
        values = self.bind(inputs)
        last = {name: node.name for node in self.nodes.values() for name in node.inputs}
        for node in self.nodes.values():
            if not isinstance(node, Input):
                operands = tuple(values[name] for name in node.inputs)
                values[node.name] = node.evaluate(*operands)
                if observe is not None:
                    observe(node, operands, values[node.name])
            for name in {*node.inputs, node.name}:
                if last.get(name, node.name) == node.name and name not in self.outputs and name in values:
                    del values[name]  # nobody reads it any more
        return {name: values[name] for name in self.outputs}

    def rewrite(
        self,
        nodes: Iterable[Node],
        *,
        renamed: Mapping[str, str] | None = None,
        outputs: tuple[str, ...] = (),
    ) -> Graph:
        """A graph of these nodes: operands and outputs renamed, dead nodes dropped (inputs stay).

        ``nodes`` must be in an order in which operands come first; ``outputs``, if given, are the new ones.
        """
        renamed = renamed or {}

        def final(name: str) -> str:
            while name in renamed:
                name = renamed[name]
            return name

        outputs = tuple(final(name) for name in outputs or self.outputs)
        new = [replace(node, inputs=tuple(map(final, node.inputs))) for node in nodes]
        needed = set(outputs)
        for node in reversed(new):
            if node.name in needed:
                needed.update(node.inputs)
        kept = {node.name: node for node in new if node.name in needed or isinstance(node, Input)}
        return Graph(kept, outputs, self.stage)

    def __str__(self) -> str:
        lines = []
        for node in self.nodes.values():
            shape, operands = "x".join(map(str, node.shape)), ", ".join(node.inputs)
            lines.append(f"{node.name:32} {node.operator:18} {shape:>14}  ({operands})  {node.source}")
        return "\n".join([f"graph after {self.stage}:", *lines, f"outputs: {', '.join(self.outputs)}"])


def _joined(keep: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A bool mask and a bias of scores as one mask."""
    if keep is None or bias is None:
        return keep if bias is None else bias
    return torch.where(keep, bias, torch.tensor(-torch.inf))


def windows(image: Tensor, out: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """What each of ``out`` (height, width) windows sees of an image (batch, channels, height, width) or a line (batch, channels,
    length): (batch, windows, kernel positions * channels)."""
    image = image if image.ndim == 4 else image[:, :, None]
    size = (image.shape[2], image.shape[3])
    rows = F.unfold(F.pad(image, _around(size, out, kernel, stride, padding, dilation)), kernel, dilation, 0, stride)
    return rows.unflatten(1, (image.shape[1], -1)).permute(0, 3, 2, 1).flatten(2)


def _fill(value: Any, operands: tuple[Tensor, ...]) -> Any:
    """Arguments of an `Aten` node with the operands in their places."""
    if isinstance(value, Operand):
        return operands[value.index]
    if isinstance(value, list | tuple):
        return type(value)(_fill(item, operands) for item in value)
    if isinstance(value, Mapping):
        return {key: _fill(item, operands) for key, item in value.items()}
    return value
