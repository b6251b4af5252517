"""The order of instructions: by operator, or by cost.

Every unit of the accelerator takes its instructions in program order, so the order decides what overlaps. One operator after
the other is right where matmuls dominate. Where softmax, norms and stores take as long as the matmuls, their instructions
belong between those of other rows: `by_cost` picks, step by step, the task that keeps the array busiest on a coarse model of
the machine and puts the others' post-processing into the time that products with the values leave to it. `schedule` keeps
the better of both orders by that model.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Literal

from compiler.listing import Bound, bound
from compiler.steps import Region, Step, pipelined
from hw.arch import Arch
from hw.isa import Instruction, Operand, Out, RowOp, Source

__all__ = ["MOST_STEPS", "ORDERS", "Order", "Task", "by_cost", "by_operator", "estimate", "schedule", "worth_choosing"]

Order = Literal["cost", "operator", "tight", "loose"]
ORDERS: tuple[Order, ...] = ("operator", "tight", "loose")
"""The orders among which "cost" chooses."""

READ_LATENCY = 450
"""Cycles from the completion of what an instruction waits for to its first column: the memory's latency, and the bursts of
other streams that have been requested before (up to 32 of 16 beats)."""
WRITE_LATENCY = 90
"""Cycles from a tile's last column to its completion."""
NORM_LATENCY = 25
AHEAD = 128
"""Cycles by which the readers run ahead of the array."""
SLACK = {"tight": 4, "loose": 10}
"""How long, in drains of a column tile, the array may wait for a task that is put before a product."""
RANK = {"tight": 2, "loose": 6}
"""How long the post unit may wait for a task rather than for the one that is next less urgent."""
WIDTH = 12
"""Tasks that `by_cost` compares at each step."""
MOST_STEPS = 100_000
"""Longer programs keep the order of the operators: comparing tasks would take longer than all else in compiling."""

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
    def row_operations(self) -> int:
        return sum(bool(step.fields.get("row_op")) for step in self.steps)


def worth_choosing(tasks: Iterable[Task]) -> bool:
    """Whether there are few enough steps to compare orders."""
    return sum(len(task.steps) + len(task.close) for task in tasks) <= MOST_STEPS


def schedule(tasks: Sequence[Task], arch: Arch, *, depth: int, order: Order = "cost") -> list[Step]:
    """Put the steps of tasks, which come in the order of their dependences, in the order in which they run.

    Parameters
    ----------
    depth
        Attention: how many softmaxes are ahead of their products with the values.
    order
        "operator" keeps the order of the tasks; "tight" and "loose" are those of `by_cost`; "cost" takes the one of these that
        is best on the model.
    """
    if order == "cost":
        found = [schedule(tasks, arch, depth=depth, order=name) for name in ORDERS]
        return min(found, key=lambda steps: estimate(steps, arch))
    if order == "operator":
        return by_operator(tasks, depth=depth)
    return by_cost(tasks, arch, depth=depth, slack=SLACK[order], rank=RANK[order])


