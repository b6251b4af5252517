"""The instruction set, declared once.

Encoder, decoder, RTL fields, disassembler and the documentation page all come from `FIELDS` and the enums
below; no other file writes a width or an opcode. An instruction is 64 bytes, little endian, at a 64-byte
aligned address. `docs/isa.md` is generated from this module; `docs/numerics.md` says what TILE computes.
"""

import enum
from dataclasses import dataclass

from amaranth.lib import data

__all__ = [
    "FIELDS",
    "INSTRUCTION_BYTES",
    "ErrorCode",
    "Field",
    "Format",
    "Instruction",
    "Opcode",
    "Operand",
    "Out",
    "Residual",
    "RowOp",
    "Scale",
    "Source",
    "instruction_layout",
    "isa_markdown",
]

INSTRUCTION_BYTES = 64


class Opcode(enum.IntEnum):
    """What an instruction does. Zero is illegal, so that a jump into empty memory stops the machine."""

    ILLEGAL = 0
    TILE = 1  #: one row tile of a matmul or element-wise operation, with its post-processing
    TABLE = 2  #: load the 256-entry activation table from `p_addr`
    HALT = 3  #: wait for all stores, raise done


class Source(enum.IntEnum):
    """Where the int32 columns of a TILE come from."""

    ARRAY = 0  #: the lanes: sum over k of activation * weight
    STREAM = 1  #: the int8 columns at `a_addr` themselves (no weights)
    ZERO = 2  #: zero (only bias and residual count)


class Operand(enum.IntEnum):
    """Where the lanes' activations come from (source ARRAY)."""

    MEMORY = 0  #: `k` columns at `a_addr`
    ROWS = 1  #: the `k` columns that an earlier TILE with out LANES sent (softmax probabilities)
    HELD = 2  #: the `k` columns of the TILE with source ARRAY before this one: they are still in the lanes


class Format(enum.IntEnum):
    """How the weights of a TILE are stored."""

    DENSE = 0  #: every weight; `n`, `m` are ignored
    INDEX = 1  #: n values a group of m, each with ceil(log2 m) bits of position
    BITMAP = 2  #: n values a group of m, with m bits that mark the positions


class Scale(enum.IntEnum):
    """Where bias, multiplier and shift of the requantisation come from."""

    CONST = 0  #: fields `mult`, `shift`; bias 0
    COLUMN = 1  #: 8 bytes a column at `p_addr`
    ROW = 2  #: a multiplier and shift per token row, from the oldest unused softmax; bias 0


class Residual(enum.IntEnum):
    """Second operand, columns at `r_addr`: added to the requantised value, compared with it, or multiplied by it."""

    NONE = 0
    INT8 = 1
    INT16 = 2
    MAX8 = 3  #: int8; the larger of the two values instead of their sum
    MUL8 = 4  #: int8; the product: a part of the requantisation's multiplier, without `r_mult` and `r_shift`
    MUL16 = 5  #: int16; the product


class RowOp(enum.IntEnum):
    """What the row unit does with the requantised int16 columns."""

    NONE = 0
    SOFTMAX = 1  #: maximum, then exponentials and their sum
    MAX = 2  #: only update the running row maximum; no output
    EXP = 3  #: exponentials against the running maximum, sum them
    LAYERNORM = 4
    RMSNORM = 5


class Out(enum.IntEnum):
    """Where the result goes."""

    NONE = 0  #: nowhere (partial sums, MAX)
    STORE8 = 1  #: memory, int8, `rows` bytes a column
    STORE16 = 2  #: memory, int16, 2 * `rows` bytes a column
    STORE8T = 3  #: memory, int8, transposed in blocks of `lanes` columns: `rows` words of `lanes` bytes each
    LANES = 4  #: the lanes, as activations of a later TILE with operand ROWS




