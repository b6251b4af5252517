import numpy as np
import pytest

from algo.nm import NM
from compiler.compile import compile_network
from compiler.listing import Bound, bound, bound_of, disassemble, listing, to_text
from compiler.ops import Linear, QuantNetwork, QuantTensor, Requant
from hw.arch import PRESETS
from hw.isa import Format, Instruction, Opcode, Out, Residual, RowOp, Scale, Source
from tests.compiler.random_networks import random_network, random_weight
from tests.hw.malformed import good_tile, raw_with

TINY = PRESETS["tiny"]


def test_text_of_an_instruction() -> None:
    tile = good_tile(format=Format.INDEX, n=2, m=4, w_addr=0x40, row_op=RowOp.RMSNORM, dep=3)
    assert to_text(tile) == (
        "TILE format=INDEX row_op=RMSNORM out=STORE8 n=2 m=4 dep=3 k=4 cols=4 "
        "mult=1 shift=1 w_addr=0x40 w_stride=256"
    )
    assert to_text(Instruction(opcode=Opcode.HALT)) == "HALT"


def test_disassembly_shows_what_does_not_decode() -> None:
    code = good_tile().encode() + raw_with(good_tile(), source=3) + bytes(64)
    lines = disassemble(code)
    assert lines[0] == to_text(good_tile())
    assert lines[1].startswith(f".bytes {raw_with(good_tile(), source=3)[:8].hex()}")
    assert "source: 3 is no Source" in lines[1]
    assert lines[2] == "ILLEGAL"
    with pytest.raises(ValueError, match="multiple of 64 bytes, not 65"):
        disassemble(code[:65])


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        # dense: 3 column tiles of 5 steps; 15 * 4 weights + 5 * 4 activations + 9 * 4 stored = 116 bytes on
        # an 8-byte bus
        (good_tile(k=5, cols=9), Bound(load=5, array=15, post=9, store=9, bus=15, fetch=10)),
        # 2:4 of 10: 3 groups, 6 steps, 1 word of 16 bytes; int16 residual and output, parameters
        (
            good_tile(
                k=10,
                cols=4,
                format=Format.INDEX,
                n=2,
                m=4,
                scale=Scale.COLUMN,
                residual=Residual.INT16,
                out=Out.STORE16,
            ),
            Bound(load=10, array=6, post=4, store=4, bus=-(-(24 + 16 + 40 + 32 + 32 + 32) // 8), fetch=18),
        ),
        (
            good_tile(source=Source.STREAM, k=0, cols=5, out=Out.STORE8T),
            Bound(load=5, post=5, store=8, bus=7, fetch=3),
        ),
        (good_tile(source=Source.ZERO, k=0), Bound(post=4, store=4, bus=2)),
        (good_tile(operand=1, k=8), Bound(load=8, array=8, post=4, store=4, bus=6, fetch=4)),
        (Instruction(opcode=Opcode.TABLE), Bound(post=32, bus=32, fetch=32)),
        (Instruction(opcode=Opcode.HALT), Bound()),
    ],
)
def test_bound_of_one_instruction(instruction: Instruction, expected: Bound) -> None:
    assert bound(instruction, TINY) == expected


def test_bounds_add_up_by_unit() -> None:
    total = bound_of([good_tile(k=5, cols=9), Instruction(opcode=Opcode.TABLE)], TINY)
    assert total == Bound(load=5, array=15, post=41, store=9, bus=47, fetch=42)
    assert (total.cycles, total.unit) == (47, "bus")
    assert Bound(load=3, array=3).unit == "array"


def test_array_bound_is_the_ideal_for_whole_tiles() -> None:
    """Where nothing is padded, the array's bound times P is the numerator of the utilisation."""
    pattern, cols = NM("2:8"), 64
    linear = Linear(
        name="y",
        x="x",
        out="y",
        weight=random_weight(np.random.default_rng(0), cols, 64, pattern),
        pattern=pattern,
        requant=Requant(np.zeros(cols, np.int32), np.ones(cols, np.int16), np.ones(cols, np.uint8)),
    )
    tensors = {name: QuantTensor(name, (2, 8, 64), "int8", 1.0) for name in ("x", "y")}
    program = compile_network(
        QuantNetwork(tensors=tensors, ops=(linear,), inputs=("x",), outputs=("y",)), TINY
    )
    assert bound_of(program.instructions, TINY).array == program.ideal_cycles


def test_listing_names_everything() -> None:
    program = compile_network(random_network(3, TINY), TINY)
    text = listing(program)
    for operator in program.operators:
        assert f"# {operator.name}" in text
    for info in program.tensors:
        if info.layout != "keymask":
            assert f"{info.name}: {info.dtype}" in text
    lines = [line for line in text.splitlines() if " TILE " in line or " HALT" in line or " TABLE" in line]
    assert len(lines) == program.instruction_count
    assert f"o={program.network.ops[0].out}+0x0" in text
    assert f"bound: {bound_of(program.instructions, TINY).cycles} cycles" in text
