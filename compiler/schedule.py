"""The order of instructions: by operator, or by cost.

Every unit of the accelerator takes its instructions in program order, so the order decides what overlaps. One operator after
the other is right where matmuls dominate. Where softmax, norms and stores take as long as the matmuls, their instructions
belong between those of other rows: `by_cost` picks, step by step, the task that keeps the array busiest on a coarse model of
the machine, and `schedule` keeps the better of both orders by that model.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from compiler.listing import Bound, bound
from compiler.steps import Region, Step, pipelined
from hw.arch import Arch
from hw.isa import Instruction, Operand, Out, Residual, RowOp, Source

__all__ = ["Order", "Task", "by_cost", "by_operator", "estimate", "schedule"]

Order = Literal["cost", "operator"]

READ_LATENCY = 90
"""Cycles from the completion of what an instruction waits for to its first column, at the default memory latency."""
WRITE_LATENCY = 90
"""Cycles from a tile's last column to its completion."""
NORM_LATENCY = 25
WIDTH = 12
"""Tasks that `by_cost` compares at each step."""

_COSTLY = ("source", "operand", "format", "n", "m", "k", "cols", "out", "residual", "psum_out")


@dataclass(frozen=True, eq=False)
class Task:
    """Steps that belong together: they stay in a row. `close`, the product with the values after a softmax (`steps`), may
    come later: softmaxes and their products alternate in the same order."""

    steps: tuple[Step, ...]
    close: tuple[Step, ...] = ()

    @cached_property
    def reads(self) -> frozenset[Region]:
        return frozenset(region for step in (*self.steps, *self.close) for region in step.reads)

    @cached_property
    def writes(self) -> frozenset[Region]:
        return frozenset(region for step in (*self.steps, *self.close) for region in step.writes)

    @cached_property
    def row_columns(self) -> int:
        """Columns of its row operation, 0 without one."""
        return max((step.fields["cols"] for step in self.steps if step.fields.get("row_op")), default=0)

    @cached_property
    def uses_array(self) -> bool:
        return any(step.fields.get("source", Source.ARRAY) == Source.ARRAY for step in self.steps)

    @cached_property
    def row_operations(self) -> int:
        return sum(bool(step.fields.get("row_op")) for step in self.steps)


def schedule(tasks: Sequence[Task], arch: Arch, *, depth: int, order: Order = "cost") -> list[Step]:
    """Put the steps of tasks, which come in the order of their dependences, in the order in which they run.

    Parameters
    ----------
    depth
        Attention: how many softmaxes are ahead of their products with the values.
    order
        "operator" keeps the order of the tasks; "cost" keeps it only if `by_cost` is no better on the model.
    """
    plain = by_operator(tasks, depth=depth)
    if order == "operator":
        return plain
    mixed = by_cost(tasks, arch, depth=depth)
    return mixed if estimate(mixed, arch) < estimate(plain, arch) else plain


def by_operator(tasks: Sequence[Task], *, depth: int) -> list[Step]:
    """The tasks as they come, softmaxes ahead of their products."""
    steps: list[Step] = []
    run: list[Task] = []
    for task in (*tasks, Task(())):
        if task.close:
            run.append(task)
            continue
        steps += pipelined([t.steps for t in run], [t.close for t in run], depth=depth)
        run = []
        steps += task.steps
    return steps


def estimate(steps: Iterable[Step], arch: Arch) -> int:
    """Cycles of the steps on the coarse model."""
    machine = _Machine(arch)
    for step in steps:
        machine.run(step)
    return machine.completed


