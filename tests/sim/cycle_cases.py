"""Random programs with random memories, and both engines' counts for them."""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiler.compile import compile_network
from compiler.program import Program
from hw.arch import Arch
from hw.isa import FIELDS, INSTRUCTION_BYTES, Instruction, Opcode, Operand, Out, RowOp, Scale
from sim.check import written_addresses
from sim.cycle import CycleRun, run_code
from sim.engine import VerilatorEngine
from sim.memory import MemoryModel
from tests.compiler.random_networks import random_inputs, random_network

__all__ = ["Case", "RtlRun", "compare", "other_waits", "random_case", "random_memory", "run_rtl", "runs_of_instructions"]


@dataclass(frozen=True, eq=False)
class Case:
    """A program, the memory it runs on and what is in it. code, address : the program's instructions, perhaps repeated."""

    program: Program
    memory: MemoryModel
    image: NDArray[np.uint8]
    code: bytes
    address: int


@dataclass(frozen=True, eq=False)
class RtlRun:
    """Counters of the RTL; completed : cycle by storing instruction; wall_s : seconds of the simulation alone."""

    counters: dict[str, int]
    completed: NDArray[np.int64]
    wall_s: float


def random_memory(seed: int, bus_bytes: int) -> MemoryModel:
    """Latencies 1..300, bandwidths from a fraction of the bus to no limit, and stalls in every third case."""
    rng = np.random.default_rng(seed + 1_000_000)
    latency = int(rng.choice([1, 2, 3, 5, int(rng.integers(4, 100)), int(rng.integers(100, 301))]))
    share = float(rng.choice([0, 0, 0, 0.3, 0.5, 0.9, 1.5, 2, 4]))
    return MemoryModel(
        latency=latency,
        bytes_per_cycle=max(1, int(share * bus_bytes)) if share else None,
        stall_probability=float(rng.choice([0.1, 0.25, 0.5, 0.9])) if seed % 3 == 2 else 0.0,
        seed=seed,
    )


def random_case(
    seed: int, arch: Arch, *, ops: int = 6, repeat: int = 1, max_channels: int | None = None, max_rows: int | None = None
) -> Case:
    """The seed's program; its instructions `repeat` times, so that whole passes recur, then with some other waits."""
    network = random_network(seed, arch, ops=ops, max_channels=max_channels, max_rows=max_rows)
    program = compile_network(network, arch)
    image = program.memory_image(random_inputs(np.random.default_rng(seed), network))
    code = program.code[:-INSTRUCTION_BYTES] * repeat + program.code[-INSTRUCTION_BYTES:]
    if repeat > 1 and seed % 2:
        code = other_waits(code, seed)
    address = -(-len(image) // 4096) * 4096
    whole = np.zeros(address + -(-len(code) // arch.bus_bytes) * arch.bus_bytes, np.uint8)
    whole[: len(image)] = image
    whole[address : address + len(code)] = np.frombuffer(code, np.uint8)
    return Case(program, random_memory(seed, arch.bus_bytes), whole, code, address)


def other_waits(code: bytes, seed: int, *, share: float = 1 / 6, farthest: int = 12) -> bytes:
    """The same instructions, of which a share waits for another one, or for none. Only the data suffer."""
    rng = np.random.default_rng(seed)
    field = next(field for field in FIELDS if field.name == "dep")
    offset, mask = sum(other.bits for other in FIELDS[: FIELDS.index(field)]), (1 << field.bits) - 1
    parts = _instructions(code)
    for index in np.flatnonzero(rng.random(len(parts)) < share).tolist():
        word = int.from_bytes(parts[index], "little")
        if Instruction.decode(parts[index]).opcode == Opcode.TILE:
            dep = int(rng.choice([0, 1, rng.integers(1, farthest), (word >> offset & mask) + rng.integers(-2, 3)]))
            word = word & ~(mask << offset) | min(max(dep, 0), index) << offset
        parts[index] = word.to_bytes(INSTRUCTION_BYTES, "little")
    return b"".join(parts)


def runs_of_instructions(code: bytes, seed: int, *, length: int = 200) -> bytes:
    """Up to four instructions of a program that need no others, in runs and in patterns of runs, with other waits: much recurs
    in it, and something else is always on its way. Without HALT; empty if the program has no such instruction."""
    rng = np.random.default_rng(seed)
    alone = [raw for raw in _instructions(code) if _stands_alone(Instruction.decode(raw))]
    if not alone:
        return b""
    chosen, parts = [alone[index] for index in rng.integers(len(alone), size=rng.integers(1, 5))], list[bytes]()
    while len(parts) < length:
        pattern = [chosen[index] for index in rng.integers(len(chosen), size=rng.choice([1, 1, 2, 3, 4]))]
        parts += pattern * int(rng.integers(1, rng.choice([10, 40])))
    share, farthest = float(rng.choice([0, 1 / 40, 1 / 8, 1 / 2])), int(rng.choice([3, 12, 60]))
    return other_waits(b"".join(parts), seed, share=share, farthest=farthest)


def _instructions(code: bytes) -> list[bytes]:
    return [code[at : at + INSTRUCTION_BYTES] for at in range(0, len(code), INSTRUCTION_BYTES)]


def _stands_alone(instruction: Instruction) -> bool:
    """A TILE that neither leaves rows, scales or columns for others nor takes any."""
    return (instruction.opcode == Opcode.TILE and instruction.out != Out.LANES and instruction.operand == Operand.MEMORY
            and instruction.scale != Scale.ROW and instruction.row_op not in (RowOp.MAX, RowOp.EXP))


def run_rtl(case: Case) -> RtlRun:
    """Run a case on Verilator."""
    with VerilatorEngine(case.program.arch, case.image.copy(), model=case.memory, log_writes=True) as engine:
        start = time.perf_counter()
        result = engine.run(
            code_address=case.address, instructions=len(case.code) // INSTRUCTION_BYTES, max_cycles=1 << 40
        )
        seconds = time.perf_counter() - start
        times = engine.harness.write_times()
    sizes = [len(written_addresses(instruction, case.program.arch)) for instruction in case.program.instructions]
    ends = np.cumsum([size for size in sizes * (len(case.code) // len(case.program.code) + 1) if size])
    stored = ends[: np.searchsorted(ends, times.logged[-1], "right") if len(times.logged) else 0]
    return RtlRun(result.counters, times.cycle[np.searchsorted(times.logged, stored)] - result.statistics.started, seconds)


def compare(case: Case, rtl: RtlRun, *, skip: bool = True) -> tuple[CycleRun, dict[str, tuple[int, int]]]:
    """The cycle engine's run, and what differs: name to its value and the RTL's."""
    run = run_code(case.code, case.program.arch, case.memory, address=case.address, skip=skip)
    different = {name: (value, rtl.counters[name]) for name, value in run.counters.items() if value != rtl.counters[name]}
    if not np.array_equal(run.completed, rtl.completed):
        different["completed"] = (int(run.completed.sum()), int(rtl.completed.sum()))
    return run, different
