import json
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from compiler.network_io import network_from_bytes, network_to_bytes
from hw.arch import PRESETS
from tests.compiler.random_networks import random_network

TINY = PRESETS["tiny"]


def _assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        assert_array_equal(one, other)
    elif is_dataclass(one):
        for item in fields(one):
            _assert_same(getattr(one, item.name), getattr(other, item.name))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            _assert_same(left, right)
    else:
        assert one == other


@pytest.mark.parametrize("seed", range(8))
def test_round_trip(seed: int) -> None:
    network = random_network(seed, TINY)
    structure, arrays = network_to_bytes(network)
    again = network_from_bytes(structure, arrays)
    _assert_same(again, network)
    assert network_to_bytes(again) == (structure, arrays)


def test_only_integer_arrays() -> None:
    network = random_network(0, TINY)
    linear = next(op for op in network.ops if hasattr(op, "weight"))
    wrong = replace(network, ops=(replace(linear, weight=linear.weight.astype(np.float32)),))
    with pytest.raises(TypeError, match="integer arrays, not float32"):
        network_to_bytes(wrong)


def test_damage_is_an_error() -> None:
    structure, arrays = network_to_bytes(random_network(0, TINY))
    for change, message in (
        (("Linear", "Nothing"), "unknown type 'Nothing'"),
        (('"int8"', '"object"'), "unknown array dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            network_from_bytes(structure.replace(change[0].encode(), change[1].encode()), arrays)
    with pytest.raises(ValueError, match="buffer"):
        network_from_bytes(structure, arrays[:10])
    body = json.loads(structure)
    del body["inputs"]
    with pytest.raises(KeyError, match="inputs"):
        network_from_bytes(json.dumps(body).encode(), arrays)