class _Machine:
    """When each unit is free, in cycles; instructions pass the units in order."""

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self._bounds: dict[tuple[int, ...], Bound] = {}
        self.regions: dict[Region, int] = {}
        self.load = self.array = self.post = self.row = self.completed = 0
        self.pending: deque[int] = deque()  # softmax rows: when the first column can go to the lanes
        self.resident: deque[tuple[int, int]] = deque()  # columns in the lanes' ring, and when they are free

    def state(self) -> tuple[object, ...]:
        return self.load, self.array, self.post, self.row, self.completed, tuple(self.pending), tuple(self.resident)

    def restore(self, state: tuple[object, ...]) -> None:
        self.load, self.array, self.post, self.row, self.completed = state[:5]  # type: ignore[assignment]
        self.pending, self.resident = deque(state[5]), deque(state[6])  # type: ignore[call-overload]

    def bound(self, step: Step) -> Bound:
        """Least busy cycles of a step's units."""
        f = step.fields
        key = tuple(f.get(name, 0) for name in _COSTLY)
        if key not in self._bounds:
            self._bounds[key] = bound(Instruction(opcode=step.opcode, **f), self._arch)
        return self._bounds[key]

    def run(self, step: Step, *, keep: bool = True) -> int:
        """Run a step; cycles for which the array stood still because of it. `keep`: others may wait for what it writes."""
        f, cost = step.fields, self.bound(step)
        known = [self.regions[region] for region in step.reads if region in self.regions]
        ready = max(known, default=-READ_LATENCY) + READ_LATENCY
        before, first, last = self.array, ready, ready
        source = f.get("source", Source.ARRAY)
        if source == Source.ARRAY:
            first, last = self._array(step, cost, ready)
        elif source == Source.STREAM:
            self.load = max(self.load, ready) + cost.load
            first = last = self.load - cost.load
        columns = cost.post * (2 if f.get("residual", 0) == Residual.INT16 else 1)
        if not f.get("row_op"):
            columns = max(columns, cost.store)
        self.post = max(max(self.post, first) + columns, last + min(cost.post, self._arch.lanes))
        if source == Source.ARRAY:  # one tile may wait in the shadow registers
            self.array = max(self.array, self.post - 2 * self._arch.lanes)
        done = self._row(step, cost)
        if f.get("out", Out.NONE) in (Out.STORE8, Out.STORE16, Out.STORE8T):
            self.completed = max(self.completed, done + WRITE_LATENCY)
        if keep:
            self.regions.update(dict.fromkeys(step.writes, self.completed))
        return self.array - before - cost.array

    def _array(self, step: Step, cost: Bound, ready: int) -> tuple[int, int]:
        """Load and multiply: when the first and the last column tile are done."""
        f = step.fields
        room = max(0, self._arch.lane_depth - f["k"])
        start = max(self.load, ready)
        if f.get("operand") == Operand.ROWS:
            start = max(self.load, self.pending.popleft() if self.pending else 0)
        while self.resident and sum(k for k, _ in self.resident) > room:
            start = max(start, self.resident.popleft()[1] - cost.load)
        self.load = start + cost.load
        tile = cost.array // -(-f["cols"] // self._arch.lanes)
        begin = max(self.array, start + 8, ready if f.get("w_dep") else 0)
        first = max(begin + tile, self.load + 4)
        self.array = max(begin + cost.array, first + cost.array - tile)
        self.resident.append((f["k"], self.array))
        return first, self.array

    def _row(self, step: Step, cost: Bound) -> int:
        """The row unit: when the last column leaves."""
        kind = step.fields.get("row_op", RowOp.NONE)
        if kind in (RowOp.SOFTMAX, RowOp.EXP):
            self.pending.append(max(self.post, self.row) + 8)
            self.row = max(self.post, self.row) + cost.post
        elif kind in (RowOp.LAYERNORM, RowOp.RMSNORM):
            self.row = max(self.post + self._arch.rows + NORM_LATENCY, self.row) + cost.post
            return self.row
        return self.post


@dataclass(eq=False)
class _Queue:
    """Tasks whose producers have been scheduled, most urgent first."""

    urgency: list[int]
    heap: list[tuple[int, int]] = field(default_factory=list)

    def add(self, number: int) -> None:
        heapq.heappush(self.heap, (-self.urgency[number], number))

    def head(self, count: int) -> list[int]:
        return [number for _, number in heapq.nsmallest(count, self.heap)]

    def remove(self, number: int) -> None:
        self.heap.remove((-self.urgency[number], number))
        heapq.heapify(self.heap)


def by_cost(tasks: Sequence[Task], arch: Arch, *, depth: int) -> list[Step]:
    """List scheduling: of the most urgent tasks that may run, the one that keeps the array waiting the least."""
    return _Scheduler(tasks, arch, depth).run()


