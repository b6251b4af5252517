"""The memory model's description."""

import pytest

from sim.memory import MemoryModel


def test_defaults() -> None:
    model = MemoryModel()
    assert (model.latency, model.bytes_per_cycle, model.stall_probability, model.seed) == (64, None, 0.0, 0)
    assert model.bandwidth(32) == 32
    assert MemoryModel(bytes_per_cycle=5).bandwidth(32) == 5
    assert model.to_dict() == {"latency": 64, "bytes_per_cycle": None, "stall_probability": 0.0, "seed": 0}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("latency", 0, r"MemoryModel.latency must be in 1..100000, not 0"),
        ("latency", 1.5, r"MemoryModel.latency must be an int, not 1.5"),
        ("latency", None, r"MemoryModel.latency must be an int, not None"),
        ("bytes_per_cycle", 0, r"MemoryModel.bytes_per_cycle must be in 1..1048576, not 0"),
        ("bytes_per_cycle", True, r"MemoryModel.bytes_per_cycle must be an int, not True"),
        ("stall_probability", 1.0, r"MemoryModel.stall_probability must be in 0..0.95, not 1.0"),
        ("stall_probability", float("nan"), r"MemoryModel.stall_probability must be in 0..0.95, not nan"),
        ("stall_probability", "much", r"MemoryModel.stall_probability must be a float, not 'much'"),
        ("seed", -1, r"MemoryModel.seed must be in 0..2\^64-1, not -1"),
    ],
)
def test_bad_values(field: str, value: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MemoryModel(**{field: value})  # type: ignore[arg-type]
