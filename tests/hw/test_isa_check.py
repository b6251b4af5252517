import dataclasses

import pytest

from hw.arch import PRESETS, Arch
from hw.isa import ErrorCode, Format, Instruction, Opcode, Operand, Out, RowOp, Scale, Source
from hw.isa_check import (
    MAX_PENDING_ROWS,
    RULES,
    SequenceState,
    check_instruction,
    check_raw,
    constant_alignment,
    k_limits,
    raw_fields,
)
from tests.hw.malformed import good_tile, malformed_instructions, raw_with

TINY = PRESETS["tiny"]
WIDE = dataclasses.replace(PRESETS["sta4096"], row_depth=16, psum_depth=32)
FLAT = dataclasses.replace(TINY, name="flat", lanes=16)


@pytest.mark.parametrize("arch", [TINY, WIDE, FLAT], ids=lambda arch: arch.name)
def test_every_malformed_instruction_breaks_its_rule(arch: Arch) -> None:
    for case in malformed_instructions(arch):
        code, text = check_raw(raw_fields(case.raw), arch)
        expected = (ErrorCode.NONE, "") if case.code == ErrorCode.SEQUENCE else (case.code, case.text)
        assert (code, text) == expected, case.name


def test_every_rule_has_a_malformed_instruction() -> None:
    archs = (TINY, FLAT, dataclasses.replace(TINY, sparse=False))
    assert {rule.text for rule in RULES} <= {case.text for arch in archs for case in malformed_instructions(arch)}


@pytest.mark.parametrize(
    "instruction",
    [
        good_tile(),
        good_tile(k=64),
        good_tile(format=Format.BITMAP, n=32, m=32, k=64),
        good_tile(format=Format.INDEX, n=3, m=3, k=63),
        good_tile(n=63, m=0),  # ignored in DENSE
        good_tile(psum_in=1, psum_out=1, out=Out.NONE, shift=0, cols=32),
        good_tile(source=Source.ZERO, k=0),
        good_tile(source=Source.STREAM, k=7, out=Out.STORE16),
        good_tile(row_op=RowOp.MAX, out=Out.NONE, row_first=1),
        good_tile(row_op=RowOp.EXP, out=Out.LANES, row_first=1, row_last=1, row_shift=40),
        good_tile(row_op=RowOp.SOFTMAX, out=Out.LANES, row_shift=1, cols=32),
        good_tile(row_op=RowOp.RMSNORM, row_shift=1),
        good_tile(cols=65535),
        good_tile(scale=Scale.COLUMN, mult=65535, shift=0),
        good_tile(w_dep=1, w_addr=4, p_addr=1, x_addr=1, r_addr=1, g_addr=1, o_stride=1),
        Instruction(opcode=Opcode.HALT, o_addr=3),
        Instruction(opcode=Opcode.TABLE, p_addr=64, o_addr=3),
    ],
)
def test_well_formed(instruction: Instruction) -> None:
    assert check_instruction(instruction, TINY) == ErrorCode.NONE


def test_raw_fields_and_raw_with_are_inverse() -> None:
    raw = raw_with(good_tile(), k=17, source=3, reserved=1)
    fields = raw_fields(raw)
    assert (fields["k"], fields["source"], fields["reserved"], fields["cols"]) == (17, 3, 1, 4)
    with pytest.raises(ValueError, match="64 bytes, not 3"):
        raw_fields(b"abc")


def test_k_limits_are_whole_groups() -> None:
    assert k_limits(TINY)[0] == 64
    assert k_limits(TINY)[3] == 63
    assert k_limits(TINY)[32] == 64
    assert all(limit % m == 0 and 64 - limit < m for m, limit in enumerate(k_limits(TINY)) if m)


def test_constant_alignment_covers_bus_and_instruction() -> None:
    assert (constant_alignment(TINY), constant_alignment(PRESETS["sta4096"])) == (64, 128)


def _softmax(cols: int) -> Instruction:
    return good_tile(row_op=RowOp.SOFTMAX, out=Out.LANES, row_shift=1, cols=cols)


def _values(k: int) -> Instruction:
    return good_tile(operand=Operand.ROWS, scale=Scale.ROW, k=k)


def test_sequence_takes_rows_in_order() -> None:
    state = SequenceState()
    assert [state.step(i) for i in (_softmax(5), _softmax(6), _values(5), _values(6))] == [ErrorCode.NONE] * 4
    assert (state.rows, state.scales) == ((), 0)


def test_sequence_refuses_and_keeps_its_state() -> None:
    state = SequenceState()
    assert state.step(_values(5)) == ErrorCode.SEQUENCE
    state.step(_softmax(5))
    before = dataclasses.replace(state)
    assert state.step(_values(4)) == ErrorCode.SEQUENCE
    assert state == before
    assert state.step(good_tile(scale=Scale.ROW)) == ErrorCode.NONE
    assert state.step(_values(5)) == ErrorCode.SEQUENCE  # a row, but its scale is gone


def test_sequence_limits_waiting_rows() -> None:
    state = SequenceState()
    for _ in range(MAX_PENDING_ROWS):
        assert state.step(_softmax(4)) == ErrorCode.NONE
    assert state.step(_softmax(4)) == ErrorCode.SEQUENCE


def test_exp_makes_a_scale_only_with_row_last() -> None:
    state = SequenceState()
    for last in (0, 1):
        exp = good_tile(row_op=RowOp.EXP, out=Out.LANES, row_shift=1, row_last=last)
        assert state.step(exp) == ErrorCode.NONE
        assert state.scales == last
        assert state.step(good_tile(operand=Operand.ROWS, psum_out=1, out=Out.NONE)) == ErrorCode.NONE


def test_sequence_holds_the_columns_of_the_array_tile_before() -> None:
    state, held = SequenceState(), good_tile(operand=Operand.HELD)
    assert state.step(held) == ErrorCode.SEQUENCE
    assert state.step(good_tile(k=5)) == ErrorCode.NONE
    assert state.step(good_tile(source=Source.ZERO, k=0)) == ErrorCode.NONE
    assert state.step(good_tile(operand=Operand.HELD, k=5)) == ErrorCode.NONE
    assert state.step(held) == ErrorCode.SEQUENCE
    assert state.step(good_tile(operand=Operand.HELD, k=5, a_unsigned=1)) == ErrorCode.SEQUENCE
    assert state.step(good_tile(operand=Operand.HELD, k=5)) == ErrorCode.NONE