def by_operator(tasks: Sequence[Task], *, depth: int) -> list[Step]:
    """The tasks as they come, softmaxes ahead of their products."""
    steps: list[Step] = []
    run: list[Task] = []
    for task in (*tasks, Task(())):
        if not task.close or not all(earlier.writes.isdisjoint(task.reads) for earlier in run):
            steps += pipelined([t.steps for t in run], [t.close for t in run], depth=depth)
            run = []
        if task.close:
            run.append(task)
        else:
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
        self._waiting = arch.sums_depth + 2 * arch.lanes  # columns between array and post unit, with those in shadow registers
        self._bounds: dict[tuple[int, ...], Bound] = {}
        self.regions: dict[Region, int] = {}
        self.load = self.array = self.post = self.row = self.stored = self.bus = self.completed = 0
        self.pending: deque[int] = deque()  # softmax rows: when the first column can go to the lanes
        self.resident: deque[tuple[int, int]] = deque()  # columns in the lanes' ring, and when they are free

    def stalls(self, steps: Sequence[Step]) -> tuple[int, int]:
        """Cycles for which array and post unit would stand still if the steps came next."""
        units = self.load, self.array, self.post, self.row, self.stored, self.bus, self.completed
        pending, resident = self.pending.copy(), self.resident.copy()
        stall = sum(self.run(step, keep=False) for step in steps)
        idle = self.post - units[2] - sum(self.bound(step).post for step in steps)
        self.load, self.array, self.post, self.row, self.stored, self.bus, self.completed = units
        self.pending, self.resident = pending, resident
        return stall, idle

    def bound(self, step: Step) -> Bound:
        """Least busy cycles of a step's units."""
        f = step.fields
        key = tuple(f.get(name, 0) for name in _COSTLY)
        if key not in self._bounds:
            self._bounds[key] = bound(Instruction(opcode=step.opcode, **f), self._arch)
        return self._bounds[key]

    def columns(self, step: Step, cost: Bound) -> int:
        """Cycles in which its columns pass the post unit."""
        return cost.post if step.fields.get("row_op") else max(cost.post, cost.store)

    def excess(self, steps: Sequence[Step]) -> tuple[int, int]:
        """`stalls`, of the array those beyond the cycles in which it waits for the steps' own post-processing."""
        own = 0
        for step in steps:
            cost = self.bound(step)
            own += max(0, self.columns(step, cost) - self._waiting - cost.array) if cost.array else 0
        stall, idle = self.stalls(steps)
        return stall - own, idle

    def run(self, step: Step, *, keep: bool = True) -> int:
        """Run a step; cycles for which the array stood still because of it. `keep`: others may wait for what it writes."""
        f, cost = step.fields, self.bound(step)
        ready, joined = self._ready(step)
        before, first, last = self.array, ready, ready
        source = f.get("source", Source.ARRAY)
        if source == Source.ARRAY:
            first, last = self._matmul(step, cost, ready)
        else:
            self.bus = max(self.bus, self.post - AHEAD, ready) + cost.fetch
            last = self.bus
            if source == Source.STREAM:  # through the loader, at the pace of the post unit
                first = max(first, self.load)
                self.load = max(self.post, first) + cost.load
        first, last, columns = max(first, joined), max(last, joined), self.columns(step, cost)
        stores = f.get("out", Out.NONE) in (Out.STORE8, Out.STORE16, Out.STORE8T)
        if stores and not f.get("row_op"):  # results leave in order
            first = max(first, self.stored)
        self.post = max(max(self.post, first) + columns, last + min(cost.post, self._arch.lanes))
        if source == Source.ARRAY:
            self.array = max(self.array, self.post - self._waiting)
        done = self._row(step, cost)
        if stores:
            self.stored = done
            self.completed = max(self.completed, done + WRITE_LATENCY)
        if keep:
            self.regions.update(dict.fromkeys(step.writes, self.completed))
        return self.array - before - cost.array

    def _ready(self, step: Step) -> tuple[int, int]:
        """When what a step reads is there: for the array, and, the residual, for the post unit."""
        residual = step.addresses["r_addr"].buffer if "r_addr" in step.addresses else None
        times = [0, 0]
        for region in step.reads:
            if region in self.regions:
                late = region[0] == residual
                times[late] = max(times[late], self.regions[region] + READ_LATENCY)
        return times[0], times[1]

    def _matmul(self, step: Step, cost: Bound, ready: int) -> tuple[int, int]:
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
        self.bus = max(self.bus, begin - AHEAD) + cost.fetch
        first = max(begin + tile, self.load + 4)
        self.array = max(begin + cost.array, first + cost.array - tile, self.bus)
        self.resident.append((f["k"], self.array))
        return first, self.array

    def _row(self, step: Step, cost: Bound) -> int:
        """The row unit: when the last column leaves."""
        kind = step.fields.get("row_op", RowOp.NONE)
        if kind in (RowOp.SOFTMAX, RowOp.EXP):
            self.pending.append(max(self.post, self.row) + 8)
            self.row = max(self.post, self.row) + cost.post
        elif kind in (RowOp.LAYERNORM, RowOp.RMSNORM):
            # probabilities before it leave with the load of their product
            waiting = max(self.load, self.pending[-1]) + cost.post if self.pending else 0
            self.row = max(self.post + self._arch.rows + NORM_LATENCY, self.row, waiting) + cost.post
            return self.row
        return self.post


def by_cost(tasks: Sequence[Task], arch: Arch, *, depth: int, slack: int, rank: int) -> list[Step]:
    """List scheduling: softmaxes as early as they can, and all else between a softmax and its product, where the array has
    work while rows pass through post-processing: first what the softmaxes of this sequence and the next wait for, then what
    is furthest; among those for which the array need not wait, one for which the post unit need not wait either."""
    return _Scheduler(tasks, arch, depth, slack, rank).run()


