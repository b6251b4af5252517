"""The quantised network: integer operators on named tensors.

This is the meeting point of the compiler: the front end and the quantiser produce it, `sim.reference` executes it
operator by operator with the models of `hw.numerics` and `hw.row`, and the back end lowers it to instructions.
An operator is what one pass through the accelerator's post-processing can do, so lowering is one to one; nothing here knows
tiles, addresses or packing.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from algo.nm import NM

__all__ = [
    "Attention", "Conv", "LayerNorm", "Linear", "MatMul", "MaxPool", "Op", "Pointwise", "Product", "QuantNetwork", "QuantTensor",
    "Rearrange", "Requant", "ResidualInput", "RowSource", "ScoreBias", "Softmax", "Transpose", "Window",
]

TensorDtype = Literal["int8", "int16", "keymask"]


@dataclass(frozen=True)
class QuantTensor:
    """A named tensor of shape (batch, rows, channels): real value = scale * integer.

    dtype ``"keymask"`` is an input of shape (batch, 1, keys), 1 for a key that takes part and 0 for a masked one (scale 1).
    image: (height, width) if the rows are the pixels of an image, line by line.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: TensorDtype
    scale: float
    image: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which pixels of an image a convolution or pooling sees, (vertical, horizontal). padding: lines above and columns to the
    left of the image, negative for those that no window sees; below and to the right, as many as the output needs."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def sources(self, image: tuple[int, int], out: tuple[int, int]) -> NDArray[np.int64]:
        """(kernel positions, pixels of `out`): the pixel of `image` that each sees there, -1 for one outside."""
        y, x = (
            np.arange(self.kernel[i])[:, None] * self.dilation[i] + np.arange(out[i]) * self.stride[i] - self.padding[i]
            for i in range(2)
        )
        pixel = y[:, None, :, None] * image[1] + x[None, :, None, :]
        inside = ((y >= 0) & (y < image[0]))[:, None, :, None] & ((x >= 0) & (x < image[1]))[None, :, None, :]
        return np.where(inside, pixel, -1).reshape(self.kernel[0] * self.kernel[1], -1)


@dataclass(frozen=True, eq=False)
class Requant:
    """Bias and requantisation of each output channel: bias int32 (C,), mult int16 (C,) >= 0, shift uint8 (C,) in 1..63."""

    bias: NDArray[np.int32]
    mult: NDArray[np.int16]
    shift: NDArray[np.uint8]


@dataclass(frozen=True)
class ResidualInput:
    """Second operand r, a tensor of the output's shape, int8 or int16: ``q + rshr(r * mult, shift)``.

    multiply: a product, ``requantise`` with ``(r * its mult) >> bits of r`` for its mult; the mult and shift here are 0.
    """

    tensor: str
    mult: int = 0
    shift: int = 0
    multiply: bool = False


@dataclass(frozen=True, eq=False)
class ScoreBias:
    """Added to an attention's requantised scores, as a residual is: values int8 or int16 (batch or 1, heads or 1, rows, keys).
    A sum of -32768 masks the key."""

    values: NDArray[np.integer]
    mult: int
    shift: int


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """Row normalisation after requantisation and residual, of each of ``groups`` equal parts of the columns: gamma int16 (C,),
    beta int32 (C,), shift uint8 (C,); eps in the units of ``ln_eps``. rms=True is RMSNorm."""

    gamma: NDArray[np.int16]
    beta: NDArray[np.int32]
    shift: NDArray[np.uint8]
    eps: int
    rms: bool = False
    groups: int = 1

    @property
    def width(self) -> int:
        """Columns that are normalised together."""
        return len(self.gamma) // self.groups


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear:
    """``out = post(x @ weight.T)``; weight int8 (out, in), N:M along in if `pattern`. x is int8.

    post: requantise, then residual, then table (256 int8 entries for -128..127), then norm.
    `source` is the module path, for messages.
    """

    name: str
    x: str
    out: str
    weight: NDArray[np.int8]
    pattern: NM | None
    requant: Requant
    residual: ResidualInput | None = None
    table: NDArray[np.int8] | None = None
    norm: LayerNorm | None = None
    source: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention:
    """Multi-head softmax attention. q: int8 (batch, rows, heads * head_dim); k, v: int8 (batch, keys, kv_heads * head_dim),
    where head h uses number h // (heads / kv_heads) of theirs (kv_heads None: as many as heads); mask: a keymask tensor
    (batch, 1, keys) or None.

    Scores: int16 = requantise(q @ k.T (+ MASK_BIAS for a masked key), score_mult, score_shift) + bias, units of 2^-8 in the
    log2 domain.
    Output: ``requantise(p @ v, 0, m_t, s_t)``, sat8, with the row scale made from out_mult, out_shift (row_mult, row_shift of
    numerics.md).
    """

    name: str
    q: str
    k: str
    v: str
    out: str
    heads: int
    score_mult: int
    score_shift: int
    out_mult: int
    out_shift: int
    mask: str | None = None
    bias: ScoreBias | None = None
    kv_heads: int | None = None
    source: str = ""

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads


