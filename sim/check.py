"""Proof that a run was bit-exact: reference = ISA engine = RTL, for every byte written.

Memory is reused while a program runs, so the final memory does not show every tensor. Therefore the ISA engine is
watched instruction by instruction: each tensor is compared with the integer reference at the moment it is complete, and each
instruction's bytes are kept. Then the accelerator's write log must hold those bytes, instruction by instruction.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiler.program import Program, TensorInfo
from hw.arch import Arch
from hw.isa import Instruction, Out
from sim.harness import WriteLog
from sim.isa_engine import run_isa

__all__ = ["IsaRecord", "Mismatch", "compare_image", "compare_log", "record_isa", "written_addresses"]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Mismatch:
    """The first difference of a comparison.

    comparison : what differs from what. tensor, index : the element, or "" and the byte address where no tensor lies.
    instruction : the one that wrote it, -1 where unknown.
    """

    comparison: str
    tensor: str
    index: tuple[int, ...]
    expected: int
    got: int
    instruction: int

    def __str__(self) -> str:
        place = f"{self.tensor}{list(self.index)}" if self.tensor else f"byte {self.index[0]:#x}"
        return f"{self.comparison}: {place} is {self.got}, expected {self.expected} (instruction {self.instruction})"


@dataclass(frozen=True, eq=False)
class IsaRecord:
    """The ISA engine's run: final memory; per storing instruction its index, the addresses of its bytes, and the bytes;
    and the first difference from the reference."""

    image: Bytes
    instructions: tuple[int, ...]
    addresses: tuple[NDArray[np.int64], ...]
    data: tuple[Bytes, ...]
    mismatch: Mismatch | None

    @property
    def bytes_written(self) -> int:
        """All bytes that the program writes."""
        return sum(len(part) for part in self.data)


def written_addresses(instruction: Instruction, arch: Arch) -> NDArray[np.int64]:
    """Addresses of the bytes that an instruction writes, ascending in the order of its columns or blocks."""
    out, cols, start = instruction.out, instruction.cols, instruction.o_addr
    if out in (Out.STORE8, Out.STORE16):
        size = 2 if out == Out.STORE16 else 1
        column = np.arange(instruction.o_skip * size, (arch.rows - instruction.o_drop) * size)
        return (start + arch.rows * size * np.arange(cols, dtype=np.int64)[:, None] + column).reshape(-1)
    if out == Out.STORE8T:
        blocks = start + instruction.o_stride * np.arange(-(-cols // arch.lanes), dtype=np.int64)
        return (blocks[:, None] + np.arange(arch.rows * arch.lanes)).reshape(-1)
    return np.zeros(0, np.int64)


def record_isa(
    program: Program,
    image: Bytes,
    reference: Mapping[str, NDArray[np.integer]] | None,
    progress: Callable[[int], None] | None = None,
) -> IsaRecord:
    """Run the ISA engine on `image`, in place, and compare every tensor with the reference as soon as it is complete.

    Parameters
    ----------
    reference
        Integer tensors by the network's names; None compares nothing.
    progress
        Called with the number of instructions done.

    Raises
    ------
    IsaError
        The program is malformed.
    """
    complete: dict[int, list[TensorInfo]] = {}
    for tensor in program.tensors if reference is not None else ():
        if tensor.written >= 0:
            complete.setdefault(tensor.written, []).append(tensor)
    written: list[tuple[int, NDArray[np.int64], Bytes]] = []
    differences: list[Mismatch] = []

    def after(index: int, instruction: Instruction) -> None:
        addresses = written_addresses(instruction, program.arch)
        if len(addresses):
            written.append((index, addresses, image[addresses]))
        for tensor in complete.pop(index, ()):
            if not differences and reference is not None:
                differences.extend(_compare_tensor(program, image, tensor, reference[tensor.of]))
        if progress is not None:
            progress(index + 1)

    run_isa(
        image, arch=program.arch, code_addr=program.code_address, instructions=program.instruction_count, after=after
    ).raise_for_error()
    if complete:
        names = ", ".join(tensor.name for tensors in complete.values() for tensor in tensors)
        raise RuntimeError(f"the program never completed the tensors {names}")
    return IsaRecord(
        image,
        tuple(index for index, _, _ in written),
        tuple(addresses for _, addresses, _ in written),
        tuple(data for _, _, data in written),
        differences[0] if differences else None,
    )


def _compare_tensor(
    program: Program, image: Bytes, tensor: TensorInfo, expected: NDArray[np.integer]
) -> list[Mismatch]:
    got = program.read_tensor(image, tensor.name)
    different = np.argwhere(got != expected)
    if not len(different):
        return []
    index = tuple(int(i) for i in different[0])
    return [Mismatch("ISA engine against reference", tensor.name, index, int(expected[index]), int(got[index]), tensor.written)]


def compare_log(program: Program, record: IsaRecord, log: WriteLog) -> Mismatch | None:
    """Compare the accelerator's writes with the ISA engine's, byte for byte in order of the instructions; within one
    instruction the order is free, but every byte must be written exactly once."""
    addresses = _expand(log.address, log.length)
    start = 0
    for instruction, wanted, data in zip(record.instructions, record.addresses, record.data, strict=True):
        stop = start + len(wanted)
        got, got_data = addresses[start:stop], log.data[start:stop]
        if not (np.array_equal(got, wanted) and np.array_equal(got_data, data)):
            difference = _compare_writes(program, instruction, (wanted, data), (got, got_data))
            if difference is not None:
                return difference
        start = stop
    if start != len(addresses):
        return Mismatch("writes of the RTL after the last of the ISA engine", "", (int(addresses[start]),), 0, 0, -1)
    return None


def _expand(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Addresses of every byte of the runs."""
    if not len(starts):
        return np.zeros(0, np.int64)
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def _compare_writes(
    program: Program,
    instruction: int,
    expected: tuple[NDArray[np.int64], Bytes],
    got: tuple[NDArray[np.int64], Bytes],
) -> Mismatch | None:
    """Compare as sets of (address, byte); the first difference, by address."""
    wanted, data = _sorted(*expected)
    addresses, bytes_got = _sorted(*got)
    if len(addresses) < len(wanted) or not np.array_equal(addresses, wanted):
        shared = min(len(addresses), len(wanted))
        first = next((i for i in range(shared) if addresses[i] != wanted[i]), shared)
        at = int(wanted[min(first, len(wanted) - 1)])
        other = int(addresses[first]) if first < len(addresses) else -1
        return Mismatch("addresses written by the RTL against the ISA engine", "", (at,), at, other, instruction)
    different = np.flatnonzero(data != bytes_got)
    if not len(different):
        return None
    i = different[0]
    tensor, index = _locate(program, int(wanted[i]), instruction)
    return Mismatch("RTL against ISA engine", tensor, index, int(data[i]), int(bytes_got[i]), instruction)


