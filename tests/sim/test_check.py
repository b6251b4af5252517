"""The comparison finds every kind of difference, and names the place."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from compiler.compile import compile_network
from compiler.program import Program
from sim.check import IsaRecord, compare_image, compare_log, record_isa, written_addresses
from sim.harness import WriteLog
from sim.isa_engine import IsaError
from sim.reference import run_reference
from tests.sim.small_network import random_input, small_network

Reference = dict[str, NDArray[np.integer]]


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_network(small_network(), "tiny")


@pytest.fixture(scope="module")
def reference(program: Program) -> Reference:
    return dict(run_reference(program.network, {"x": random_input()}))


@pytest.fixture
def record(program: Program, reference: Reference) -> IsaRecord:
    return record_isa(program, program.memory_image({"x": random_input()}), reference)


def log_of(record: IsaRecord, order: Callable[[int], NDArray[np.intp]] = np.arange) -> WriteLog:
    """The log of a machine that writes byte by byte what the record says, in any order within an instruction."""
    address = np.concatenate([part[order(len(part))] for part in record.addresses])
    data = np.concatenate([part[order(len(part))] for part in record.data])
    return WriteLog(address, np.ones_like(address), data)


def test_equal(program: Program, record: IsaRecord) -> None:
    assert record.mismatch is None
    written = sum(len(written_addresses(i, program.arch)) for i in program.instructions)
    assert record.bytes_written == written >= sum(t.nbytes(program.arch) for t in program.tensors if t.written >= 0)
    assert compare_log(program, record, log_of(record)) is None
    assert compare_log(program, record, log_of(record, lambda n: np.arange(n)[::-1])) is None
    assert compare_image(program, record, record.image.copy()) is None


def test_wrong_byte_is_named(program: Program, record: IsaRecord) -> None:
    log = log_of(record)
    log.data[0] ^= 1
    mismatch = compare_log(program, record, log)
    assert mismatch is not None
    assert (mismatch.tensor, mismatch.index, mismatch.instruction) == ("hidden", (0, 0, 0), record.instructions[0])
    assert mismatch.expected == mismatch.got ^ 1
    assert "RTL against ISA engine: hidden[0, 0, 0] is" in str(mismatch)


def test_wrong_address_missing_and_extra_writes(program: Program, record: IsaRecord) -> None:
    log = log_of(record)
    log.address[3] += 1
    mismatch = compare_log(program, record, log)
    assert mismatch is not None and "addresses written" in mismatch.comparison
    log = log_of(record)
    short = WriteLog(log.address[:-1], log.length[:-1], log.data[:-1])
    mismatch = compare_log(program, record, short)
    assert mismatch is not None and mismatch.got == -1
    long = WriteLog(np.append(log.address, 7), np.append(log.length, 1), np.append(log.data, 0).astype(np.uint8))
    mismatch = compare_log(program, record, long)
    assert mismatch is not None and mismatch.index == (7,) and "after the last" in str(mismatch)


def test_final_memory(program: Program, record: IsaRecord) -> None:
    image = record.image.copy()
    image[program.tensor("y").address + 4] ^= 0x80
    mismatch = compare_image(program, record, image)
    assert mismatch is not None and (mismatch.tensor, mismatch.index) == ("y", (0, 0, 1))


def test_reference_is_compared_with_every_tensor(program: Program, reference: Reference) -> None:
    for name in ("hidden", "y"):
        wrong = {**reference, name: reference[name].copy()}
        wrong[name][1, 8, 2] += 1
        record = record_isa(program, program.memory_image({"x": random_input()}), wrong)
        assert record.mismatch is not None
        assert (record.mismatch.tensor, record.mismatch.index) == (name, (1, 8, 2))


def test_malformed_program(program: Program) -> None:
    image = program.memory_image({"x": random_input()})
    image[program.code_address] = 0
    with pytest.raises(IsaError, match="OPCODE error at instruction 0"):
        record_isa(program, image, None)
