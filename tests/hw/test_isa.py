"""The instruction set: round trips, range checks, and the generated page."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw.isa import FIELDS, INSTRUCTION_BYTES, Instruction, instruction_layout, isa_markdown


def field_values():
    return st.fixed_dictionaries({
        field.name: st.sampled_from(list(field.kind)).map(int) if field.kind else st.integers(0, (1 << field.bits) - 1)
        for field in FIELDS
    })


@given(field_values())
def test_encode_decode_round_trip(values):
    instruction = Instruction(**values)
    raw = instruction.encode()
    assert len(raw) == INSTRUCTION_BYTES
    assert Instruction.decode(raw) == instruction
    assert all(getattr(instruction, name) == value for name, value in values.items())


@given(field_values())
def test_hardware_layout_is_the_encoder_s(values):
    raw = Instruction(**values).encode()
    bits = instruction_layout().from_bits(int.from_bytes(raw, "little"))
    assert {name: bits[name] for name in values} == values


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_value_too_large(field):
    with pytest.raises(ValueError, match=f"{field.name} has {field.bits} bits"):
        Instruction(**{field.name: 1 << field.bits})


def test_errors():
    with pytest.raises(TypeError, match="unknown instruction field 'colour'"):
        Instruction(colour=1)
    with pytest.raises(ValueError, match="opcode: 7 is no Opcode"):
        Instruction(opcode=7)
    with pytest.raises(ValueError, match="has 64 bytes, not 3"):
        Instruction.decode(b"abc")
    with pytest.raises(ValueError, match="reserved bits"):
        Instruction.decode(bytes(63) + b"\x80")


def test_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "isa.md"
    assert page.read_text() == isa_markdown(), "run python -m hw.isa > docs/isa.md"