def _sorted(addresses: NDArray[np.int64], data: Bytes) -> tuple[NDArray[np.int64], Bytes]:
    order = np.argsort(addresses, kind="stable")
    return addresses[order], data[order]


def compare_image(program: Program, record: IsaRecord, image: Bytes) -> Mismatch | None:
    """Compare the whole final memory with the ISA engine's."""
    different = np.flatnonzero(image[: len(record.image)] != record.image)
    if not len(different):
        return None
    at = int(different[0])
    tensor, index = _locate(program, at, program.instruction_count)
    return Mismatch("final memory of the RTL against the ISA engine", tensor, index, int(record.image[at]), int(image[at]), -1)


def _locate(program: Program, address: int, instruction: int) -> tuple[str, tuple[int, ...]]:
    """Tensor and index of a byte as an instruction left it; ("", (address,)) in padding or outside every tensor."""
    arch = program.arch
    holding = [tensor for tensor in program.tensors
               if tensor.address <= address < tensor.address + tensor.nbytes(arch)]
    written = sorted((tensor.written, tensor.name) for tensor in holding)
    name = next((name for at, name in written if at >= instruction), written[-1][1] if written else "")
    if not name:
        return "", (address,)
    tensor = program.tensor(name)
    marks = np.zeros(tensor.nbytes(arch), np.uint8)
    marks[address - tensor.address] = 1
    found = np.argwhere(tensor.from_memory(marks, arch))
    return (name, tuple(int(i) for i in found[0])) if len(found) else (f"{name} (padding)", (address,))