@dataclass(frozen=True, eq=False, kw_only=True)
class Pointwise:
    """``out = post(x)`` without weights: x int8 or None (zero), one multiplier and shift for all, then residual, table, norm.

    channels: int32 (C,), the channel of x that each channel of out is made of; None: its own.
    """

    name: str
    x: str | None
    out: str
    mult: int
    shift: int
    residual: ResidualInput | None = None
    table: NDArray[np.int8] | None = None
    norm: LayerNorm | None = None
    channels: NDArray[np.int32] | None = None
    source: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv:
    """``out = post(convolution of x)``; x int8 (batch, pixels, in) and out are images. Pixels outside the image are 0.

    weight int8 (out, kernel height, kernel width, in / groups), N:M along the last axis if `pattern`; channels of x and out are
    cut into `groups` that do not see each other. post: as for `Linear`.
    """

    name: str
    x: str
    out: str
    weight: NDArray[np.int8]
    window: Window
    groups: int = 1
    pattern: NM | None = None
    requant: Requant
    residual: ResidualInput | None = None
    table: NDArray[np.int8] | None = None
    norm: LayerNorm | None = None
    source: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool:
    """The largest value of each window, channel by channel; x and out are int8 images of one scale. Pixels outside the image do
    not count; see `compiler.emit_convolution.max_pool` for what x must be if there are any."""

    name: str
    x: str
    out: str
    window: Window
    source: str = ""
    residual: ClassVar[None] = None
    table: ClassVar[None] = None
    norm: ClassVar[None] = None


@dataclass(frozen=True, eq=False, kw_only=True)
class RowSource:
    """Rows ``to`` of a `Rearrange`, columns [at, at + width), are rows ``rows`` of an int8 tensor, columns from ``start`` on,
    requantised; rows int64 (n,), counted over the batch."""

    tensor: str
    rows: NDArray[np.int64]
    to: NDArray[np.int64]
    start: int
    at: int
    width: int
    mult: int
    shift: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Rearrange:
    """Rows of other tensors in other places: windows, slices, joined tensors. Where no source has anything, ``fill`` (batch *
    rows, channels) of the output's dtype, or zero. The output is int8, or without sources int16."""

    name: str
    out: str
    sources: tuple[RowSource, ...] = ()
    fill: NDArray[np.integer] | None = None
    source: str = ""
    x: ClassVar[None] = None
    residual: ClassVar[None] = None
    table: ClassVar[None] = None
    norm: ClassVar[None] = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Transpose:
    """x int8 (batch, rows, channels) to out int8 (batch, channels, rows), of one scale."""

    name: str
    x: str
    out: str
    source: str = ""
    residual: ClassVar[None] = None
    table: ClassVar[None] = None
    norm: ClassVar[None] = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Product:
    """``out = requantise(x @ y.T, mult, shift)`` for each batch entry: x int8 (batch, rows, in), y int8 (batch, columns, in)."""

    name: str
    x: str
    y: str
    out: str
    mult: int
    shift: int
    source: str = ""
    residual: ClassVar[None] = None
    table: ClassVar[None] = None
    norm: ClassVar[None] = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Softmax:
    """Softmax of each row of x, int8 or int16.

    Exponents: int16 ``rshr(x * in_mult, in_shift)`` in units of 2^-8 in the log2 domain. Output: as that of `Attention` with
    values of ``ONE`` on the diagonal.
    """

    ONE: ClassVar[int] = 127
    name: str
    x: str
    out: str
    in_mult: int
    in_shift: int
    out_mult: int
    out_shift: int
    source: str = ""
    residual: ClassVar[None] = None
    table: ClassVar[None] = None
    norm: ClassVar[None] = None


@dataclass(frozen=True, eq=False, kw_only=True)
class MatMul:
    """``out = post(x @ y)`` of two activations: x int8 (batch, rows, inputs), y int8 (batch, inputs, channels); one multiplier
    and shift for all, then the residual."""

    name: str
    x: str
    y: str
    out: str
    mult: int
    shift: int
    residual: ResidualInput | None = None
    source: str = ""
    table: ClassVar[None] = None
    norm: ClassVar[None] = None


Op = Linear | Attention | Pointwise | Conv | MaxPool | MatMul | Rearrange | Transpose | Product | Softmax
"""One kind of operator or another."""


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantNetwork:
    """Operators in execution order over named tensors. inputs and outputs name tensors; each tensor is written once.

    constants: values, int8 or int16 (1 or batch, rows, channels), of tensors that no operator writes.
    """

    tensors: dict[str, QuantTensor]
    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, NDArray[np.integer]] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)