class ErrorCode(enum.IntEnum):
    """Value of the ERROR register after a stop."""

    NONE = 0
    OPCODE = 1  #: unknown opcode
    FIELD = 2  #: a field outside its range, fields that contradict each other, reserved bits set
    ALIGNMENT = 3  #: an address that is not aligned as its field asks
    SEQUENCE = 4  #: operand ROWS or HELD or scale ROW without the earlier TILE that feeds it, or of another length
    BUS = 5  #: the memory answered with an error
    TIMEOUT = 6  #: no progress for the number of cycles in the WATCHDOG register
    END = 7  #: the program ended without HALT


@dataclass(frozen=True)
class Field:
    """One bit field: name, width in bits, enum of its values if it has names, one line of meaning."""

    name: str
    bits: int
    doc: str
    kind: type[enum.IntEnum] | None = None


FIELDS: tuple[Field, ...] = (
    Field("opcode", 3, "operation", Opcode),
    Field("source", 2, "where the int32 columns come from", Source),
    Field("operand", 2, "where the lanes' activations come from", Operand),
    Field("a_unsigned", 1, "activations are 0..255 instead of -128..127"),
    Field("format", 2, "weight format", Format),
    Field("w_dep", 1, "the weights, too, wait for `dep` (they are activations: keys or values)"),
    Field("psum_in", 1, "add the partial sums kept on chip"),
    Field("psum_out", 1, "keep the sums on chip instead of post-processing them; out must be NONE"),
    Field("scale", 2, "where multiplier and shift come from", Scale),
    Field("residual", 3, "second operand", Residual),
    Field("table", 1, "look the int8 value up in the activation table"),
    Field("row_op", 3, "row operation", RowOp),
    Field("row_first", 1, "MAX, EXP: first block of the row (reset maximum or sum)"),
    Field("row_last", 1, "EXP: last block of the row (the row scale is complete)"),
    Field("out", 3, "destination", Out),
    Field("n", 6, "N of N:M"),
    Field("m", 6, "M of N:M"),
    Field("dep", 15, "wait until the instruction `dep` places before this one has completed; 0: no wait"),
    Field("k", 16, "reduction length: columns of activations"),
    Field("cols", 16, "output columns"),
    Field("mult", 16, "scale CONST: multiplier, 0..32767"),
    Field("shift", 6, "scale CONST: right shift, 1..63"),
    Field("r_mult", 16, "residual multiplier, 0..32767"),
    Field("r_shift", 6, "residual right shift, 1..63"),
    Field("row_mult", 16, "row operation: multiplier of the row scale, 0..65535"),
    Field("row_shift", 6, "row operation: shift of the row scale, 1..40"),
    Field("ln_inv", 16, "LAYERNORM: 64 / cols = ln_inv * 2^-ln_shift"),
    Field("ln_shift", 6, "LAYERNORM: see ln_inv"),
    Field("ln_eps", 32, "LAYERNORM, RMSNORM: epsilon, in units of cols^2 * (input LSB)^2"),
    Field("a_addr", 32, "activations: `rows` bytes a column, contiguous"),
    Field("w_addr", 32, "weight values: `lanes` bytes a step"),
    Field("w_stride", 32, "bytes from one column tile's weights to the next"),
    Field("x_addr", 32, "weight positions: 4 * `lanes` bytes a word, contiguous"),
    Field("p_addr", 32, "column parameters, 8 bytes a column; TABLE: 256 bytes"),
    Field("r_addr", 32, "residual columns"),
    Field("g_addr", 32, "LAYERNORM, RMSNORM: gamma and beta, 8 bytes a column, laid out as column parameters; else, of "
                        "activations from memory: bit g set: row group g is zero"),
    Field("o_addr", 32, "output"),
    Field("o_stride", 32, "STORE8T: bytes from one block of `lanes` columns to the next"),
    Field("o_skip", 6, "STORE8, STORE16: so many token rows at the start of each column keep their bytes in memory"),
    Field("o_drop", 6, "STORE8, STORE16: so many token rows at the end of each column keep their bytes in memory"),
    Field("a_rotate", 5, "activations from memory: row group g has those stored in group (g + a_rotate) mod (row groups)"),
)

_BITS = sum(field.bits for field in FIELDS)
if _BITS > 8 * INSTRUCTION_BYTES:
    raise RuntimeError(f"instruction fields take {_BITS} bits, more than {8 * INSTRUCTION_BYTES}")


