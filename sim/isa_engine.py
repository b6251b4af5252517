"""The ISA engine: executes a program instruction by instruction on a memory image, exact to the byte, without
time.

It reads everything from memory, as the accelerator does: instructions, packed weights and their positions,
parameters. Nothing is shared with the compiler's packing or planning. Arithmetic: `docs/numerics.md`, by way
of `hw.numerics` and `hw.row`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw.arch import Arch
from hw.isa import (
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
from hw.isa_check import SequenceState, check_raw, raw_fields
from hw.numerics import PARAM_DTYPE, requantise, residual_add, residual_max, residual_multiplier, saturate, table_lookup
from hw.row import exp_rows, layernorm_rows, max_rows, row_scale_softmax

__all__ = ["IsaError", "IsaResult", "run_isa"]

Int = NDArray[np.int64]
Bytes = NDArray[np.uint8]

FLOAT32_EXACT = 1 << 24
WORD_BITS = 32
CACHED_WEIGHTS = 48
MASKED = -32768


class IsaError(RuntimeError):
    """The program stopped at a malformed instruction: `code` and `address` are those of the accelerator's
    registers."""

    def __init__(self, code: ErrorCode, address: int, index: int, text: str) -> None:
        super().__init__(f"{code.name} error at instruction {index} (address {address:#x}): {text}")
        self.code, self.address, self.index = code, address, index


@dataclass(frozen=True, kw_only=True)
class IsaResult:
    """End of a run: instructions completed (HALT included), and the error that stopped it, if any."""

    instructions: int
    error: IsaError | None = None

    @property
    def code(self) -> ErrorCode:
        """NONE after HALT."""
        return ErrorCode.NONE if self.error is None else self.error.code

    def raise_for_error(self) -> None:
        """Raise the `IsaError`, if there is one."""
        if self.error is not None:
            raise self.error


def run_isa(
    image: Bytes,
    *,
    arch: Arch,
    code_addr: int,
    instructions: int,
    after: Callable[[int, Instruction], None] | None = None,
) -> IsaResult:
    """Run a program.

    Parameters
    ----------
    image
        uint8 (bytes of memory), changed in place.
    arch
        The accelerator.
    code_addr, instructions
        Address of the first instruction, and how many there are: the program ends at HALT, or with an END
        error after the last one.
    after
        Called after each completed instruction with its index; may look at the image.

    Returns
    -------
    IsaResult
        Errors of the program are in the result, not raised. An access outside the image is a BUS error.
    """
    if image.dtype != np.uint8 or image.ndim != 1 or not image.flags.writeable:
        raise TypeError("image must be a writeable one-dimensional uint8 array")
    machine = _Machine(image, arch)
    for index in range(instructions):
        address = code_addr + index * INSTRUCTION_BYTES
        try:
            instruction = machine.fetch(address)
            if instruction.opcode == Opcode.HALT:
                return IsaResult(instructions=index + 1)
            machine.execute(instruction)
        except _Stop as stop:
            return IsaResult(instructions=index, error=IsaError(stop.code, address, index, stop.text))
        if after is not None:
            after(index, instruction)
    end = code_addr + instructions * INSTRUCTION_BYTES
    return IsaResult(
        instructions=instructions,
        error=IsaError(ErrorCode.END, end, instructions, "the program ended without HALT"),
    )


class _Stop(Exception):
    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


class _Machine:
    """Architectural state. Columns are the first axis everywhere: arrays are (columns, rows), as in
    memory."""

    def __init__(self, image: Bytes, arch: Arch) -> None:
        self.image, self.arch = image, arch
        self.psum = np.zeros((arch.psum_depth, arch.rows), np.int32)
        self.table = np.zeros(256, np.int8)
        self.maximum: Int = np.full(arch.rows, MASKED, np.int64)
        self.total: Int = np.zeros(arch.rows, np.int64)
        self.sequence = SequenceState()
        self.rows: list[Bytes] = []  # sent to the lanes, not used yet
        self.held: Bytes = np.zeros((0, arch.rows), np.uint8)  # the columns in the lanes
        self.scales: list[tuple[Int, Int]] = []
        self.decoded: OrderedDict[tuple[int, ...], tuple[Bytes, Bytes, NDArray[np.float32]]] = OrderedDict()

    # -- memory ----------------------------------------------------------------------------------------------

    def view(self, address: int, size: int) -> Bytes:
        """`size` bytes of memory."""
        if address + size > len(self.image):
            raise _Stop(
                ErrorCode.BUS,
                f"access to {address:#x}..{address + size:#x}, memory has {len(self.image):#x} bytes",
            )
        return self.image[address : address + size]

    def blocks(self, address: int, stride: int, count: int, size: int) -> Bytes:
        """`count` pieces of `size` bytes, `stride` apart: (count, size)."""
        if stride == size:
            return self.view(address, count * size).reshape(count, size)
        return np.stack([self.view(address + i * stride, size) for i in range(count)])

    def columns(self, address: int, count: int, dtype: str) -> NDArray[np.integer]:
        """Columns as stored: (count, rows)."""
        size = count * self.arch.rows * np.dtype(dtype).itemsize
        return self.view(address, size).view(dtype).reshape(count, self.arch.rows)

    def params(self, address: int, count: int) -> NDArray[np.void]:
        """Column parameters; fields (count, 1), int64."""
        return self.view(address, count * PARAM_DTYPE.itemsize).view(PARAM_DTYPE)[:, None]

    # -- instructions ----------------------------------------------------------------------------------------

    def fetch(self, address: int) -> Instruction:
        """Read and check an instruction."""
        raw = self.view(address, INSTRUCTION_BYTES).tobytes()
        code, text = check_raw(raw_fields(raw), self.arch)
        if code != ErrorCode.NONE:
            raise _Stop(code, text)
        try:
            return Instruction.decode(raw)
        except ValueError as error:  # an unused field of TABLE or HALT
            raise _Stop(ErrorCode.FIELD, str(error)) from None

    def execute(self, ins: Instruction) -> None:
        """Execute a well-formed TILE or TABLE."""
        if ins.opcode == Opcode.TABLE:
            self.table = self.view(ins.p_addr, 256).view(np.int8).copy()
            return
        before = self.sequence
        self.sequence = replace(before)
        if self.sequence.step(ins) != ErrorCode.NONE:
            raise _Stop(
                ErrorCode.SEQUENCE,
                f"rows waiting {before.rows}, row scales waiting {before.scales}, columns held {before.columns[0]}, operand "
                f"{Operand(ins.operand).name}, k {ins.k}, scale {Scale(ins.scale).name}, "
                f"out {Out(ins.out).name}",
            )
        acc = self.accumulate(ins)
        if ins.psum_in:
            acc = acc + self.psum[: ins.cols]
        if ins.psum_out:
            self.psum[: ins.cols] = acc.astype(np.int32)
            return
        values = self.post(ins, acc)
        values = self.row_operation(ins, values)
        self.store(ins, values)

    def accumulate(self, ins: Instruction) -> Int:
        """Step 1: int64 (cols, rows), not yet wrapped."""
        if ins.source == Source.ZERO:
            return np.zeros((ins.cols, self.arch.rows), np.int64)
        if ins.source == Source.STREAM:
            return self.window(ins, ins.cols).view(np.int8).astype(np.int64)
        if ins.operand == Operand.ROWS:
            self.held = self.rows.pop(0)
        elif ins.operand == Operand.MEMORY:
            self.held = self.window(ins, ins.k).copy()  # memory may change before they are used again
        activations = self.held if ins.a_unsigned else self.held.view(np.int8)
        weights = self.dense_weights(ins) if ins.format == Format.DENSE else self.sparse_weights(ins)
        kind = np.float32 if ins.k * 128 * (255 if ins.a_unsigned else 128) <= FLOAT32_EXACT else np.float64
        product = weights.astype(kind, copy=False) @ activations.astype(kind)
        return product.astype(np.int64)

    def window(self, ins: Instruction, count: int) -> Bytes:
        """Activations from memory, row groups in the places where the instruction wants them: (count, rows)."""
        columns, groups = self.columns(ins.a_addr, count, "u1"), self.arch.row_groups
        zero = 0 if ins.row_op in (RowOp.LAYERNORM, RowOp.RMSNORM) else ins.g_addr & ((1 << groups) - 1)
        if not ins.a_rotate and not zero:
            return columns.astype(np.uint8, copy=False)
        turned = np.roll(columns.reshape(count, groups, -1), -ins.a_rotate, axis=1)
        turned[:, [bool(zero >> group & 1) for group in range(groups)]] = 0
        return turned.reshape(count, -1).astype(np.uint8, copy=False)

    def post(self, ins: Instruction, acc: Int) -> Int:
        """Steps 2 to 4: requantisation, residual, table."""
        bias: Any = 0
        mult, shift = (ins.mult, ins.shift) if ins.scale != Scale.ROW else self.scales.pop(0)
        if ins.scale == Scale.COLUMN:
            params = self.params(ins.p_addr, ins.cols)
            bias, mult, shift = params["bias"], params["mult"], params["shift"]
        residual = self.residual(ins)
        if ins.residual in (Residual.MUL8, Residual.MUL16):
            values = requantise(acc, bias, residual_multiplier(residual, mult, 8 * residual.itemsize), shift)
        else:
            values = requantise(acc, bias, mult, shift)
            if ins.residual != Residual.NONE:
                join = residual_max if ins.residual == Residual.MAX8 else residual_add
                values = join(values, residual, ins.r_mult, ins.r_shift)
        return table_lookup(values, self.table) if ins.table else values

    def residual(self, ins: Instruction) -> NDArray[np.integer]:
        """The second operand (cols, rows); empty without one."""
        if ins.residual == Residual.NONE:
            return np.zeros(0, np.int8)
        wide = ins.residual in (Residual.INT16, Residual.MUL16)
        return self.columns(ins.r_addr, ins.cols, "<i2" if wide else "i1")

    def row_operation(self, ins: Instruction, values: Int) -> Int:
        """Step 5; values (cols, rows)."""
        if ins.row_op == RowOp.NONE:
            return values
        if ins.row_op in (RowOp.LAYERNORM, RowOp.RMSNORM):
            params = self.params(ins.g_addr, ins.cols)[:, 0]
            return layernorm_rows(
                values.T,
                params["mult"],
                params["bias"],
                params["shift"],
                ln_inv=ins.ln_inv,
                ln_shift=ins.ln_shift,
                eps=ins.ln_eps,
                row_mult=ins.row_mult,
                row_shift=ins.row_shift,
                rms=ins.row_op == RowOp.RMSNORM,
            ).T
        whole = ins.row_op == RowOp.SOFTMAX
        if whole or ins.row_op == RowOp.MAX:
            fresh = whole or ins.row_first
            self.maximum = max_rows(values.T, MASKED) if fresh else max_rows(values.T, self.maximum)
            if not whole:
                return values
        total = 0 if whole or ins.row_first else self.total
        p, self.total = exp_rows(values.T, self.maximum, total)
        if whole or ins.row_last:
            self.scales.append(row_scale_softmax(self.total, ins.row_mult, ins.row_shift))
        return p.T

    def store(self, ins: Instruction, values: Int) -> None:
        """Step 6."""
        kept = slice(ins.o_skip, self.arch.rows - ins.o_drop)
        if ins.out == Out.LANES:
            self.rows.append((values & 0xFF).astype(np.uint8))
        elif ins.out == Out.STORE16:
            self.columns(ins.o_addr, ins.cols, "<i2")[:, kept] = values[:, kept]
        elif ins.out == Out.STORE8:
            self.columns(ins.o_addr, ins.cols, "i1")[:, kept] = saturate(values[:, kept], 8)
        elif ins.out == Out.STORE8T:
            self.store_transposed(ins, saturate(values, 8).astype(np.int8))

    def store_transposed(self, ins: Instruction, values: NDArray[np.int8]) -> None:
        """Blocks of `lanes` columns as `rows` words of `lanes` bytes; columns that are missing in the last
        block are zero."""
        rows, lanes = self.arch.rows, self.arch.lanes
        for block, start in enumerate(range(0, ins.cols, lanes)):
            part = values[start : start + lanes]
            words = (
                self.view(ins.o_addr + block * ins.o_stride, rows * lanes).view(np.int8).reshape(rows, lanes)
            )
            words[:, : len(part)], words[:, len(part) :] = part.T, 0

    # -- weights ---------------------------------------------------------------------------------------------

    def dense_weights(self, ins: Instruction) -> NDArray[np.float32]:
        """(cols, k)"""
        lanes = self.arch.lanes
        tiles = -(-ins.cols // lanes)
        raw = self.blocks(ins.w_addr, ins.w_stride, tiles, ins.k * lanes)
        key = (ins.w_addr, ins.w_stride, ins.k, ins.cols)
        cached = self.cached(key, raw, raw[:0])
        if cached is None:
            values = raw.view(np.int8).reshape(tiles, ins.k, lanes).transpose(0, 2, 1)
            cached = self.remember(
                key, raw, raw[:0], values.reshape(tiles * lanes, ins.k)[: ins.cols].astype(np.float32)
            )
        return cached

    def sparse_weights(self, ins: Instruction) -> NDArray[np.float32]:
        """(cols, k): every value added at the column its position names. Positions beyond k meet no
        activation."""
        lanes = self.arch.lanes
        tiles, groups = -(-ins.cols // lanes), -(-ins.k // ins.m)
        bits = max(1, (ins.m - 1).bit_length()) if ins.format == Format.INDEX else ins.m
        each = WORD_BITS // bits
        words = -(-(groups * ins.n if ins.format == Format.INDEX else groups) // each)
        raw = self.blocks(ins.w_addr, ins.w_stride, tiles, groups * ins.n * lanes)
        raw_words = self.view(ins.x_addr, tiles * words * 4 * lanes)
        key = (ins.w_addr, ins.w_stride, ins.x_addr, ins.format, ins.n, ins.m, ins.k, ins.cols)
        cached = self.cached(key, raw, raw_words)
        if cached is not None:
            return cached
        fields = _unpack_fields(raw_words.view("<u4").reshape(tiles, words, lanes), bits)
        if ins.format == Format.INDEX:
            positions = fields[:, : groups * ins.n].reshape(tiles, groups, ins.n, lanes)
        else:
            positions = _bitmap_positions(fields[:, :groups], ins.n)
        values = raw.view(np.int8).reshape(tiles, groups, ins.n, lanes)
        return self.remember(key, raw, raw_words, _scatter(values, positions, ins.m)[: ins.cols, : ins.k])

    def cached(self, key: tuple[int, ...], values: Bytes, words: Bytes) -> NDArray[np.float32] | None:
        """Decoded weights, if the bytes they came from have not changed."""
        entry = self.decoded.get(key)
        if entry is None or not (np.array_equal(entry[0], values) and np.array_equal(entry[1], words)):
            return None
        self.decoded.move_to_end(key)
        return entry[2]

    def remember(
        self, key: tuple[int, ...], values: Bytes, words: Bytes, matrix: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Keep decoded weights for the next row tile."""
        self.decoded[key] = values.copy(), words.copy(), matrix
        while len(self.decoded) > CACHED_WEIGHTS:
            self.decoded.popitem(last=False)
        return matrix


