"""The real accelerator behind its registers (arch tiny)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from compiler.compile import compile_network
from compiler.program import Program
from hw.arch import get_arch
from hw.isa import ErrorCode, Opcode
from sim.counters import COUNTER_NAMES
from sim.engine import AcceleratorError, CycleLimitError, VerilatorEngine
from sim.memory import MemoryModel
from sim.trace import Trace
from tests.sim.small_network import random_input, small_network


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_network(small_network(), "tiny")


@pytest.fixture
def engine(program: Program) -> Iterator[VerilatorEngine]:
    with VerilatorEngine(program.arch, program.memory_image({"x": random_input()}), model=MemoryModel(latency=9)) as made:
        yield made


def run(engine: VerilatorEngine, program: Program, **options: object) -> int:
    return engine.run(
        code_address=program.code_address, instructions=program.instruction_count, max_cycles=100_000, **options
    ).cycles


def test_identity_and_capabilities(engine: VerilatorEngine) -> None:
    assert engine.read("ID").to_bytes(4, "little") == b"NMF1"
    assert engine.read("CAP0") & 0xFF == get_arch("tiny").rows


def test_programs_one_after_the_other(engine: VerilatorEngine, program: Program) -> None:
    first = run(engine, program)
    before = engine.harness.memory.copy()
    assert run(engine, program) == first
    assert np.array_equal(engine.harness.memory, before)
    assert not engine.harness.interrupt


def test_counters_and_cycles(engine: VerilatorEngine, program: Program) -> None:
    result = engine.run(
        code_address=program.code_address, instructions=program.instruction_count, max_cycles=100_000, watchdog=5000
    )
    assert tuple(result.counters) == COUNTER_NAMES
    assert 0 <= result.statistics.finished - result.statistics.started - result.cycles <= 8
    read = sum(count for name, count in result.counters.items() if name.startswith("read_beats_"))
    assert read * program.arch.bus_bytes == result.statistics.read_bytes
    assert result.statistics.hazards == 0


def test_error_names_code_address_and_instruction(engine: VerilatorEngine, program: Program) -> None:
    good = engine.harness.memory[:64].copy()
    engine.harness.memory[0] = good[0] & 0xF8 | Opcode.ILLEGAL
    with pytest.raises(AcceleratorError, match=r"stopped with OPCODE at the instruction at 0x0: Instruction\(ILLEGAL"):
        run(engine, program)
    engine.harness.memory[0] = 7
    with pytest.raises(AcceleratorError, match=r"OPCODE .*no instruction: instruction field opcode: 7 is no Opcode"):
        run(engine, program)
    engine.harness.memory[:64] = good
    assert run(engine, program) > 0


def test_bus_error(program: Program) -> None:
    image = program.memory_image({"x": random_input()})
    with VerilatorEngine(program.arch, image[: len(image) // 128 * 64].copy()) as engine:
        with pytest.raises(AcceleratorError) as caught:
            run(engine, program)
        assert caught.value.code == ErrorCode.BUS


def test_cycle_limit(engine: VerilatorEngine, program: Program) -> None:
    with pytest.raises(CycleLimitError, match="did not end within 50 cycles"):
        engine.run(code_address=0, instructions=program.instruction_count, max_cycles=50)
    assert run(engine, program) > 50


def test_watchdog(engine: VerilatorEngine, program: Program) -> None:
    with pytest.raises(AcceleratorError, match="TIMEOUT"):
        run(engine, program, watchdog=3)


def test_trace(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "x.fst"
    with VerilatorEngine(program.arch, program.memory_image({"x": random_input()}), trace=True) as engine:
        run(engine, program, trace=Trace(path, 20, 40))
    raw = path.read_bytes()
    first, last = (int.from_bytes(raw[at : at + 8], "big") for at in (9, 17))
    assert last - first == 39 and first % 2 == 0
