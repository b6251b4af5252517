from collections import deque

import pytest

from compiler.compile import compile_network
from compiler.emit import Emitter
from compiler.lower import choose_layouts, emit_tasks, lower
from compiler.program import Program
from compiler.schedule import ORDERS, Order, Task, by_operator, estimate, schedule
from compiler.steps import Constants, Step
from hw.arch import PRESETS
from hw.isa import Operand, Out, RowOp
from tests.compiler.random_networks import random_network
from tests.compiler.random_rows import random_rows

TINY = PRESETS["tiny"]


def _tasks(seed: int, *, rows: bool = False) -> list[Task]:
    network = random_rows(seed, TINY) if rows else random_network(seed, TINY, ops=8, max_batch=4)
    emitter = Emitter(TINY, Constants(TINY), choose_layouts(network, TINY))
    return emit_tasks(emitter, network)


@pytest.mark.parametrize("seed", [*range(20), 207])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_every_step_once_and_after_what_it_reads(seed: int, rows: bool, order: Order) -> None:
    """207: a softmax of a softmax, whose exponentials must not overtake the shares that they read."""
    tasks = _tasks(seed, rows=rows)
    steps = schedule(tasks, TINY, depth=1 + seed % 2 if rows else seed % 3, order=order)
    given = [step for task in tasks for step in (*task.steps, *task.close)]
    assert sorted(map(id, steps)) == sorted(map(id, given))
    place = {id(step): i for i, step in enumerate(steps)}
    writers: dict[object, list[Step]] = {}
    for step in given:  # the tasks come in the order of their dependences
        for region in step.reads:
            assert all(place[id(writer)] < place[id(step)] for writer in writers.get(region, ()))
        for region in step.writes:
            writers.setdefault(region, []).append(step)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("order", ORDERS)
def test_products_take_the_rows_in_order_and_at_most_one_row_comes_between(seed: int, order: Order) -> None:
    rows: deque[int] = deque()
    between = 0
    for step in schedule(_tasks(seed), TINY, depth=1, order=order):
        f = step.fields
        if f.get("operand") == Operand.ROWS:
            assert f["k"] == rows.popleft()
            between = 0
        elif f.get("out") == Out.LANES:
            rows.append(f["cols"])
            assert len(rows) <= 2
        elif rows and f.get("row_op") not in (None, RowOp.MAX):
            between += 1
            assert between == 1 and len(rows) == 1
    assert not rows


def test_chains_with_partial_sums_stay_in_a_row() -> None:
    for seed in range(20):
        steps = schedule(_tasks(seed), TINY, depth=1, order="loose")
        assert all(after.fields.get("psum_in") for step, after in zip(steps, steps[1:], strict=False)
                   if step.fields.get("psum_out"))


def test_cost_takes_the_best_order_of_the_model() -> None:
    for seed in range(10):
        tasks = _tasks(seed)
        cycles = {order: estimate(schedule(tasks, TINY, depth=1, order=order), TINY) for order in (*ORDERS, "cost")}
        assert cycles["cost"] == min(cycles.values())
        assert cycles["operator"] == estimate(by_operator(tasks, depth=1), TINY)


def test_measure_decides() -> None:
    """With a measure of its own, compilation keeps the program it likes best."""
    network, seen = random_network(3, TINY, ops=8, max_batch=3), []

    def measure(program: Program) -> int:
        seen.append(program.code)
        return -len(seen)

    program = compile_network(network, TINY, measure=measure)
    assert len(seen) == len(ORDERS)
    assert program.code == seen[-1]


def test_very_long_programs_keep_the_order_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing tasks would take hours for the 740,000 instructions of a network with dynamic kernels."""
    network = random_network(3, TINY, ops=8, max_batch=4)
    by_order = lower(network, TINY, orders=ORDERS)
    assert len(by_order) == len(ORDERS)
    monkeypatch.setattr("compiler.schedule.MOST_STEPS", 1)
    (plain,) = lower(network, TINY, orders=ORDERS)
    assert plain.code == by_order[ORDERS.index("operator")].code
