"""Checkpoints with compressed N:M weights, and exchange with torch's semi-structured 2:4 tensors.

A compressed checkpoint is one safetensors file. Each sparse weight ``NAME`` is replaced by ``NAME.values`` (rows, slots; the
weight's dtype) and ``NAME.positions`` (rows, bytes; uint8), see `algo.compress`; other tensors are as they were. The metadata
key ``nmforge`` holds JSON: ``{"compressed": {NAME: {"pattern", "format", "shape", "dtype"}}, "facts": {...}}``. Rows are those of
`algo.mask.rows`: convolutions channels last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from algo.checkpoint import read_tensors, write_tensors
from algo.compress import Format, Packed, entropy_bits, pack, unpack
from algo.layers import sparse_layers, weight_names
from algo.mask import from_rows, rows
from algo.nm import NM
from algo.sparsify import model_patterns
from algo.verify import verify, verify_weight

__all__ = ["StorageRow", "from_semi_structured", "load_compressed", "read_compressed", "save_compressed", "storage",
           "to_semi_structured"]


@dataclass(frozen=True)
class StorageRow:
    """Bytes of one sparse weight: dense, as packed, and the least possible (values and entropy of the positions)."""

    weight: str
    pattern: NM
    format: Format
    dense: int
    packed: int
    floor: float


def _sparse_weights(model: nn.Module) -> dict[str, tuple[Tensor, NM]]:
    """Qualified name to weight and pattern."""
    patterns, found = model_patterns(model), {}
    for name, layer in sparse_layers(model):
        for weight in weight_names(layer) if name in patterns else ():
            found[f"{name}.{weight}" if name else weight] = (getattr(layer, weight).detach(), patterns[name])
    return found


def _pack(weight: Tensor, pattern: NM, format: Format | None) -> Packed:
    matrix = rows(weight.cpu()).contiguous()
    if matrix.dtype == torch.bfloat16:  # unknown to NumPy; a minus zero would be a number there
        matrix = torch.where(matrix == 0, torch.zeros_like(matrix), matrix).view(torch.int16)
    return pack(matrix.numpy(), pattern, format)


def storage(model: nn.Module, *, format: Format | None = None) -> list[StorageRow]:
    """Sizes of a finalised model's sparse weights in a format (by default the smallest for each)."""
    found = []
    for name, (weight, pattern) in _sparse_weights(model).items():
        packed = _pack(weight, pattern, format)
        width = packed.shape[-1]
        floor = entropy_bits(pattern, width, value_bits=8 * weight.element_size()) * (weight.numel() // width) / 8
        found.append(StorageRow(name, pattern, packed.format, weight.numel() * weight.element_size(), packed.nbytes, floor))
    return found


def save_compressed(
    model: nn.Module, path: str | Path, facts: Mapping[str, Any] | None = None, *, format: Format | None = None
) -> None:
    """Write a finalised model with its sparse weights packed.

    Raises
    ------
    ValueError
        A layer breaks its pattern (`PatternViolation`), or is still in training.
    """
    verify(model, model_patterns(model))
    state, described = dict(model.state_dict()), {}
    weights = _sparse_weights(model)
    if missing := [name for name in weights if name not in state]:
        raise ValueError(f"{missing[0]!r} is still in training: call finalize() before saving")
    for name, (weight, pattern) in weights.items():
        packed = _pack(weight, pattern, format)
        values = torch.from_numpy(packed.values.copy())
        state[f"{name}.values"] = values.view(weight.dtype)
        state[f"{name}.positions"] = torch.from_numpy(packed.positions.copy())
        del state[name]
        described[name] = {"pattern": str(pattern), "format": packed.format, "shape": list(weight.shape),
                           "dtype": str(weight.dtype).removeprefix("torch.")}
    write_tensors(path, state, {"compressed": described, "facts": dict(facts or {})})


def read_compressed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, NM], dict[str, Any]]:
    """State dict with dense tensors, pattern by weight name, and the facts of what `save_compressed` wrote.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not a compressed checkpoint, truncated, or damaged: names the weight.
    """
    state, described = read_tensors(path)
    if not isinstance(described.get("compressed"), dict):
        raise ValueError(f"{path} is not a compressed checkpoint: its metadata has no \"compressed\"")
    patterns = {}
    for name, entry in described["compressed"].items():
        try:
            state[name] = _unpack(state.pop(f"{name}.values"), state.pop(f"{name}.positions"), entry)
            patterns[name] = NM(entry["pattern"])
        except KeyError as error:
            raise ValueError(f"{path}: weight {name!r} lacks {error}") from None
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path}: weight {name!r}: {error}") from None
    return state, patterns, dict(described.get("facts", {}))


def _unpack(values: Tensor, positions: Tensor, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
    if values.dtype != dtype:
        raise ValueError(f"its values are {values.dtype}, its description says {dtype}")
    plain = values.view(torch.int16) if dtype == torch.bfloat16 else values
    matrix_shape = tuple(rows(torch.empty(shape, device="meta")).shape)
    packed = Packed(NM(entry["pattern"]), entry["format"], matrix_shape, plain.numpy(), positions.numpy())
    matrix = torch.from_numpy(unpack(packed)).view(dtype)
    return from_rows(matrix, shape).contiguous()


def load_compressed(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load a compressed checkpoint into a model of the same shape, in place; its layers get their ``nm_pattern``.

    Returns
    -------
    dict
        The facts given to `save_compressed`.

    Raises
    ------
    ValueError
        As `read_compressed`, or the weights are another model's.
    """
    state, patterns, facts = read_compressed(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} holds another model: {error}") from None
    for name, layer in sparse_layers(model):
        for weight in weight_names(layer):
            full = f"{name}.{weight}" if name else weight
            if full in patterns:
                layer.nm_pattern = patterns[full]  # type: ignore[assignment]
    return facts


def to_semi_structured(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A 2:4 weight as torch's CUTLASS pair: values ``(O, I / 2)`` and metadata, which
    ``torch.sparse.SparseSemiStructuredTensorCUTLASS`` holds on a GPU.

    Parameters
    ----------
    weight
        ``(O, I)``, float16, bfloat16 or int8, O a multiple of 32 (float) or 16 (int8), I of 32 or 64: what torch's conversion
        asks for.

    Raises
    ------
    PatternViolation
        Not 2:4.
    ValueError
        A shape or dtype that torch's conversion refuses.
    """
    verify_weight(weight, NM("2:4"))
    if weight.ndim != 2 or weight.dtype not in (torch.float16, torch.bfloat16, torch.int8):
        raise ValueError("torch's 2:4 tensors are matrices of float16, bfloat16 or int8, "
                         f"not {weight.dtype} {tuple(weight.shape)}")
    try:
        values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    except RuntimeError as error:
        raise ValueError(f"torch cannot convert a {weight.dtype} weight of {tuple(weight.shape)}: {error}") from None
    return values, metadata


def from_semi_structured(values: Tensor, metadata: Tensor | None = None) -> Tensor:
    """A dense weight from torch's 2:4 form: a ``SparseSemiStructuredTensor``, or values and metadata of its CUTLASS layout."""
    if metadata is None:
        if not isinstance(values, torch.sparse.SparseSemiStructuredTensor):
            raise TypeError("without metadata, from_semi_structured takes a torch.sparse.SparseSemiStructuredTensor, "
                            f"not {type(values).__name__}")
        return values.to_dense()
    return sparse_semi_structured_to_dense_cutlass(values, metadata)
