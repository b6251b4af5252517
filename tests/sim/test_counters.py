"""Tables made of the performance counters."""

import pytest

from hw.arch import get_arch
from hw.top import COUNTERS
from sim.counters import COUNTER_NAMES, MEANING, counters_markdown, traffic_bytes, unit_table


def test_names_are_those_of_the_hardware() -> None:
    assert COUNTER_NAMES == tuple(name for name, _ in COUNTERS)
    assert all(MEANING.values())
    assert counters_markdown().count("\n") == len(COUNTERS) + 2


def test_unit_table() -> None:
    counters = dict.fromkeys(COUNTER_NAMES, 0) | {
        "cycles": 100, "array_busy": 60, "array_wait_weights": 10, "array_blocked": 5, "store_busy": 120,
    }
    rows = {row.unit: row for row in unit_table(counters)}
    assert rows["array"].busy_share == 0.6
    assert rows["array"].waits["wait_weights"] == 10 and rows["array"].waits["blocked"] == 5
    assert rows["array"].idle == 25
    assert rows["store"].idle == 0
    assert unit_table(dict.fromkeys(COUNTER_NAMES, 0))[0].busy_share == 0


def test_traffic() -> None:
    counters = dict.fromkeys(COUNTER_NAMES, 0) | {"read_beats_w": 3, "write_beats": 2}
    traffic = traffic_bytes(counters, get_arch("tiny"))
    assert traffic["w"] == 24 and traffic["write"] == 16 and traffic["a"] == 0


def test_missing_counter() -> None:
    with pytest.raises(KeyError, match="cycles"):
        unit_table({})