def instruction_layout() -> data.StructLayout:
    """Layout of an instruction in hardware; ``reserved`` fills it up to 64 bytes."""
    members: dict[str, int] = {field.name: field.bits for field in FIELDS}
    if _BITS < 8 * INSTRUCTION_BYTES:
        members["reserved"] = 8 * INSTRUCTION_BYTES - _BITS
    return data.StructLayout(members)


class Instruction:
    """One instruction as a value: ``Instruction(opcode=Opcode.TILE, k=64, ...)``; absent fields are zero.

    Raises
    ------
    TypeError
        An unknown field name.
    ValueError
        A value that does not fit its field.
    """

    __slots__ = ("_values",)

    def __init__(self, **values: int) -> None:
        unknown = sorted(set(values) - {field.name for field in FIELDS})
        if unknown:
            raise TypeError(f"unknown instruction field {unknown[0]!r}")
        self._values: dict[str, int] = {}
        for field in FIELDS:
            value = int(values.get(field.name, 0))
            if not 0 <= value < 1 << field.bits:
                raise ValueError(f"instruction field {field.name} has {field.bits} bits: {value} does not fit")
            if field.kind is not None:
                try:
                    value = field.kind(value)
                except ValueError:
                    raise ValueError(f"instruction field {field.name}: {value} is no {field.kind.__name__}") from None
            self._values[field.name] = value

    def __getattr__(self, name: str) -> int:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(name) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instruction) and self._values == other._values

    def __hash__(self) -> int:
        return hash(tuple(self._values.values()))

    def __repr__(self) -> str:
        parts = [f"{name}={value!s}" for name, value in self._values.items() if value and name != "opcode"]
        return f"Instruction({', '.join([self.opcode.name, *parts])})"  # type: ignore[attr-defined]

    def encode(self) -> bytes:
        """The 64 bytes."""
        word, offset = 0, 0
        for field in FIELDS:
            word |= int(self._values[field.name]) << offset
            offset += field.bits
        return word.to_bytes(INSTRUCTION_BYTES, "little")

    @classmethod
    def decode(cls, raw: bytes) -> "Instruction":
        """Inverse of `encode`.

        Raises
        ------
        ValueError
            Not 64 bytes, an enum field without a name, or reserved bits set.
        """
        if len(raw) != INSTRUCTION_BYTES:
            raise ValueError(f"an instruction has {INSTRUCTION_BYTES} bytes, not {len(raw)}")
        word, values = int.from_bytes(raw, "little"), {}
        for field in FIELDS:
            values[field.name] = word & ((1 << field.bits) - 1)
            word >>= field.bits
        if word:
            raise ValueError("reserved bits of the instruction are set")
        return cls(**values)


def isa_markdown() -> str:
    """Text of ``docs/isa.md``, derived from the declarations above."""
    lines = [
        "# Instructions", "",
        "Generated from `hw/isa.py` (`python -m hw.isa > docs/isa.md`). What TILE computes is in `numerics.md`, what makes an",
        "instruction malformed in `hw/isa_check.py`.", "",
        f"An instruction has {INSTRUCTION_BYTES} bytes, little endian, at a {INSTRUCTION_BYTES}-byte aligned address.", "",
        "| bits | field | meaning |", "|---|---|---|",
    ]
    offset = 0
    for field in FIELDS:
        bits = f"{offset}" if field.bits == 1 else f"{offset + field.bits - 1}..{offset}"
        kind = f" ({field.kind.__name__})" if field.kind else ""
        lines.append(f"| {bits} | {field.name} | {field.doc}{kind} |")
        offset += field.bits
    lines.append(f"| {8 * INSTRUCTION_BYTES - 1}..{offset} | reserved | zero |")
    for kind in (Opcode, Source, Operand, Format, Scale, Residual, RowOp, Out, ErrorCode):
        lines += ["", f"## {kind.__name__}", "", *(kind.__doc__ or "").splitlines(), "", "| value | name |", "|---|---|"]
        lines += [f"| {member.value} | {member.name} |" for member in kind]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(isa_markdown(), end="")
