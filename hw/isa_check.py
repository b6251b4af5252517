"""What makes an instruction malformed, declared once: the ISA engine runs this table and the RTL mirrors it.

Each rule is a condition over the raw fields that must be false. Rules use only ``== != < > >= & | +``, so that the
same expression works on Python integers and on Amaranth values. `k_limits` is a ROM of 33 words addressed by
field ``m``. The first rule that holds, in the order of the table, gives the error code; rules that depend on
other instructions (`ErrorCode.SEQUENCE`) are described in `SequenceState`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

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

__all__ = [
    "MAX_M",
    "MAX_PENDING_ROWS",
    "RULES",
    "Rule",
    "SequenceState",
    "check_instruction",
    "check_raw",
    "constant_alignment",
    "k_limits",
    "raw_fields",
]

MAX_PENDING_ROWS = 3
"""Softmax rows (out LANES) that may wait for their TILE with operand ROWS: two banks of the row unit and one
in the array."""

MAX_M = 32
ROW_SHIFT_MAX = 40
SIGN_BIT = 1 << 15


@dataclass(frozen=True)
class Rule:
    """One way to be malformed: ``holds(f, arch, k_limit)`` with f the raw fields (plus ``reserved``, the bits
    after the last field) and k_limit = ``k_limits(arch)[min(f.m, 32)]``, or the lane depth for DENSE."""

    code: ErrorCode
    text: str
    holds: Callable[[Any, Arch, Any], Any]


def constant_alignment(arch: Arch) -> int:
    """Alignment in bytes of w_addr (constants), x_addr, p_addr and g_addr."""
    return max(64, arch.bus_bytes)


def k_limits(arch: Arch) -> tuple[int, ...]:
    """Longest reduction for each m in 0..32 such that k rounded up to whole groups fits the lanes' ring (m =
    0: the depth)."""
    return (arch.lane_depth, *(arch.lane_depth // m * m for m in range(1, MAX_M + 1)))


def _array(f: Any) -> Any:
    return f.source == Source.ARRAY


def _sparse(f: Any) -> Any:
    return _array(f) & (f.format != Format.DENSE)


def _post(f: Any) -> Any:
    return f.psum_out == 0


def _stores(f: Any) -> Any:
    return (f.out == Out.STORE8) | (f.out == Out.STORE16) | (f.out == Out.STORE8T)


def _exponentials(f: Any) -> Any:
    return (f.row_op == RowOp.SOFTMAX) | (f.row_op == RowOp.EXP)


def _norm(f: Any) -> Any:
    return (f.row_op == RowOp.LAYERNORM) | (f.row_op == RowOp.RMSNORM)


def _times(f: Any) -> Any:
    return (f.residual == Residual.MUL8) | (f.residual == Residual.MUL16)


def _wide(f: Any) -> Any:
    return (f.residual == Residual.INT16) | (f.residual == Residual.MUL16)


def _off(address: Any, alignment: int) -> Any:
    return (address & (alignment - 1)) != 0


_F, _A = ErrorCode.FIELD, ErrorCode.ALIGNMENT

RULES: tuple[Rule, ...] = (
    # values without a name
    Rule(_F, "reserved bits are set", lambda f, a, kl: f.reserved != 0),
    Rule(_F, "source has no such value", lambda f, a, kl: f.source > Source.ZERO),
    Rule(_F, "operand has no such value", lambda f, a, kl: f.operand > Operand.HELD),
    Rule(_F, "format has no such value", lambda f, a, kl: f.format > Format.BITMAP),
    Rule(_F, "sparse format, but the hardware has none", lambda f, a, kl: _sparse(f) & (not a.sparse)),
    Rule(_F, "scale has no such value", lambda f, a, kl: f.scale > Scale.ROW),
    Rule(_F, "residual has no such value", lambda f, a, kl: f.residual > Residual.MUL16),
    Rule(_F, "row_op has no such value", lambda f, a, kl: f.row_op > RowOp.RMSNORM),
    Rule(_F, "out has no such value", lambda f, a, kl: f.out > Out.LANES),
    # sizes
    Rule(_F, "cols is 0", lambda f, a, kl: f.cols == 0),
    Rule(_F, "k is 0 with source ARRAY", lambda f, a, kl: _array(f) & (f.k == 0)),
    Rule(_F, "n or m out of range", lambda f, a, kl: _sparse(f) & ((f.n == 0) | (f.m > MAX_M) | (f.n > f.m))),
    Rule(_F, "k does not fit the lanes", lambda f, a, kl: _array(f) & (f.k > kl)),
    Rule(
        _F,
        "cols does not fit the partial sums",
        lambda f, a, kl: ((f.psum_in == 1) | (f.psum_out == 1)) & (f.cols > a.psum_depth),
    ),
    Rule(
        _F,
        "cols does not fit the row unit",
        lambda f, a, kl: ((f.row_op == RowOp.SOFTMAX) | _norm(f)) & (f.cols > a.row_depth),
    ),
    # fields that need source ARRAY
    Rule(
        _F,
        "operand, a_unsigned, w_dep, psum_in or psum_out without source ARRAY",
        lambda f, a, kl: (
            (f.source != Source.ARRAY) & ((f.operand | f.a_unsigned | f.w_dep | f.psum_in | f.psum_out) != 0)
        ),
    ),
    Rule(
        _F,
        "a_rotate beyond the row groups, or without activations from memory",
        lambda f, a, kl: (
            (f.a_rotate >= a.row_groups) | ((f.a_rotate != 0) & ((f.operand != Operand.MEMORY) | (f.source == Source.ZERO)))
        ),
    ),
    Rule(_F, "w_dep with a sparse format", lambda f, a, kl: _sparse(f) & (f.w_dep == 1)),
    # destinations
    Rule(
        _F,
        "psum_out with post-processing or a destination",
        lambda f, a, kl: (
            (f.psum_out == 1)
            & (
                (f.out != Out.NONE)
                | (f.row_op != RowOp.NONE)
                | (f.residual != Residual.NONE)
                | (f.table == 1)
                | (f.scale == Scale.ROW)
            )
        ),
    ),
    Rule(
        _F,
        "out NONE without psum_out or MAX",
        lambda f, a, kl: _post(f) & (f.out == Out.NONE) & (f.row_op != RowOp.MAX),
    ),
    Rule(_F, "MAX with a destination", lambda f, a, kl: (f.row_op == RowOp.MAX) & (f.out != Out.NONE)),
    Rule(_F, "SOFTMAX or EXP without out LANES", lambda f, a, kl: _exponentials(f) & (f.out != Out.LANES)),
    Rule(
        _F,
        "out LANES without SOFTMAX or EXP",
        lambda f, a, kl: (f.out == Out.LANES) & (f.row_op != RowOp.SOFTMAX) & (f.row_op != RowOp.EXP),
    ),
    Rule(
        _F,
        "o_skip and o_drop leave no row, or out is not STORE8 or STORE16",
        lambda f, a, kl: (
            ((f.o_skip | f.o_drop) != 0)
            & ((f.o_skip + f.o_drop >= a.rows) | ((f.out != Out.STORE8) & (f.out != Out.STORE16)))
        ),
    ),
    Rule(_F, "STORE8T on an array whose rows are not its lanes", lambda f, a, kl: (f.out == Out.STORE8T) & int(not a.attention)),
    # row blocks
    Rule(
        _F,
        "row_first without MAX or EXP",
        lambda f, a, kl: (f.row_first == 1) & (f.row_op != RowOp.MAX) & (f.row_op != RowOp.EXP),
    ),
    Rule(_F, "row_last without EXP", lambda f, a, kl: (f.row_last == 1) & (f.row_op != RowOp.EXP)),
    # multipliers and shifts
    Rule(
        _F,
        "scale CONST: mult or shift out of range",
        lambda f, a, kl: _post(f) & (f.scale == Scale.CONST) & ((f.shift == 0) | (f.mult >= SIGN_BIT)),
    ),
    Rule(
        _F,
        "residual: r_mult or r_shift out of range",
        lambda f, a, kl: (
            (f.residual != Residual.NONE) & (f.residual < Residual.MUL8) & ((f.r_shift == 0) | (f.r_mult >= SIGN_BIT))
        ),
    ),
    Rule(_F, "residual MUL8 or MUL16 with scale ROW", lambda f, a, kl: _times(f) & (f.scale == Scale.ROW)),
    Rule(
        _F,
        "row operation: row_shift out of range",
        lambda f, a, kl: (_exponentials(f) | _norm(f)) & ((f.row_shift == 0) | (f.row_shift > ROW_SHIFT_MAX)),
    ),
    Rule(_F, "LAYERNORM: ln_shift is 0", lambda f, a, kl: (f.row_op == RowOp.LAYERNORM) & (f.ln_shift == 0)),
    # addresses
    Rule(
        _A,
        "a_addr",
        lambda f, a, kl: (
            ((_array(f) & (f.operand == Operand.MEMORY)) | (f.source == Source.STREAM))
            & _off(f.a_addr, a.rows)
        ),
    ),
    Rule(_A, "w_addr", lambda f, a, kl: _array(f) & _off(f.w_addr, a.lanes)),
    Rule(_A, "w_addr", lambda f, a, kl: _array(f) & (f.w_dep == 0) & _off(f.w_addr, constant_alignment(a))),
    Rule(_A, "w_stride", lambda f, a, kl: _array(f) & _off(f.w_stride, a.lanes)),
    Rule(_A, "x_addr", lambda f, a, kl: _sparse(f) & _off(f.x_addr, constant_alignment(a))),
    Rule(
        _A,
        "p_addr",
        lambda f, a, kl: _post(f) & (f.scale == Scale.COLUMN) & _off(f.p_addr, constant_alignment(a)),
    ),
    Rule(_A, "r_addr", lambda f, a, kl: (f.residual != Residual.NONE) & _off(f.r_addr, a.rows)),
    Rule(_A, "r_addr", lambda f, a, kl: _wide(f) & _off(f.r_addr, 2 * a.rows)),
    Rule(_A, "g_addr", lambda f, a, kl: _norm(f) & _off(f.g_addr, constant_alignment(a))),
    Rule(_A, "o_addr", lambda f, a, kl: _stores(f) & _off(f.o_addr, a.rows)),
    Rule(_A, "o_addr", lambda f, a, kl: (f.out == Out.STORE16) & _off(f.o_addr, 2 * a.rows)),
    Rule(_A, "o_stride", lambda f, a, kl: (f.out == Out.STORE8T) & _off(f.o_stride, a.rows)),
)
"""Rules of TILE. TABLE is malformed by reserved bits or p_addr only, HALT by reserved bits only."""


def raw_fields(raw: bytes) -> dict[str, int]:
    """Cut 64 bytes into raw field values and ``reserved``, without judging them."""
    if len(raw) != INSTRUCTION_BYTES:
        raise ValueError(f"an instruction has {INSTRUCTION_BYTES} bytes, not {len(raw)}")
    word, values = int.from_bytes(raw, "little"), {}
    for field in FIELDS:
        values[field.name] = word & ((1 << field.bits) - 1)
        word >>= field.bits
    values["reserved"] = word
    return values


def check_raw(fields: Mapping[str, int], arch: Arch) -> tuple[ErrorCode, str]:
    """Error code and text of the first broken rule; (NONE, "") for a well-formed instruction."""
    f = SimpleNamespace(**fields)
    if f.opcode not in (Opcode.TILE, Opcode.TABLE, Opcode.HALT):
        return ErrorCode.OPCODE, f"no operation has the code {f.opcode}"
    if f.opcode != Opcode.TILE:
        if f.reserved:
            return ErrorCode.FIELD, "reserved bits are set"
        if f.opcode == Opcode.TABLE and f.p_addr % constant_alignment(arch):
            return ErrorCode.ALIGNMENT, "p_addr"
        return ErrorCode.NONE, ""
    k_limit = arch.lane_depth if f.format == Format.DENSE else k_limits(arch)[min(f.m, MAX_M)]
    for rule in RULES:
        if rule.holds(f, arch, k_limit):
            return rule.code, rule.text
    return ErrorCode.NONE, ""


def check_instruction(instruction: Instruction, arch: Arch) -> ErrorCode:
    """Code with which the accelerator stops at this instruction for its own sake; NONE if it is well
    formed."""
    return check_raw(raw_fields(instruction.encode()), arch)[0]


@dataclass
class SequenceState:
    """What TILEs leave for later TILEs, in order: lengths of rows sent to the lanes, row scales, and the columns in the
    lanes (`k` and `a_unsigned` of the last TILE with source ARRAY).

    TILE with out LANES appends `cols` to the rows (SOFTMAX, EXP); SOFTMAX, and EXP with row_last, append a
    scale. Operand ROWS takes the oldest row, scale ROW the oldest scale. SEQUENCE errors: nothing to take, a
    row of another length than k, a row more than `MAX_PENDING_ROWS`, a scale more than that, operand HELD with another k
    or a_unsigned than those of the columns.
    """

    rows: tuple[int, ...] = ()
    scales: int = 0
    columns: tuple[int, int] = (0, 0)

    def step(self, instruction: Instruction) -> ErrorCode:
        """Check one well-formed TILE against the state and advance it; the state is unchanged after an
        error."""
        rows, scales, columns = self.rows, self.scales, self.columns
        if instruction.source == Source.ARRAY:
            columns = (instruction.k, instruction.a_unsigned)
            if instruction.operand == Operand.HELD and columns != self.columns:
                return ErrorCode.SEQUENCE
            if instruction.operand == Operand.ROWS:
                if not rows or rows[0] != instruction.k:
                    return ErrorCode.SEQUENCE
                rows = rows[1:]
        if instruction.scale == Scale.ROW and not instruction.psum_out:
            if not scales:
                return ErrorCode.SEQUENCE
            scales -= 1
        if instruction.out == Out.LANES:
            rows = (*rows, instruction.cols)
            scales += instruction.row_op == RowOp.SOFTMAX or instruction.row_last
        if max(len(rows), scales) > MAX_PENDING_ROWS:
            return ErrorCode.SEQUENCE
        self.rows, self.scales, self.columns = rows, int(scales), columns
        return ErrorCode.NONE
