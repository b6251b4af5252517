"""The quantised network: integer operators on named tensors.

This is the meeting point of the compiler: the front end and the quantiser produce it, `sim.reference` executes it
operator by operator with the models of `hw.numerics` and `hw.row`, and the back end lowers it to instructions.
An operator is what one pass through the accelerator's post-processing can do, so lowering is one to one; nothing here knows
tiles, addresses or packing.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from algo.nm import NM

__all__ = [
    "Attention", "LayerNorm", "Linear", "Op", "Pointwise", "QuantNetwork", "QuantTensor", "Requant", "ResidualInput", "ScoreBias",
]

TensorDtype = Literal["int8", "int16", "keymask"]


@dataclass(frozen=True)
class QuantTensor:
    """A named tensor of shape (batch, rows, channels): real value = scale * integer.

    dtype ``"keymask"`` is an input of shape (batch, 1, keys), 1 for a key that takes part and 0 for a masked one (scale 1).
    """

    name: str
    shape: tuple[int, int, int]
    dtype: TensorDtype
    scale: float


@dataclass(frozen=True, eq=False)
class Requant:
    """Bias and requantisation of each output channel: bias int32 (C,), mult int16 (C,) >= 0, shift uint8 (C,) in 1..63."""

    bias: NDArray[np.int32]
    mult: NDArray[np.int16]
    shift: NDArray[np.uint8]


@dataclass(frozen=True)
class ResidualInput:
    """Second operand: ``q + rshr(r * mult, shift)``; tensor of the output's shape, int8 or int16."""

    tensor: str
    mult: int
    shift: int


@dataclass(frozen=True, eq=False)
class ScoreBias:
    """Added to an attention's requantised scores, as a residual is: values int8 or int16 (batch or 1, heads or 1, rows, keys).
    A sum of -32768 masks the key."""

    values: NDArray[np.integer]
    mult: int
    shift: int


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """Row normalisation after requantisation and residual: gamma int16 (C,), beta int32 (C,), shift uint8 (C,); eps in the
    units of ``ln_eps``. rms=True is RMSNorm."""

    gamma: NDArray[np.int16]
    beta: NDArray[np.int32]
    shift: NDArray[np.uint8]
    eps: int
    rms: bool = False


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
    """``out = post(x)`` without weights: x int8 or None (zero), one multiplier and shift for all, then residual, table, norm."""

    name: str
    x: str | None
    out: str
    mult: int
    shift: int
    residual: ResidualInput | None = None
    table: NDArray[np.int8] | None = None
    norm: LayerNorm | None = None
    source: str = ""


Op = Linear | Attention | Pointwise


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantNetwork:
    """Operators in execution order over named tensors. inputs and outputs name tensors; each tensor is written once."""

    tensors: dict[str, QuantTensor]
    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    meta: dict[str, str] = field(default_factory=dict)
