"""Cycles of operators from the times of their writes."""

import numpy as np
import pytest

from compiler.compile import compile_network
from compiler.program import Program
from sim.check import written_addresses
from sim.harness import WriteTimes
from sim.memory import MemoryModel
from sim.simulate import simulate
from sim.timing import completion_cycles, operator_cycles
from tests.sim.small_network import random_input, small_network


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_network(small_network(), "tiny")


def test_from_given_times(program: Program) -> None:
    sizes = [len(written_addresses(instruction, program.arch)) for instruction in program.instructions]
    storing = [index for index, size in enumerate(sizes) if size]
    logged = np.cumsum([sizes[index] for index in storing])
    cycle = 1000 + 10 * np.arange(1, len(storing) + 1)
    done = completion_cycles(program, WriteTimes(logged, cycle), started=1000)
    assert done == {index: 10 * (place + 1) for place, index in enumerate(storing)}
    spent = operator_cycles(program, WriteTimes(logged, cycle), 1000, 10 * len(storing) + 7)
    first, second = program.operators
    owned = [sum(1 for index in storing if any(a <= index < b for a, b in op.spans)) for op in (first, second)]
    assert spent == {"first": 10 * owned[0], "second": 10 * owned[1] + 7}


def test_an_incomplete_log_gives_nothing(program: Program) -> None:
    empty = WriteTimes(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert completion_cycles(program, empty, 0) == {} and operator_cycles(program, empty, 0, 9) == {}
    short = WriteTimes(np.array([8]), np.array([5]))
    assert completion_cycles(program, short, 0) == {}


def test_of_a_run(program: Program) -> None:
    for memory in (MemoryModel(), MemoryModel(latency=3, stall_probability=0.2, seed=1)):
        run = simulate(program, random_input(), memory=memory)
        assert sum(run.operator_cycles.values()) == run.cycles and min(run.operator_cycles.values()) > 0
    assert simulate(program, random_input(), check=False).operator_cycles == {}
