"""Reference = ISA engine = RTL, byte for byte, on random programs; and the RTL stops at every malformed instruction."""

from dataclasses import replace

import numpy as np
import pytest

from compiler.compile import compile_network
from compiler.schedule import ORDERS
from hw.arch import PRESETS
from hw.isa import INSTRUCTION_BYTES, Instruction, Opcode
from sim.engine import AcceleratorError, VerilatorEngine
from sim.memory import MemoryModel
from sim.simulate import simulate
from tests.compiler.random_convolutions import random_convolutions
from tests.compiler.random_networks import random_inputs, random_network
from tests.compiler.random_rows import random_rows
from tests.hw.malformed import malformed_instructions

TINY = PRESETS["tiny"]
FLAT = replace(TINY, name="flat", lanes=16)
SEEDS = 40


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_program(seed):
    """Shapes that are multiples of nothing, every N:M class, int8 and int16, tables, norms, masks, blocked softmax."""
    network = random_network(seed, TINY)
    program = compile_network(network, TINY, order=ORDERS[seed % len(ORDERS)])
    inputs = random_inputs(np.random.default_rng(seed), network)
    memory = MemoryModel(latency=1 + seed * 7 % 80, stall_probability=0.25 * (seed % 3), seed=seed)
    run = simulate(program, inputs, memory=memory)
    assert run.bit_exact, run.mismatches


@pytest.mark.parametrize("seed", range(16))
def test_random_program_with_constant_masks(seed):
    """Causal and other masks of scores, biases per batch entry and head, grouped queries, other sequences."""
    network = random_network(200 + seed, TINY, masks=True, cross=seed % 2 == 1)
    program = compile_network(network, TINY, order=ORDERS[seed % len(ORDERS)])
    memory = MemoryModel(latency=1 + seed * 7 % 80, stall_probability=0.25 * (seed % 3), seed=seed)
    run = simulate(program, random_inputs(np.random.default_rng(seed), network), memory=memory)
    assert run.bit_exact, run.mismatches


@pytest.mark.parametrize("seed", range(12))
def test_random_program_with_products(seed):
    """Residuals that multiply, int8 and int16, with tables and norms behind them; the cycle engine agrees on the time."""
    arch = replace(TINY, spare_dsps=True) if seed % 4 == 3 else TINY
    network = random_network(300 + seed, arch, ops=8, products=True)
    program = compile_network(network, arch)
    memory = MemoryModel(latency=1 + seed * 7 % 80, stall_probability=0.25 * (seed % 3), seed=seed)
    run = simulate(program, random_inputs(np.random.default_rng(seed), network), memory=memory)
    assert run.bit_exact, run.mismatches
    assert simulate(program, engine="cycle", memory=memory).counters == run.counters


@pytest.mark.parametrize("seed", range(10))
def test_random_program_with_fewer_rows_than_lanes(seed):
    network = random_network(seed, FLAT)
    program = compile_network(network, FLAT)
    memory = MemoryModel(latency=1 + seed * 11 % 80, stall_probability=0.25 * (seed % 3), seed=seed)
    run = simulate(program, random_inputs(np.random.default_rng(seed), network), memory=memory)
    assert run.bit_exact, run.mismatches


@pytest.mark.parametrize("seed", range(20))
def test_random_convolutions(seed):
    """Any kernel, stride, padding, dilation, groups and N:M class, poolings; the cycle engine agrees on the time."""
    arch = replace(TINY, packing=True) if seed % 4 == 3 else TINY
    network = random_convolutions(seed, arch)
    program = compile_network(network, arch)
    memory = MemoryModel(latency=1 + seed * 7 % 80, stall_probability=0.25 * (seed % 3), seed=seed)
    run = simulate(program, random_inputs(np.random.default_rng(seed), network), memory=memory)
    assert run.bit_exact, run.mismatches
    assert simulate(program, engine="cycle", memory=memory).counters == run.counters


@pytest.mark.parametrize("seed", range(12))
def test_random_rows(seed):
    """Rows and columns in other places, constants, rows and channels changed, products and softmaxes of activations."""
    network = random_rows(seed, TINY)
    program = compile_network(network, TINY, order=ORDERS[seed % len(ORDERS)])
    memory = MemoryModel(latency=1 + seed * 7 % 80, stall_probability=0.25 * (seed % 3), seed=seed)
    run = simulate(program, random_inputs(np.random.default_rng(seed), network), memory=memory)
    assert run.bit_exact, run.mismatches
    assert simulate(program, engine="cycle", memory=memory).counters == run.counters


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("options", [
    {"packing": True}, {"sparse": False}, {"spare_dsps": True, "lane_register": True, "multiplier_bits": 18},
], ids=str)
def test_random_program_on_a_variant(options, seed):
    """Two products per multiplier; dense weights only, where sparse layers are compiled with their zeros."""
    arch = replace(TINY, **options)
    network = random_network(100 + seed, arch)
    program = compile_network(network, arch)
    memory = MemoryModel(latency=1 + seed * 7 % 80, stall_probability=0.25 * (seed % 3), seed=seed)
    run = simulate(program, random_inputs(np.random.default_rng(seed), network), memory=memory)
    assert run.bit_exact, run.mismatches


def test_sparse_instructions_stop_dense_hardware():
    arch = replace(TINY, sparse=False)
    (case,) = malformed_instructions(arch)
    with VerilatorEngine(arch, np.zeros(1 << 14, np.uint8)) as engine, pytest.raises(AcceleratorError) as stop:
        engine.run(code_address=0, instructions=put(engine, case.raw), max_cycles=20_000)
    assert stop.value.code == case.code


@pytest.fixture(scope="module")
def engine():
    """One machine for all: after each error the next program must run."""
    with VerilatorEngine(TINY, np.zeros(1 << 14, np.uint8)) as engine:
        yield engine


def put(engine, *raws):
    code = b"".join(raws)
    engine.harness.memory[: len(code)] = np.frombuffer(code, np.uint8)
    return len(raws)


@pytest.mark.parametrize("case", malformed_instructions(TINY), ids=lambda case: case.name)
def test_malformed_instruction_stops_the_rtl(engine, case):
    halt = Instruction(opcode=Opcode.HALT).encode()
    table = Instruction(opcode=Opcode.TABLE, p_addr=0x1000).encode()
    count = put(engine, table, case.raw, halt)
    with pytest.raises(AcceleratorError) as stop:
        engine.run(code_address=0, instructions=count, max_cycles=20_000)
    assert (stop.value.code, stop.value.address) == (case.code, INSTRUCTION_BYTES)
    assert engine.run(code_address=2 * INSTRUCTION_BYTES, instructions=1, max_cycles=20_000).cycles > 0
