"""A `QuantNetwork` as bytes and back: JSON for the structure, one block of raw little-endian arrays beside
it. No pickle."""

import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from algo.nm import NM
from compiler.ops import (
    Attention,
    Conv,
    LayerNorm,
    Linear,
    MatMul,
    MaxPool,
    Pointwise,
    Product,
    QuantNetwork,
    QuantTensor,
    Rearrange,
    Requant,
    ResidualInput,
    RowSource,
    ScoreBias,
    Softmax,
    Transpose,
    Window,
)

__all__ = ["network_from_bytes", "network_to_bytes"]

_TYPES = {
    kind.__name__: kind
    for kind in (
        Attention, Conv, LayerNorm, Linear, MatMul, MaxPool, Pointwise, Product, QuantTensor, Rearrange, Requant, ResidualInput,
        RowSource, ScoreBias, Softmax, Transpose, Window,
    )  # fmt: skip
}
_DTYPES = ("int8", "int16", "int32", "int64", "uint8")


def network_to_bytes(network: QuantNetwork) -> tuple[bytes, bytes]:
    """(JSON, arrays). Deterministic."""
    blob = bytearray()
    body = {
        "tensors": [_plain(tensor, blob) for tensor in network.tensors.values()],
        "ops": [_plain(op, blob) for op in network.ops],
        "inputs": list(network.inputs),
        "outputs": list(network.outputs),
        "constants": [[name, _plain(values, blob)] for name, values in network.constants.items()],
        "meta": dict(network.meta),
    }
    return json.dumps(body, indent=1, sort_keys=True).encode(), bytes(blob)


def network_from_bytes(structure: bytes, arrays: bytes) -> QuantNetwork:
    """Inverse of `network_to_bytes`.

    Raises
    ------
    ValueError, KeyError, TypeError
        The structure is damaged.
    """
    body = json.loads(structure)
    tensors = [_value(item, arrays) for item in body["tensors"]]
    return QuantNetwork(
        tensors={tensor.name: tensor for tensor in tensors},
        ops=tuple(_value(item, arrays) for item in body["ops"]),
        inputs=tuple(body["inputs"]),
        outputs=tuple(body["outputs"]),
        constants={name: _value(item, arrays) for name, item in body["constants"]},
        meta=dict(body["meta"]),
    )


def _plain(value: Any, blob: bytearray) -> Any:
    """JSON form of a field; arrays go to the end of the blob."""
    if isinstance(value, NM):
        return {"type": "NM", "pattern": str(value)}
    if isinstance(value, np.ndarray):
        if value.dtype.name not in _DTYPES:
            raise TypeError(f"a network holds integer arrays, not {value.dtype}")
        entry = {"type": "array", "dtype": value.dtype.name, "shape": list(value.shape), "at": len(blob)}
        blob += np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
        return entry
    if is_dataclass(value):
        return {
            "type": type(value).__name__,
            **{f.name: _plain(getattr(value, f.name), blob) for f in fields(value)},
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, blob) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _value(item: Any, arrays: bytes) -> Any:
    if isinstance(item, list):
        return tuple(_value(part, arrays) for part in item)
    if not isinstance(item, dict):
        return item
    values = dict(item)
    kind = values.pop("type")
    if kind == "NM":
        return NM(values["pattern"])
    if kind == "array":
        return _array(values, arrays)
    if kind not in _TYPES:
        raise ValueError(f"unknown type {kind!r}")
    return _TYPES[kind](**{name: _value(part, arrays) for name, part in values.items()})


def _array(entry: dict[str, Any], arrays: bytes) -> NDArray[np.integer]:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"unknown array dtype {entry['dtype']!r}")
    dtype, count = np.dtype(entry["dtype"]).newbyteorder("<"), int(np.prod(entry["shape"], dtype=np.int64))
    return np.frombuffer(arrays, dtype, count, entry["at"]).reshape(entry["shape"])
