"""Columns held in the lanes: only where the same columns are there already; which operators come side by side."""

import numpy as np
import pytest

from compiler.compile import compile_network
from compiler.hold import hold_columns, side_by_side
from compiler.ops import Linear
from compiler.steps import At, Step
from hw.arch import PRESETS
from hw.isa import Opcode, Operand, Out, RowOp, Source
from sim.isa_engine import run_isa
from tests.compiler.random_networks import random_inputs, random_network
from tests.sim.oracle import run_oracle

TINY = PRESETS["tiny"]


def _tile(x: str = "x", *, writes: str = "y", **fields: int) -> Step:
    return Step(op=0, fields={"k": 8, **fields}, addresses={"a_addr": At(x)}, reads=((x, 0),), writes=((writes, 0),))


def _held(*steps: Step) -> list[bool]:
    return [step.fields.get("operand") == Operand.HELD for step in hold_columns(steps)]


def test_the_same_columns_are_held() -> None:
    table = Step(op=0, opcode=Opcode.TABLE, addresses={"p_addr": At("t")})
    pointwise = Step(op=0, fields={"source": Source.ZERO}, addresses={"r_addr": At("x")}, reads=(("x", 0),), writes=(("z", 0),))
    assert _held(_tile(), table, _tile(), pointwise, _tile()) == [False, False, True, False, True]
    first, second = hold_columns([_tile(a_rotate=2, g_addr=4), _tile(a_rotate=2, g_addr=4)])
    assert "a_addr" in first.addresses and "a_addr" not in second.addresses
    assert {name: second.fields[name] for name in second.fields if name != "operand"} == {"k": 8}


@pytest.mark.parametrize("other", [{"k": 4}, {"a_unsigned": 1}, {"a_rotate": 1}, {"g_addr": 1}, {"x": "z"}])
def test_other_columns_are_loaded(other: dict) -> None:
    assert _held(_tile(), _tile(**other)) == [False, False]


def test_columns_that_were_written_over_are_loaded() -> None:
    assert _held(_tile(writes="x"), _tile()) == [False, False]


def test_probabilities_are_not_held() -> None:
    rows = _tile(operand=Operand.ROWS)
    assert _held(_tile(), rows, _tile(), rows, rows) == [False] * 5


@pytest.mark.parametrize("seed", range(12))
def test_held_programs_compute_the_same(seed: int) -> None:
    network = random_network(seed, TINY, ops=8)
    program = compile_network(network, TINY)
    held = [i for i in program.instructions if i.opcode == Opcode.TILE and i.operand == Operand.HELD]
    assert all(i.out != Out.LANES or i.row_op in (RowOp.SOFTMAX, RowOp.EXP) for i in held)
    inputs = random_inputs(np.random.default_rng(seed), network)
    image, expected = program.memory_image(inputs), run_oracle(network, inputs)
    run_isa(image, arch=TINY, code_addr=0, instructions=program.instruction_count).raise_for_error()
    for name in network.outputs:
        np.testing.assert_array_equal(program.read_tensor(image, name), expected[name])


def test_layers_of_the_same_tensor_come_side_by_side() -> None:
    together = 0
    for seed in range(30):
        network = random_network(seed, TINY, ops=8)
        groups = side_by_side(network, range(len(network.ops)))
        assert [index for group in groups for index in group] == list(range(len(network.ops)))
        for ops in ([network.ops[index] for index in group] for group in groups if len(group) > 1):
            together += 1
            assert all(isinstance(op, Linear) and op.x == ops[0].x for op in ops)
            made = {op.out for op in ops}
            assert all(op.residual is None or op.residual.tensor not in made for op in ops if isinstance(op, Linear))
    assert together