def _unpack_fields(words: NDArray[np.uint32], bits: int) -> NDArray[np.int64]:
    """Bit fields of position words (tiles, words, lanes), lowest first: (tiles, words * fields per word,
    lanes)."""
    tiles, _, lanes = words.shape
    shifts = np.arange(WORD_BITS // bits)[:, None] * bits
    fields = (words.astype(np.int64)[:, :, None, :] >> shifts) & ((1 << bits) - 1)
    return fields.reshape(tiles, -1, lanes)


def _bitmap_positions(marks: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Positions of the n lowest ones of each bitmap (tiles, groups, lanes): (tiles, groups, n, lanes). 0
    where there are fewer."""
    left, positions = marks.copy(), []
    for _ in range(n):
        lowest = left & -left
        positions.append(np.where(lowest > 0, np.frexp(lowest)[1] - 1, 0))
        left ^= lowest
    return np.stack(positions, axis=2)


def _scatter(values: NDArray[np.int8], positions: NDArray[np.int64], m: int) -> NDArray[np.float32]:
    """(tiles, groups, n, lanes) to (tiles * lanes, groups * m and the room that indices beyond m reach)."""
    tiles, groups, n, lanes = values.shape
    reach = max(m, int(positions.max(initial=0)) + 1)
    matrix = np.zeros((tiles, lanes, groups * m + reach), np.float32)
    tile, group, lane = np.ix_(np.arange(tiles), np.arange(groups), np.arange(lanes))
    for step in range(n):
        matrix[tile, lane, group * m + positions[:, :, step]] += values[:, :, step]
    return matrix.reshape(tiles * lanes, -1)