class _Scheduler:
    def __init__(self, tasks: Sequence[Task], arch: Arch, depth: int, slack: int, rank: int) -> None:
        self._tasks, self._arch, self._depth = tasks, arch, depth
        self._slack, self._rank = slack * arch.lanes, rank * arch.lanes
        self._machine = _Machine(arch)
        self._followers: list[list[int]] = [[] for _ in tasks]
        self._missing = [0] * len(tasks)
        self._link()
        self._key = self._urgency()
        self._ready: list[tuple[int, int]] = []  # tasks whose producers have been issued, by key
        self._next = self._softmax_groups()
        self._open: deque[Task] = deque()  # softmaxes whose products have not been issued
        self._rows = 0  # columns of the row operation between the open softmax and its product
        self._pending: frozenset[Region] = frozenset()  # what that operation's task writes
        self._attentions = sum(bool(task.close) for task in tasks)
        self._plain = len(tasks) - self._attentions
        self._share = 0.0  # of other tasks that are due between softmaxes and products
        self._steps: list[Step] = []
        for number, missing in enumerate(self._missing):
            if not missing:
                insort(self._ready, (self._key[number], number))

    def run(self) -> list[Step]:
        while self._ready or self._open:
            if self._open:
                self._fill()
                self._close()
            else:
                best = min(self._candidates(), key=lambda number: self._machine.excess(self._tasks[number].steps)[0])
                self._issue(best)
        return self._steps

    def _candidates(self, *, softmax: bool | None = None) -> list[int]:
        """The most urgent tasks that may come next: all, only softmaxes, or none of them."""
        first = next((key for key, number in self._ready if self._tasks[number].close), self._ready[0][0] if self._ready else 0)
        soon = bisect_right(self._ready, (self._next.get(first, first), len(self._tasks)))
        order = [number for _, number in self._ready[:soon]] + sorted((n for _, n in self._ready[soon:]), reverse=True)
        wanted = (n for n in order if softmax in (None, bool(self._tasks[n].close)))
        return list(islice((n for n in wanted if self._fits(self._tasks[n])), WIDTH))

    def _fits(self, task: Task) -> bool:
        """Whether a task may stand between a softmax and its product.

        The product loads the probabilities after what has been issued before it, and they leave the row unit before any
        later row, and results are stored in order: one more row operation fits beside them, if its columns do. After it, only
        the next softmax may come before the product, and not if it waits for that row.
        """
        if not self._open:
            return True
        if task.close:
            return len(self._open) <= self._depth and self._pending.isdisjoint(task.reads)
        if self._rows:
            return False
        if len(self._open) > 1 or task.row_operations > 1:
            return False
        columns = task.row_columns
        return not columns or columns + self._open[0].row_columns <= self._arch.row_depth

    def _softmax_groups(self) -> dict[int, int]:
        """Last softmax of the next sequence, for each softmax; one sequence has the same values."""
        groups: list[list[int]] = []
        values = None
        for number, task in enumerate(self._tasks):
            if task.close:
                if not groups or task.close[0].reads != values:
                    groups.append([])
                    values = task.close[0].reads
                groups[-1].append(number)
        return {n: following[-1] for group, following in pairwise([*groups, groups[-1]] if groups else []) for n in group}

    def _fill(self) -> None:
        """Issue the due share of other tasks; if that is no work for the array, the next softmax."""
        self._share += self._plain / max(1, self._attentions)
        filled = False
        while self._share >= 1:
            stalls = [(*self._machine.excess(self._tasks[n].steps), n) for n in self._candidates(softmax=False)]
            free = [(idle, number) for stall, idle, number in stalls if stall <= self._slack]
            if not free:
                break
            best = min((idle + place * self._rank, number) for place, (idle, number) in enumerate(free))[1]
            self._issue(best)
            self._share -= 1
            filled |= any(self._machine.bound(step).array for step in self._tasks[best].steps)
        self._share = min(self._share, 4.0)
        if not filled:
            following = next(iter(self._candidates(softmax=True)), None)
            product, _ = self._machine.stalls(self._open[0].close)
            if following is not None and self._machine.stalls(self._tasks[following].steps)[0] <= product:
                self._issue(following)

    def _issue(self, number: int) -> None:
        task = self._tasks[number]
        self._ready.remove((self._key[number], number))
        self._emit(task.steps)
        if task.close:
            self._attentions -= 1
            self._open.append(task)
        else:
            self._plain -= 1
            if self._open and task.row_columns:
                self._rows, self._pending = task.row_columns, task.writes
            self._finish(number)

    def _close(self) -> None:
        task = self._open.popleft()
        self._emit(task.close)
        self._rows, self._pending = 0, frozenset()
        self._finish(self._numbers[id(task)])

    def _emit(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._machine.run(step)
            self._steps.append(step)

    def _finish(self, number: int) -> None:
        for follower in self._followers[number]:
            self._missing[follower] -= 1
            if not self._missing[follower]:
                insort(self._ready, (self._key[follower], follower))

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
        """Number of the first softmax that waits for each task; the number of tasks if none does."""
        key = [len(self._tasks)] * len(self._tasks)
        for number in reversed(range(len(self._tasks))):
            following = min((key[follower] for follower in self._followers[number]), default=len(self._tasks))
            key[number] = number if self._tasks[number].close else following
        return key
