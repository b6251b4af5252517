"""The cycle engine: every counter equals the RTL's, on random programs and memories; errors and limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from compiler.compile import compile_model, compile_network
from compiler.program import Program
from hw.arch import PRESETS
from hw.isa import INSTRUCTION_BYTES, ErrorCode, Instruction, Opcode
from hw.isa_check import check_instruction
from models.swin import Swin, SwinConfig
from sim.cycle import run_code, run_cycles
from sim.cycle_check import check_code, code_fields
from sim.engine import AcceleratorError, CycleLimitError, VerilatorEngine
from sim.memory import MemoryModel
from sim.simulate import simulate
from tests.hw.malformed import malformed_instructions
from tests.sim.cycle_cases import compare, random_case, run_rtl, runs_of_instructions
from tests.sim.small_network import random_input, small_network

TINY = PRESETS["tiny"]
FLAT = replace(TINY, name="flat", lanes=16)
WIDE = replace(TINY, name="wide", lane_depth=128, row_depth=64, psum_depth=64, bus_bytes=32, fifo_beats=64)
HALT = Instruction(opcode=Opcode.HALT).encode()


@pytest.mark.parametrize("arch", [TINY, FLAT, WIDE], ids=lambda arch: arch.name)
@pytest.mark.parametrize("seed", range(25))
def test_equals_the_rtl(arch, seed):
    case = random_case(seed, arch, repeat=1 + seed % 4 * 3)
    rtl = run_rtl(case)
    for skip in (True, False):
        run, different = compare(case, rtl, skip=skip)
        assert not different
    assert run.stepped == run.cycles


@pytest.mark.parametrize("name, programs, channels", [("tiny", 50, 60), ("sta256", 5, 500), ("sta1024", 3, 900)])
def test_skipping_changes_nothing(name, programs, channels):
    """Programs in which much recurs, but not all: half of them have other waits in some places."""
    cycles = stepped = 0
    for seed in range(programs):
        case = random_case(seed, PRESETS[name], ops=3, repeat=8, max_channels=channels)
        for memory in (MemoryModel(), MemoryModel(latency=300, bytes_per_cycle=PRESETS[name].bus_bytes // 2)):
            fast, slow = (run_code(case.code, PRESETS[name], memory, skip=skip) for skip in (True, False))
            assert fast.counters == slow.counters
            assert np.array_equal(fast.completed, slow.completed)
            cycles, stepped = cycles + fast.cycles, stepped + fast.stepped
    assert stepped < 0.9 * cycles


@pytest.mark.parametrize("seed", [902013, 902115])
def test_commands_that_wait_for_others(seed):
    """The command of one pass waits, its likes before and after it do not, and the units hold all three at once."""
    case = random_case(seed, TINY, ops=3, repeat=6, max_channels=300, max_rows=9)
    fast, slow = (run_code(case.code, TINY, case.memory, address=case.address, skip=skip) for skip in (True, False))
    assert fast.counters == slow.counters and np.array_equal(fast.completed, slow.completed)
    assert fast.stepped < 0.9 * slow.stepped


def test_queues_that_run_empty_while_the_dispatcher_rests():
    """Windows of Swin, in one order of their instructions: a command leaves a queue that has none behind it in one place of the
    program, and one more in another."""
    torch.manual_seed(0)
    network, image = Swin(SwinConfig(width=96, blocks=(2, 2), heads=(3, 6), num_classes=10)).eval(), torch.randn(1, 3, 224, 224)
    program = compile_model(network, image, arch="sta1024", calibration=[image], order="loose")
    (stage,) = [part for part in getattr(program, "stages", (program,)) if isinstance(part, Program)]
    slow = run_cycles(stage, skip=False)
    fast = run_cycles(stage, max_cycles=slow.cycles)
    assert fast.counters == slow.counters and np.array_equal(fast.completed, slow.completed)


@pytest.mark.parametrize("name", ["tiny", "sta256"])
def test_runs_of_instructions(name):
    arch, cycles, stepped = PRESETS[name], 0, 0
    for seed in range(12):
        code = random_case(seed, arch, ops=6).program.code
        for variant in range(10):
            runs = runs_of_instructions(code, 100 * seed + variant)
            memory = MemoryModel(latency=1 + 37 * variant, bytes_per_cycle=arch.bus_bytes * (2 + variant % 3) // 2)
            slow = run_code(runs + HALT, arch, memory, skip=False)
            fast = run_code(runs + HALT, arch, memory, max_cycles=slow.cycles)
            assert fast.counters == slow.counters and np.array_equal(fast.completed, slow.completed), (seed, variant)
            cycles, stepped = cycles + slow.cycles, stepped + fast.stepped
    assert stepped < 0.7 * cycles


def test_repeated_layers_are_skipped():
    case = random_case(3, TINY, ops=2)
    body = case.program.code[:-INSTRUCTION_BYTES]
    fast, slow = (run_code(40 * body + HALT, TINY, skip=skip) for skip in (True, False))
    assert fast.counters == slow.counters and np.array_equal(fast.completed, slow.completed)
    assert fast.stepped < slow.stepped / 2


@pytest.mark.parametrize("case", malformed_instructions(TINY), ids=lambda case: case.name)
def test_malformed_instruction(case):
    table = Instruction(opcode=Opcode.TABLE, p_addr=0x1000).encode()
    with pytest.raises(AcceleratorError) as stop:
        run_code(table + case.raw + HALT, TINY, address=4096)
    assert (stop.value.code, stop.value.address) == (case.code, 4096 + INSTRUCTION_BYTES)


def test_program_without_halt():
    table = Instruction(opcode=Opcode.TABLE, p_addr=0).encode()
    with pytest.raises(AcceleratorError) as stop:
        run_code(2 * table, TINY)
    assert (stop.value.code, stop.value.address) == (ErrorCode.END, 2 * INSTRUCTION_BYTES)


@pytest.mark.parametrize("latency", [1, 40, 300])
def test_end_while_reads_are_in_flight(latency):
    """TABLE completes before its entries are read: the memory ports finish after HALT."""
    memory = MemoryModel(latency=latency)
    code = 2 * Instruction(opcode=Opcode.TABLE, p_addr=0x1000).encode() + HALT + 20 * b"\xff" * INSTRUCTION_BYTES
    image = np.zeros(1 << 14, np.uint8)
    image[: len(code)] = np.frombuffer(code, np.uint8)
    with VerilatorEngine(TINY, image, model=memory) as engine:
        rtl = engine.run(code_address=0, instructions=len(code) // INSTRUCTION_BYTES, max_cycles=100_000)
    assert run_code(code, TINY, memory).counters == rtl.counters


def test_bad_arguments():
    for code in (b"", b"1234"):
        with pytest.raises(ValueError, match="code must hold instructions of 64 bytes"):
            run_code(code, TINY)
    with pytest.raises(CycleLimitError, match="did not end within 50 cycles"):
        run_cycles(random_case(0, TINY).program, max_cycles=50)


def test_checks_agree_with_the_scalar_rules():
    program = random_case(1, TINY).program
    fields = code_fields(program.code)
    for index in (0, 7, program.instruction_count - 1):
        instruction = program.instructions[index]
        assert all(int(values[index]) == getattr(instruction, name) for name, values in fields.items() if name != "reserved")
        assert check_instruction(instruction, TINY) == ErrorCode.NONE
    storing = [i for i, instruction in enumerate(program.instructions) if instruction.out in (1, 2, 3)]
    assert check_code(program.code, TINY).tolist() == storing


def test_engine_of_simulate():
    program = compile_network(small_network(), "tiny")
    rtl = simulate(program, random_input())
    run = simulate(program, engine="cycle")
    assert run.cycles == rtl.cycles and run.counters == rtl.counters and run.utilisation == rtl.utilisation
    assert run.operator_cycles == rtl.operator_cycles
    assert run.outputs == () and run.tensors == {} and run.outputs_sha256 is None and run.bit_exact is None
    assert run.to_dict()["engine"] == "cycle"
    with pytest.raises(CycleLimitError):
        simulate(program, engine="cycle", max_cycles=10)
    with pytest.raises(ValueError, match="has no signals to trace"):
        simulate(program, engine="cycle", trace="x.fst")
