"""The plainest integer reference: whole tensors, one line of docs/numerics.md after the other, in NumPy.
Slow, and independent of `sim.reference` and its floating-point products; it also takes networks over several
sequences (cross-attention)."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from compiler.ops import Attention, Linear, Pointwise, QuantNetwork
from hw.numerics import MASK_BIAS, requantise, residual_add, saturate, table_lookup
from hw.row import layernorm_rows, norm_constants, softmax_rows

__all__ = ["run_oracle"]

Int = NDArray[np.int64]
Values = Mapping[str, NDArray[np.integer]]


def run_oracle(network: QuantNetwork, inputs: Values) -> dict[str, NDArray[np.integer]]:
    """Every tensor of the network, (batch, rows, channels)."""
    values: dict[str, NDArray[np.integer]] = dict(inputs)
    for op in network.ops:
        dtype = network.tensors[op.out].dtype
        result = _attention(op, values) if isinstance(op, Attention) else _rows(op, values, network)
        values[op.out] = saturate(result, 16 if dtype == "int16" else 8).astype(dtype)
    return values


def _rows(op: Linear | Pointwise, values: Values, network: QuantNetwork) -> Int:
    if isinstance(op, Linear):
        acc = values[op.x].astype(np.int64) @ op.weight.T.astype(np.int64)
        q = requantise(acc, op.requant.bias, _mult(op, op.requant.mult, values), op.requant.shift)
    else:
        x = np.zeros(network.tensors[op.out].shape, np.int8) if op.x is None else values[op.x]
        q = requantise(x, 0, _mult(op, op.mult, values), op.shift)
    if op.residual is not None and not op.residual.multiply:
        q = residual_add(q, values[op.residual.tensor], op.residual.mult, op.residual.shift)
    if op.table is not None:
        q = table_lookup(q, op.table)
    if op.norm is not None:
        ln_inv, ln_shift, row_mult, row_shift = norm_constants(q.shape[-1])
        q = layernorm_rows(
            q,
            op.norm.gamma,
            op.norm.beta,
            op.norm.shift,
            ln_inv=ln_inv,
            ln_shift=ln_shift,
            eps=op.norm.eps,
            row_mult=row_mult,
            row_shift=row_shift,
            rms=op.norm.rms,
        )
    return q


def _mult(op: Linear | Pointwise, mult: NDArray[np.int16] | int, values: Values) -> Int:
    """The multiplier, with the residual of a product."""
    if op.residual is None or not op.residual.multiply:
        return np.asarray(mult, np.int64)
    factor = values[op.residual.tensor]
    return factor.astype(np.int64) * mult >> 8 * factor.itemsize


def _attention(op: Attention, values: Values) -> Int:
    q, k, v = (_heads(values[name], op.heads) for name in (op.q, op.k, op.v))
    bias = 0 if op.mask is None else np.where(values[op.mask] != 0, 0, MASK_BIAS)[:, None]
    scores = requantise(q @ k.swapaxes(2, 3), bias, op.score_mult, op.score_shift)
    p, mult, shift = softmax_rows(scores, op.out_mult, op.out_shift)
    out = requantise(p @ v, 0, mult[..., None], shift[..., None])
    return out.transpose(0, 2, 1, 3).reshape(values[op.q].shape)


def _heads(x: NDArray[np.integer], heads: int) -> Int:
    """(batch, rows, channels) to (batch, heads, rows, head_dim)."""
    return x.astype(np.int64).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
