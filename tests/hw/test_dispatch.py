"""Dispatcher parts: the checker equals the Python rules, the sequence state its model, the divider a division."""

import random

import pytest
from amaranth.sim import Simulator

from hw.arch import PRESETS
from hw.dispatch import Checker, Divider, Sequence
from hw.isa import INSTRUCTION_BYTES, ErrorCode, Instruction, Opcode, Operand, Out, RowOp, Scale
from hw.isa_check import SequenceState, check_raw, raw_fields
from tests.hw.malformed import malformed_instructions

TINY = PRESETS["tiny"]


def random_raw(rng: random.Random) -> bytes:
    """A TILE with some fields random: mostly malformed, for different reasons."""
    word = int.from_bytes(Instruction(opcode=Opcode.TILE, k=8, cols=4, out=Out.STORE8, mult=1, shift=1).encode(), "little")
    for _ in range(rng.randrange(4)):
        word ^= 1 << rng.randrange(8 * INSTRUCTION_BYTES)
    return word.to_bytes(INSTRUCTION_BYTES, "little")


def test_checker_equals_rules():
    rng, dut = random.Random(0), Checker(TINY)
    raws = [random_raw(rng) for _ in range(400)] + [case.raw for case in malformed_instructions(TINY)]

    async def bench(ctx):
        for raw in raws:
            ctx.set(dut.instruction.as_value(), int.from_bytes(raw, "little"))
            await ctx.delay(1e-9)
            expected, text = check_raw(raw_fields(raw), TINY)
            assert ctx.get(dut.code) == expected, text
    simulator = Simulator(dut)
    simulator.add_testbench(bench)
    simulator.run()
    codes = {check_raw(raw_fields(raw), TINY)[0] for raw in raws}
    assert codes >= {ErrorCode.NONE, ErrorCode.FIELD, ErrorCode.ALIGNMENT, ErrorCode.OPCODE}


def test_sequence_equals_model():
    rng, dut, state = random.Random(1), Sequence(), SequenceState()
    seen = set()

    async def bench(ctx):
        for _ in range(600):
            makes, uses, takes_scale = rng.random() < 0.5, rng.choice(list(Operand)), rng.random() < 0.4
            instruction = Instruction(
                opcode=Opcode.TILE, k=rng.choice([5, 6]), cols=rng.choice([5, 6]), operand=uses, a_unsigned=rng.randrange(2),
                scale=Scale.ROW if takes_scale else 0, out=Out.LANES if makes else Out.STORE8,
                row_op=rng.choice([RowOp.SOFTMAX, RowOp.EXP]) if makes else 0, row_last=rng.randrange(2) if makes else 0)
            ctx.set(dut.instruction.as_value(), int.from_bytes(instruction.encode(), "little"))
            await ctx.delay(1e-9)
            wrong = ctx.get(dut.wrong)
            code = state.step(instruction)
            seen.add(code)
            assert bool(wrong) == (code != ErrorCode.NONE)
            ctx.set(dut.issue, not wrong)
            await ctx.tick()
            ctx.set(dut.issue, 0)
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert seen == {ErrorCode.NONE, ErrorCode.SEQUENCE}


@pytest.mark.parametrize("seed", range(2))
def test_divider(seed):
    rng, dut = random.Random(seed), Divider()
    cases = [(rng.getrandbits(22), rng.randint(1, 63)) for _ in range(40)] + [(0, 1), (2**22 - 1, 1), (63, 63), (64, 63)]

    async def bench(ctx):
        for dividend, divisor in cases:
            ctx.set(dut.dividend, dividend)
            ctx.set(dut.divisor, divisor)
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            while not ctx.get(dut.done):
                await ctx.tick()
            assert ctx.get(dut.quotient) == -(-dividend // divisor)
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
