"""One malformed instruction for every way to be malformed; for the ISA engine and the RTL alike."""

from dataclasses import dataclass

from hw.arch import Arch
from hw.isa import (
    FIELDS,
    INSTRUCTION_BYTES,
    ErrorCode,
    Format,
    Instruction,
    Opcode,
    Operand,
    Out,
    Residual,
    RowOp,
    Scale,
    Source,
)
from hw.isa_check import constant_alignment

__all__ = ["Malformed", "good_tile", "malformed_instructions", "raw_with"]


@dataclass(frozen=True)
class Malformed:
    """64 bytes that must stop the machine with `code`; `text` is that of the rule in `hw.isa_check`."""

    name: str
    raw: bytes
    code: ErrorCode
    text: str


def good_tile(**changes: int) -> Instruction:
    """A well-formed TILE (dense, one column tile, everything at address 0), with fields changed."""
    fields = dict(opcode=Opcode.TILE, k=4, cols=4, w_stride=256, mult=1, shift=1, out=Out.STORE8)
    return Instruction(**{**fields, **changes})


def raw_with(instruction: Instruction, **values: int) -> bytes:
    """The instruction's bytes with raw field values, legal or not; ``reserved`` sets the bits after the last
    field."""
    word, offset = int.from_bytes(instruction.encode(), "little"), 0
    for field in FIELDS:
        if field.name in values:
            mask = (1 << field.bits) - 1
            word = word & ~(mask << offset) | (values[field.name] & mask) << offset
        offset += field.bits
    return (word | values.get("reserved", 0) << offset).to_bytes(INSTRUCTION_BYTES, "little")


