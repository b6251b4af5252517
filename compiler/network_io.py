"""A `QuantNetwork` as bytes and back: JSON for the structure, one block of raw little-endian arrays beside
it. No pickle."""

import hashlib
import json
from collections.abc import Sequence
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

__all__ = ["ArrayPool", "network_from_bytes", "network_to_bytes", "share_arrays"]

_TYPES = {
    kind.__name__: kind
    for kind in (
        Attention, Conv, LayerNorm, Linear, MatMul, MaxPool, Pointwise, Product, QuantTensor, Rearrange, Requant, ResidualInput,
        RowSource, ScoreBias, Softmax, Transpose, Window,
    )  # fmt: skip
}
_DTYPES = ("int8", "int16", "int32", "int64", "uint8")


class ArrayPool:
    """Arrays one behind the other; equal bytes are stored once."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._places: dict[bytes, int] = {}

    def add(self, array: NDArray[np.integer]) -> int:
        """Where the array's bytes begin, little-endian."""
        raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        place = self._places.setdefault(hashlib.sha256(raw).digest(), len(self._blob))
        if place == len(self._blob):
            self._blob += raw
        return place

    def to_bytes(self) -> bytes:
        return bytes(self._blob)


def network_to_bytes(network: QuantNetwork, pool: ArrayPool | None = None) -> tuple[bytes, bytes]:
    """(JSON, arrays). Deterministic. ``pool``: put the arrays there, for several networks; then without arrays."""
    blob = ArrayPool() if pool is None else pool
    body = {
        "tensors": [_plain(tensor, blob) for tensor in network.tensors.values()],
        "ops": [_plain(op, blob) for op in network.ops],
        "inputs": list(network.inputs),
        "outputs": list(network.outputs),
        "constants": [[name, _plain(values, blob)] for name, values in network.constants.items()],
        "meta": dict(network.meta),
    }
    return json.dumps(body, indent=1, sort_keys=True).encode(), blob.to_bytes() if pool is None else b""


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


def share_arrays(networks: Sequence[Sequence[QuantNetwork]]) -> list[list[QuantNetwork]]:
    """The same networks, of which equal arrays lie in memory once."""
    pool = ArrayPool()
    structures = [[network_to_bytes(network, pool)[0] for network in those] for those in networks]
    arrays = pool.to_bytes()
    return [[network_from_bytes(structure, arrays) for structure in those] for those in structures]


def _plain(value: Any, blob: ArrayPool) -> Any:
    """JSON form of a field; arrays go to the pool."""
    if isinstance(value, NM):
        return {"type": "NM", "pattern": str(value)}
    if isinstance(value, np.ndarray):
        if value.dtype.name not in _DTYPES:
            raise TypeError(f"a network holds integer arrays, not {value.dtype}")
        return {"type": "array", "dtype": value.dtype.name, "shape": list(value.shape), "at": blob.add(value)}
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
