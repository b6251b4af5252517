"""Reading a program back: disassembly of code bytes, cycle bounds, and the listing of a whole program with
its tensors' names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from compiler.pack import position_words
from compiler.program import OperatorInfo, Program, TensorInfo
from hw.arch import Arch
from hw.isa import (
    FIELDS,
    INSTRUCTION_BYTES,
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

__all__ = ["Bound", "bound", "bound_of", "disassemble", "listing", "to_text"]

_ADDRESSES = ("a_addr", "w_addr", "x_addr", "p_addr", "r_addr", "g_addr", "o_addr")
_NAMED = tuple(field for field in FIELDS if field.kind is not None and field.name != "opcode")
_NUMBERS = tuple(f for f in FIELDS if f.kind is None and not f.name.endswith("_addr"))


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Cycles that each unit of the accelerator is busy at the least; units overlap, so the largest is the
    bound.

    load: columns into the lanes. array: steps. post: columns through post-processing. store: columns written.
    bus: bytes read and written, over the width of the bus. fetch: bytes read alone.
    """

    load: int = 0
    array: int = 0
    post: int = 0
    store: int = 0
    bus: int = 0
    fetch: int = 0

    def __add__(self, other: Bound) -> Bound:
        return Bound(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    @property
    def cycles(self) -> int:
        """Busiest unit's cycles."""
        return max(asdict(self).values())

    @property
    def unit(self) -> str:
        """Busiest unit; the array if it is one of them."""
        units = asdict(self)
        return "array" if units["array"] == self.cycles else max(units, key=lambda name: units[name])


def bound(instruction: Instruction, arch: Arch) -> Bound:
    """Least busy cycles of each unit for one instruction."""
    if instruction.opcode != Opcode.TILE:
        words = 256 if instruction.opcode == Opcode.TABLE else 0
        return Bound(post=words // 8, bus=_beats(words, arch), fetch=_beats(words, arch))
    i, rows, lanes = instruction, arch.rows, arch.lanes
    in_array = i.source == Source.ARRAY
    tiles = -(-i.cols // lanes)
    steps, words = 0, 0
    if in_array:
        sparse = i.format != Format.DENSE
        steps = -(-i.k // i.m) * i.n if sparse else i.k
        words = position_words(Format(i.format), n=i.n, m=i.m, k=i.k) if sparse else 0
    load = (0 if i.operand == Operand.HELD else i.k) if in_array else i.cols if i.source == Source.STREAM else 0
    stored = {Out.STORE8: i.cols, Out.STORE16: i.cols, Out.STORE8T: tiles * rows}.get(Out(i.out), 0)
    written = rows * stored * (2 if i.out == Out.STORE16 else 1)
    columns = 0 if i.residual == Residual.NONE else i.cols * (2 if i.residual in (Residual.INT16, Residual.MUL16) else 1)
    from_memory = 0 if in_array and i.operand == Operand.ROWS else load
    params = (
        8
        * i.cols
        * ((i.scale == Scale.COLUMN and not i.psum_out) + (i.row_op in (RowOp.LAYERNORM, RowOp.RMSNORM)))
    )
    fetched = tiles * lanes * (steps + 4 * words) + rows * (from_memory + columns) + params
    return Bound(load=load, array=tiles * steps, post=i.cols, store=stored, bus=_beats(fetched + written, arch),
                 fetch=_beats(fetched, arch))


def bound_of(instructions: Iterable[Instruction], arch: Arch) -> Bound:
    """Sum over instructions, unit by unit: the bound when everything overlaps."""
    total = Bound()
    for instruction in instructions:
        total += bound(instruction, arch)
    return total


def _beats(size: int, arch: Arch) -> int:
    """Bus cycles for that many bytes."""
    return -(-size // arch.bus_bytes)


def to_text(instruction: Instruction) -> str:
    """One line of assembly: opcode, then every field that is not zero; names for enums, hexadecimal
    addresses."""
    parts = [Opcode(instruction.opcode).name]
    for field in FIELDS[1:]:
        value = getattr(instruction, field.name)
        if not value:
            continue
        if field.kind is not None:
            parts.append(f"{field.name}={field.kind(value).name}")
        else:
            parts.append(
                f"{field.name}={value:#x}" if field.name.endswith("_addr") else f"{field.name}={value}"
            )
    return " ".join(parts)


def disassemble(code: bytes) -> list[str]:
    """One line for each 64 bytes; what does not decode is shown as such, with its first bytes.

    Raises
    ------
    ValueError
        Not whole instructions.
    """
    if len(code) % INSTRUCTION_BYTES:
        raise ValueError(f"code must be a multiple of {INSTRUCTION_BYTES} bytes, not {len(code)}")
    lines = []
    for at in range(0, len(code), INSTRUCTION_BYTES):
        raw = code[at : at + INSTRUCTION_BYTES]
        try:
            lines.append(to_text(Instruction.decode(raw)))
        except ValueError as error:
            lines.append(f".bytes {raw[:8].hex()}... ; {error}")
    return lines


def listing(program: Program) -> str:
    """The whole program as text: memory map, then operator by operator its instructions with cycle bounds and
    tensor names."""
    arch = program.arch
    lines = [repr(program), "", *_memory_map(program), ""]
    owners = {
        i: operator
        for operator in program.operators
        for start, stop in operator.spans
        for i in range(start, stop)
    }
    current: OperatorInfo | None = None
    for index, instruction in enumerate(program.instructions):
        owner = owners.get(index)
        if owner is not current and owner is not None:
            lines += ["", _headline(owner, program)]
            current = owner
        cost = bound(instruction, arch)
        names = ", ".join(_references(index, instruction, program))
        lines.append(
            f"{index:6}  {cost.cycles:7} {cost.unit:5}  {to_text(instruction)}"
            + (f"  ; {names}" if names else "")
        )
    total = bound_of(program.instructions, arch)
    lines += [
        "",
        f"bound: {total.cycles} cycles ({total.unit}); "
        + ", ".join(f"{n} {v}" for n, v in asdict(total).items()),
    ]
    return "\n".join(lines) + "\n"


def _memory_map(program: Program) -> list[str]:
    lines = [
        f"{program.code_address:#010x}  {len(program.code):9}  code",
        f"{program.constants_address:#010x}  {len(program.constants):9}  constants",
    ]
    for info in sorted(
        (t for t in program.tensors if t.layout != "keymask"), key=lambda t: (t.address, t.written)
    ):
        shape = "x".join(map(str, info.shape))
        lines.append(
            f"{info.address:#010x}  {info.nbytes(program.arch):9}  {info.name}: {info.dtype} {shape} {info.layout}, "
            f"instructions {info.written}..{info.last_use}"
        )
    for mask in program.masks:
        lines.append(
            f"{mask.address:#010x}  {mask.batch * mask.stride:9}  key mask parameters of {mask.tensor}"
        )
    return lines


def _headline(operator: OperatorInfo, program: Program) -> str:
    cost = Bound()
    for start, stop in operator.spans:
        cost += bound_of(program.instructions[start:stop], program.arch)
    what = " x ".join(map(str, operator.shape)) + (
        f", {operator.pattern} {operator.weight_format}" if operator.pattern else ""
    )
    source = f" ({operator.source})" if operator.source else ""
    return f"# {operator.name}{source}: {operator.kind} {what}; bound {cost.cycles} cycles ({cost.unit})"


def _references(index: int, instruction: Instruction, program: Program) -> list[str]:
    """What the address fields point at: ``o=name+offset``."""
    found = []
    for name in _ADDRESSES:
        address = getattr(instruction, name)
        if not address:
            continue
        offset = address - program.constants_address
        if 0 <= offset < len(program.constants):
            found.append(f"{name[0]}=constants+{offset:#x}")
        elif (info := _tensor_at(address, index, program)) is not None:
            found.append(f"{name[0]}={info.name}+{address - info.address:#x}")
    return found


def _tensor_at(address: int, index: int, program: Program) -> TensorInfo | None:
    """The tensor that has an address at the time of an instruction: of those that share it, the next one to
    end."""
    there = [t for t in program.tensors if t.address <= address < t.address + t.nbytes(program.arch)]
    live = [t for t in there if max(t.written, t.last_use) >= index]
    return min(live, key=lambda t: max(t.written, t.last_use), default=None)