class _Scheduler:
    def __init__(self, tasks: Sequence[Task], arch: Arch, depth: int) -> None:
        self._tasks, self._arch, self._depth = tasks, arch, depth
        self._machine = _Machine(arch)
        self._followers: list[list[int]] = [[] for _ in tasks]
        self._missing = [0] * len(tasks)
        self._link()
        urgency = self._urgency()
        self._matmuls, self._others = _Queue(urgency), _Queue(urgency)
        self._open: deque[Task] = deque()  # softmaxes whose products have not been issued
        self._in_slot = 0  # columns of row operations since the last softmax or product
        self._steps: list[Step] = []
        for number, missing in enumerate(self._missing):
            if not missing:
                self._queue(number).add(number)

    def run(self) -> list[Step]:
        while self._matmuls.heap or self._others.heap or self._open:
            self._issue_others()
            best, stall = self._best(self._matmuls.head(WIDTH))
            if self._open and (best is None or not self._keeps_closing_late(best, stall)):
                self._close()
            elif best is not None:
                self._issue(best)
            elif self._others.heap:
                self._issue(self._others.head(1)[0])
        return self._steps

    # -- choices ---------------------------------------------------------------------------------------------

    def _issue_others(self) -> None:
        """Issue tasks without matmul that cost the array nothing: their columns pass while it is busy."""
        while True:
            for number in self._others.head(WIDTH):
                if self._fits(self._tasks[number]) and self._hidden(number):
                    self._issue(number)
                    break
            else:
                return

    def _hidden(self, number: int) -> bool:
        """Whether what comes next does not wait for the task."""
        machine, state = self._machine, self._machine.state()
        after = self._open[0].close if self._open else ()
        following = after or next((self._tasks[n].steps for n in self._matmuls.head(1)), ())
        without = sum(machine.run(step, keep=False) for step in following)
        machine.restore(state)
        for step in self._tasks[number].steps:
            machine.run(step, keep=False)
        with_it = sum(machine.run(step, keep=False) for step in following)
        late = machine.array
        machine.restore(state)
        work = sum(machine.bound(step).post for step in self._tasks[number].steps)
        return not following or (with_it - without <= work // 4 and late >= 0)

    def _best(self, numbers: Sequence[int]) -> tuple[int | None, int]:
        best, least = None, 0
        for number in numbers:
            task = self._tasks[number]
            if not self._fits(task):
                continue
            stall = self._stall(task.steps)
            if best is None or stall < least:
                best, least = number, stall
                if stall <= 0:
                    break
        return best, least

    def _fits(self, task: Task) -> bool:
        """Whether a task may stand between a softmax and its product.

        The product loads the probabilities after what has been issued before it, and they leave the row unit before any
        later row: one more row operation fits beside them, if its columns do.
        """
        if not self._open:
            return True
        if task.close:
            return len(self._open) <= self._depth and not self._in_slot
        if len(self._open) > 1 or task.row_operations > 1:
            return False
        columns = task.row_columns
        return not columns or (not self._in_slot and columns + self._open[0].row_columns <= self._arch.row_depth)

    def _keeps_closing_late(self, best: int, stall: int) -> bool:
        """Whether to issue a task before the next product: if its row is not ready, or the next softmax is to be ahead."""
        if self._tasks[best].close:
            return len(self._open) <= self._depth
        return stall < self._stall(self._open[0].close)

    def _stall(self, steps: Sequence[Step]) -> int:
        state = self._machine.state()
        stall = sum(self._machine.run(step, keep=False) for step in steps)
        self._machine.restore(state)
        return stall

    # -- bookkeeping -----------------------------------------------------------------------------------------

    def _issue(self, number: int) -> None:
        task = self._tasks[number]
        self._queue(number).remove(number)
        self._emit(task.steps)
        if task.close:
            self._open.append(task)
            self._in_slot = 0
        else:
            self._in_slot += task.row_columns if self._open else 0
            self._finish(number)

    def _close(self) -> None:
        task = self._open.popleft()
        self._emit(task.close)
        self._in_slot = 0
        self._finish(self._numbers[id(task)])

    def _emit(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._machine.run(step)
            self._steps.append(step)

    def _finish(self, number: int) -> None:
        for follower in self._followers[number]:
            self._missing[follower] -= 1
            if not self._missing[follower]:
                self._queue(follower).add(follower)

    def _queue(self, number: int) -> _Queue:
        return self._matmuls if self._tasks[number].uses_array else self._others

    def _link(self) -> None:
        """Tasks wait for all tasks before them that write what they read."""
        writers: dict[Region, list[int]] = {}
        self._numbers = {id(task): number for number, task in enumerate(self._tasks)}
        for number, task in enumerate(self._tasks):
            producers = {writer for region in task.reads for writer in writers.get(region, ())}
            self._missing[number] = len(producers)
            for producer in producers:
                self._followers[producer].append(number)
            for region in task.writes:
                writers.setdefault(region, []).append(number)

    def _urgency(self) -> list[int]:
        """Cycles from a task's start to the end of the program along the longest chain of dependences."""
        urgency = [0] * len(self._tasks)
        for number in reversed(range(len(self._tasks))):
            task = self._tasks[number]
            bounds = [self._machine.bound(step) for step in (*task.steps, *task.close)]
            own = sum(max(cost.array, cost.post) for cost in bounds) + READ_LATENCY + WRITE_LATENCY
            urgency[number] = own + max((urgency[follower] for follower in self._followers[number]), default=0)
        return urgency
