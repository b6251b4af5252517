"""The rules of `hw.isa_check` on a whole program at once: a timing model never sees a malformed instruction."""

from types import SimpleNamespace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from hw.arch import Arch
from hw.isa import FIELDS, INSTRUCTION_BYTES, ErrorCode, Format, Instruction, Opcode, Operand, Out, Scale, Source
from hw.isa_check import MAX_M, RULES, SequenceState, constant_alignment, k_limits
from sim.engine import AcceleratorError

__all__ = ["check_code", "code_fields"]


def code_fields(code: bytes) -> dict[str, NDArray[np.int64]]:
    """Fields of all instructions, and ``reserved``: int64 (instructions,)."""
    words = np.frombuffer(code, "<u8").reshape(-1, INSTRUCTION_BYTES // 8)
    fields, offset = {}, 0
    for name, bits in (*((field.name, field.bits) for field in FIELDS), ("reserved", None)):
        bits = bits or 8 * INSTRUCTION_BYTES - offset
        word, shift = divmod(offset, 64)
        value = words[:, word] >> np.uint64(shift)
        if shift + bits > 64:
            value = value | words[:, word + 1] << np.uint64(64 - shift)
        fields[name] = (value & np.uint64((1 << bits) - 1)).astype(np.int64)
        offset += bits
    return fields


def check_code(code: bytes, arch: Arch, address: int = 0) -> NDArray[np.int64]:
    """Check a program as the dispatcher would; the indices of its instructions that store.

    Raises
    ------
    AcceleratorError
        What the RTL would report, with the address of the instruction.
    """
    fields = code_fields(code)
    codes = _codes(fields, arch)
    halts = np.flatnonzero((fields["opcode"] == Opcode.HALT) & (codes == ErrorCode.NONE))
    end = int(halts[0]) if len(halts) else len(codes)
    wrong = np.flatnonzero(codes[:end])
    first = int(wrong[0]) if len(wrong) else end
    sequence = _first_out_of_sequence(fields, first)
    if sequence is not None:
        raise _error(ErrorCode.SEQUENCE, sequence, code, address)
    if len(wrong):
        raise _error(ErrorCode(int(codes[first])), first, code, address)
    if not len(halts):
        raise _error(ErrorCode.END, end, code, address)
    stores = np.isin(fields["out"][:end], (Out.STORE8, Out.STORE16, Out.STORE8T))
    return np.flatnonzero(stores & (fields["opcode"][:end] == Opcode.TILE))


def _error(code: ErrorCode, index: int, raw: bytes, address: int) -> AcceleratorError:
    at = index * INSTRUCTION_BYTES
    return AcceleratorError(code, address + at, raw[at : at + INSTRUCTION_BYTES])


def _codes(fields: dict[str, NDArray[np.int64]], arch: Arch) -> NDArray[np.int64]:
    """Error code of each instruction by itself: `hw.isa_check.check_raw`, whose rules work on arrays, too."""
    f = SimpleNamespace(**fields)
    limit = np.where(f.format == Format.DENSE, arch.lane_depth, np.array(k_limits(arch))[np.minimum(f.m, MAX_M)])
    codes = np.zeros(len(f.opcode), np.int64)
    for rule in reversed(RULES):
        codes[np.asarray(rule.holds(f, arch, limit), bool)] = rule.code
    misaligned = (f.opcode == Opcode.TABLE) & (f.p_addr % constant_alignment(arch) != 0)
    plain = np.where(f.reserved != 0, ErrorCode.FIELD, np.where(misaligned, ErrorCode.ALIGNMENT, ErrorCode.NONE))
    known = np.isin(f.opcode, (Opcode.TILE, Opcode.TABLE, Opcode.HALT))
    return np.where(~known, ErrorCode.OPCODE, np.where(f.opcode == Opcode.TILE, codes, plain))


def _first_out_of_sequence(fields: dict[str, NDArray[np.int64]], end: int) -> int | None:
    """Index of the first TILE before `end` that does not fit the rows, scales and columns left by earlier ones."""
    f = SimpleNamespace(**{name: values[:end] for name, values in fields.items()})
    array, tile = f.source == Source.ARRAY, f.opcode == Opcode.TILE
    uses = (array & (f.operand == Operand.ROWS)) | ((f.scale == Scale.ROW) & (f.psum_out == 0)) | (f.out == Out.LANES)
    holds = array & np.any(tile & array & (f.operand == Operand.HELD))
    touching = np.flatnonzero(tile & (uses | holds))
    names = ("source", "operand", "k", "a_unsigned", "scale", "psum_out", "out", "cols", "row_op", "row_last")
    columns = [fields[name][touching].tolist() for name in names]
    state, one = SequenceState(), SimpleNamespace()
    for index, values in zip(touching.tolist(), zip(*columns)):
        one.__dict__.update(zip(names, values))
        if state.step(cast(Instruction, one)) != ErrorCode.NONE:
            return int(index)
    return None
