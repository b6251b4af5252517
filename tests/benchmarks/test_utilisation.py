"""Cycles of whole encoder layers do not rise: they are exact, so the limits are the measured numbers."""

import pytest

from benchmarks.utilisation import gemv_program, mixed
from benchmarks.workloads import WORKLOADS, compile_workload
from sim.cycle import run_cycles
from sim.memory import MemoryModel

EACH_WAY = MemoryModel(bytes_per_cycle=128)


@pytest.mark.parametrize(("name", "pattern", "shared", "each_way"), [
    ("bert-128", None, 911_895, 910_973),
    ("bert-128", "2:4", 470_321, 468_721),
    ("bert-128", "2:8", 250_307, 247_549),
    ("bert-128", "1:8", 147_163, 138_505),
    ("deit-t", None, 840_926, 839_720),
    ("deit-t", "2:4", 500_965, 495_618),
    ("deit-t", "2:8", 367_336, 326_578),
    ("deit-t", "1:8", 302_583, 264_162),
    ("minilm-32", "2:4", 232_724, 231_082),
    ("minilm-32", "1:8", 80_766, 70_750),
    ("minilm-128", "1:8", 384_099, 349_509),
])  # fmt: skip
def test_cycles_of_a_layer_on_sta1024(name: str, pattern: str | None, shared: int, each_way: int) -> None:
    program, _ = compile_workload(WORKLOADS[name], pattern, "sta1024")
    assert run_cycles(program).cycles <= shared
    assert run_cycles(program, EACH_WAY).cycles <= each_way


def test_mixed_patterns_reach_nine_tenths_of_the_ideal() -> None:
    dense, _ = compile_workload(WORKLOADS["bert-128"], None, "sta1024")
    program, ideal = mixed(WORKLOADS["bert-128"], "sta1024")
    speed_up = run_cycles(dense).cycles / run_cycles(program).cycles
    assert 0.9 * ideal <= speed_up <= ideal


@pytest.mark.parametrize("pattern", [None, "1:8"])
def test_matrix_times_vector_uses_the_bandwidth(pattern: str | None) -> None:
    program, _ = gemv_program(2048, pattern)
    counters = run_cycles(program).counters
    assert sum(count for name, count in counters.items() if "beats" in name) >= 0.9 * counters["cycles"]


def test_a_run_is_accounted_for() -> None:
    """The array's cycles: it works, it waits for one of three reasons, or it has nothing to do."""
    program, _ = compile_workload(WORKLOADS["minilm-32"], "2:4", "sta1024")
    c = run_cycles(program).counters
    waits = c["array_wait_weights"] + c["array_wait_columns"] + c["array_blocked"]
    assert c["array_busy"] >= program.ideal_cycles
    assert c["array_busy"] + waits <= c["cycles"]
