"""When each operator's results were in memory: how the cycles of a run spread over the network."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from compiler.program import Program
from sim.check import written_addresses
from sim.harness import WriteTimes

__all__ = ["completion_cycles", "cycles_by_operator", "operator_cycles"]


def completion_cycles(program: Program, times: WriteTimes, started: int) -> dict[int, int]:
    """Cycle, counted from the start, in which the last byte of each storing instruction had reached the memory.

    Writes are answered in the order of the instructions, so instruction i is complete when as many bytes are logged as
    the instructions up to i write.
    """
    sizes = [(index, len(written_addresses(instruction, program.arch)))
             for index, instruction in enumerate(program.instructions)]
    storing = [(index, size) for index, size in sizes if size]
    ends: NDArray[np.int64] = np.cumsum([size for _, size in storing], dtype=np.int64)
    if not len(ends) or not len(times.logged) or times.logged[-1] < ends[-1]:
        return {}
    found = times.cycle[np.searchsorted(times.logged, ends)] - started
    return {index: int(cycle) for (index, _), cycle in zip(storing, found, strict=True)}


def operator_cycles(program: Program, times: WriteTimes, started: int, cycles: int) -> dict[str, int]:
    """`cycles_by_operator` from the times of a log."""
    return cycles_by_operator(program, completion_cycles(program, times, started), cycles)


def cycles_by_operator(program: Program, completed: Mapping[int, int], cycles: int) -> dict[str, int]:
    """Cycles by operator name, in the network's order; their sum is `cycles`. completed : cycle by storing instruction.

    An instruction is charged with the time from the completion of the storing instruction before it to its own. Operators
    overlap, so the figure says by how much an operator delayed the end, not how long it was in flight. The first one carries
    the start-up, the last one the end of the run.
    """
    owners = {index: operator.name for operator in program.operators
              for start, stop in operator.spans for index in range(start, stop)}
    spent = {operator.name: 0 for operator in program.operators}
    before, last = 0, None
    for index, cycle in completed.items():
        last = owners.get(index)
        if last is not None:
            spent[last] += cycle - before
            before = cycle
    if last is None:
        return {}
    spent[last] += cycles - before
    return spent