def malformed_instructions(arch: Arch) -> list[Malformed]:
    """All of them for one architecture."""
    cases: list[Malformed] = []
    field, alignment = ErrorCode.FIELD, ErrorCode.ALIGNMENT

    def add(text: str, code: ErrorCode = field, base: Instruction | None = None, **values: int) -> None:
        raw = raw_with(base or good_tile(), **values)
        cases.append(Malformed(f"{text}: {values}", raw, code, text))

    softmax = good_tile(row_op=RowOp.SOFTMAX, out=Out.LANES, row_shift=20)
    norm = good_tile(row_op=RowOp.LAYERNORM, row_shift=20, ln_shift=1)
    sparse = good_tile(format=Format.INDEX, n=1, m=2)
    psum = good_tile(psum_out=1, out=Out.NONE)
    if not arch.sparse:
        add("sparse format, but the hardware has none", base=sparse)
        return cases
    for opcode in (0, *range(4, 8)):
        cases.append(
            Malformed(
                f"opcode {opcode}",
                raw_with(good_tile(), opcode=opcode),
                ErrorCode.OPCODE,
                f"no operation has the code {opcode}",
            )
        )
    for opcode in (Opcode.TILE, Opcode.TABLE, Opcode.HALT):
        add("reserved bits are set", base=Instruction(opcode=opcode), reserved=1)
    add("source has no such value", source=3)
    add("operand has no such value", operand=3)
    add("format has no such value", format=3)
    add("scale has no such value", scale=3)
    for value in (6, 7):
        add("residual has no such value", residual=value)
    for value in (6, 7):
        add("row_op has no such value", row_op=value)
    for value in (5, 6, 7):
        add("out has no such value", out=value)
    add("cols is 0", cols=0)
    add("k is 0 with source ARRAY", k=0)
    add("n or m out of range", base=sparse, n=0)
    add("n or m out of range", base=sparse, n=3)
    add("n or m out of range", base=sparse, m=33)
    add("n or m out of range", base=sparse, n=40, m=63)
    add("n or m out of range", base=sparse, m=0)
    add("k does not fit the lanes", k=arch.lane_depth + 1)
    add("k does not fit the lanes", base=sparse, m=3, k=arch.lane_depth // 3 * 3 + 1)
    add("cols does not fit the partial sums", base=psum, cols=arch.psum_depth + 1)
    add("cols does not fit the partial sums", psum_in=1, cols=arch.psum_depth + 1)
    add("cols does not fit the row unit", base=softmax, cols=arch.row_depth + 1)
    add("cols does not fit the row unit", base=norm, cols=arch.row_depth + 1)
    text = "operand, a_unsigned, w_dep, psum_in or psum_out without source ARRAY"
    for name in ("operand", "a_unsigned", "w_dep", "psum_in"):
        add(text, source=Source.STREAM, **{name: 1})
    add(text, base=psum, source=Source.ZERO)
    text = "a_rotate beyond the row groups, or without activations from memory"
    if arch.row_groups < 32:
        add(text, a_rotate=arch.row_groups)
    add(text, a_rotate=1, operand=Operand.ROWS)
    add(text, a_rotate=1, operand=Operand.HELD)
    add(text, a_rotate=1, source=Source.ZERO)
    add("w_dep with a sparse format", base=sparse, w_dep=1)
    text = "psum_out with post-processing or a destination"
    for changes in (
        {"out": Out.STORE8},
        {"row_op": RowOp.MAX},
        {"residual": Residual.INT8},
        {"table": 1},
        {"scale": Scale.ROW},
    ):
        add(text, base=psum, r_mult=1, r_shift=1, **changes)
    add("out NONE without psum_out or MAX", out=Out.NONE)
    add("MAX with a destination", row_op=RowOp.MAX)
    add("SOFTMAX or EXP without out LANES", base=softmax, out=Out.STORE8)
    add("SOFTMAX or EXP without out LANES", base=softmax, row_op=RowOp.EXP, out=Out.STORE16)
    add("out LANES without SOFTMAX or EXP", out=Out.LANES)
    add("out LANES without SOFTMAX or EXP", base=norm, out=Out.LANES)
    add("row_first without MAX or EXP", base=softmax, row_first=1)
    add("row_last without EXP", base=softmax, row_last=1)
    if not arch.attention:
        add("STORE8T on an array whose rows are not its lanes", out=Out.STORE8T)
    text = "o_skip and o_drop leave no row, or out is not STORE8 or STORE16"
    for changes in ({"o_skip": arch.rows - 1, "o_drop": 1}, {"o_skip": 1, "o_drop": arch.rows - 1},
                    {"o_skip": 1, "out": Out.STORE8T}, {"o_drop": 1, "out": Out.NONE, "psum_out": 1}):
        add(text, **changes)
    for changes in ({"shift": 0}, {"mult": 1 << 15}):
        add("scale CONST: mult or shift out of range", **changes)
    for changes in ({"r_shift": 0, "r_mult": 1}, {"r_shift": 1, "r_mult": 1 << 15}):
        add("residual: r_mult or r_shift out of range", residual=Residual.INT16, **changes)
    for residual in (Residual.MUL8, Residual.MUL16):
        add("residual MUL8 or MUL16 with scale ROW", residual=residual, scale=Scale.ROW)
    for shift in (0, 41):
        add("row operation: row_shift out of range", base=softmax, row_shift=shift)
        add("row operation: row_shift out of range", base=norm, row_shift=shift)
    add("LAYERNORM: ln_shift is 0", base=norm, ln_shift=0)
    constant, column = constant_alignment(arch) // 2, arch.rows // 2
    add("a_addr", alignment, a_addr=column)
    add("a_addr", alignment, source=Source.STREAM, a_addr=column)
    add("w_addr", alignment, w_addr=constant)
    add("w_addr", alignment, w_dep=1, w_addr=column)
    add("w_stride", alignment, w_stride=column)
    add("x_addr", alignment, base=sparse, x_addr=constant)
    add("p_addr", alignment, scale=Scale.COLUMN, p_addr=constant)
    add("p_addr", alignment, base=Instruction(opcode=Opcode.TABLE), p_addr=constant)
    add("r_addr", alignment, residual=Residual.INT8, r_mult=1, r_shift=1, r_addr=column)
    add("r_addr", alignment, residual=Residual.INT16, r_mult=1, r_shift=1, r_addr=arch.rows)
    add("r_addr", alignment, residual=Residual.MUL8, r_addr=column)
    add("r_addr", alignment, residual=Residual.MUL16, r_addr=arch.rows)
    add("g_addr", alignment, base=norm, g_addr=constant)
    add("o_addr", alignment, o_addr=column)
    add("o_addr", alignment, out=Out.STORE16, o_addr=arch.rows)
    if arch.attention:
        add("o_stride", alignment, out=Out.STORE8T, o_stride=column)
    text = "operand ROWS without an earlier TILE"
    cases.append(Malformed(text, good_tile(operand=Operand.ROWS).encode(), ErrorCode.SEQUENCE, text))
    text = "operand HELD without an earlier TILE"
    cases.append(Malformed(text, good_tile(operand=Operand.HELD).encode(), ErrorCode.SEQUENCE, text))
    text = "scale ROW without an earlier TILE"
    cases.append(Malformed(text, good_tile(scale=Scale.ROW).encode(), ErrorCode.SEQUENCE, text))
    return cases
