import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from compiler.compile import compile_network
from compiler.program import Program
from compiler.schedule import ORDERS
from hw.arch import PRESETS, Arch
from hw.isa import INSTRUCTION_BYTES, ErrorCode, Format, Instruction, Opcode, Out, RowOp, Scale, Source
from sim.isa_engine import IsaError, run_isa
from sim.reference import run_reference
from tests.compiler.random_networks import random_inputs, random_network
from tests.hw.malformed import Malformed, good_tile, malformed_instructions
from tests.sim.oracle import run_oracle

TINY = PRESETS["tiny"]
ARCHS = (
    TINY,
    PRESETS["sta256"],
    dataclasses.replace(TINY, name="tiny8", rows=8, lanes=8, bus_bytes=16, row_depth=16, psum_depth=16),
    dataclasses.replace(TINY, name="tiny-wide", bus_bytes=128, lane_depth=128, row_depth=16),
    PRESETS["sta1024"],
)
HALT = Instruction(opcode=Opcode.HALT)
Bytes = NDArray[np.uint8]


def _run(image: Bytes, *code: Instruction | bytes, at: int = 0x1000, arch: Arch = TINY):
    """Write code into the image, and run it."""
    raw = b"".join(part if isinstance(part, bytes) else part.encode() for part in code)
    image[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
    return run_isa(image, arch=arch, code_addr=at, instructions=len(code))


def _memory() -> Bytes:
    return np.random.default_rng(0).integers(0, 256, 1 << 13).astype(np.uint8)


def _check_tensors(
    program: Program, image: Bytes, expected: dict[str, NDArray[np.integer]], moment: int | None
) -> None:
    """Compare the tensors that are complete or last read at an instruction, or at the end (None) those that
    are kept."""
    for info in program.tensors:
        due = info.kept if moment is None else moment in (info.written, info.last_use)
        if info.layout != "keymask" and due:
            assert_array_equal(program.read_tensor(image, info.name), expected[info.of], err_msg=f"{info}")


@pytest.mark.parametrize("seed", range(150))
def test_random_network_equals_both_references(seed: int) -> None:
    arch = ARCHS[seed % len(ARCHS)]
    network = random_network(seed, arch, cross=seed % 2 == 1)
    inputs = random_inputs(np.random.default_rng(seed), network)
    expected = run_oracle(network, inputs)
    if seed % 2 == 0:
        for name, value in run_reference(network, inputs).items():
            assert_array_equal(value, expected[name])
    order = ORDERS[seed // 2 % len(ORDERS)]
    program = compile_network(network, arch, pipeline_depth=seed % 3, reuse=seed % 4 != 0, order=order)
    image = program.memory_image(inputs)
    result = run_isa(
        image,
        arch=arch,
        code_addr=program.code_address,
        instructions=program.instruction_count,
        after=lambda index, _: _check_tensors(program, image, expected, index),
    )
    result.raise_for_error()
    assert result.instructions == program.instruction_count
    _check_tensors(program, image, expected, None)


def test_dense_tile_by_hand() -> None:
    """2 columns, k = 3: no packing, no compiler."""
    image = np.zeros(1 << 13, np.uint8)
    activations = np.array([[1, -2, 3, 4], [5, 6, -7, 8], [9, 10, 11, -12]], np.int8)  # (k, rows)
    weights = np.array([[1, -1, 0, 0], [2, 3, 0, 0], [-4, 5, 99, 0]], np.int8)  # (steps, lanes)
    image[0:12], image[64:76] = activations.reshape(-1).view(np.uint8), weights.reshape(-1).view(np.uint8)
    tile = good_tile(k=3, cols=2, w_addr=64, w_stride=12, mult=2, shift=1, out=Out.STORE16, o_addr=128)
    assert _run(image, tile, HALT).code == ErrorCode.NONE
    sums = weights[:, :2].astype(int).T @ activations.astype(int)
    assert_array_equal(image[128:144].view("<i2").reshape(2, 4), sums)


@pytest.mark.parametrize(
    ("format", "word"), [(Format.INDEX, 2 | 0 << 2 | 1 << 4), (Format.BITMAP, 4 | 1 << 3 | 2 << 6)]
)
def test_sparse_tile_by_hand(format: Format, word: int) -> None:
    """1:3, k = 8: the last group is a remainder. Lane 0 has weights 7, -8, 9 at columns 2, 3, 7."""
    image = np.zeros(1 << 13, np.uint8)
    activations = np.arange(1, 33).reshape(8, 4)
    image[0:32] = activations.reshape(-1)
    image[64:76] = np.array([[7, 0, 0, 0], [-8, 0, 0, 0], [9, 0, 0, 0]], np.int8).reshape(-1).view(np.uint8)
    image[128:132] = np.array([word], "<u4").view(np.uint8)
    tile = good_tile(
        k=8, cols=1, format=format, n=1, m=3, w_addr=64, x_addr=128, mult=2, o_addr=256, out=Out.STORE16
    )
    assert _run(image, tile, HALT).code == ErrorCode.NONE
    expected = 7 * activations[2] - 8 * activations[3] + 9 * activations[7]
    assert_array_equal(image[256:264].view("<i2"), expected)


def test_partial_sums_and_unsigned_activations() -> None:
    image = np.zeros(1 << 13, np.uint8)
    image[0:4], image[64:68] = 200, 1
    first = good_tile(k=1, cols=1, a_unsigned=1, w_addr=64, psum_out=1, out=Out.NONE)
    last = good_tile(k=1, cols=1, w_addr=64, psum_in=1, mult=2, o_addr=128, out=Out.STORE16)
    assert _run(image, first, last, HALT).code == ErrorCode.NONE
    assert_array_equal(image[128:136].view("<i2"), [200 - 56] * 4)


def test_transposed_store_pads_with_zeros() -> None:
    image = np.full(1 << 13, 77, np.uint8)
    image[0:20] = np.arange(20)
    tile = good_tile(source=Source.STREAM, k=0, cols=5, mult=2, out=Out.STORE8T, o_addr=64, o_stride=64)
    assert _run(image, tile, HALT).code == ErrorCode.NONE
    assert_array_equal(image[64:80].reshape(4, 4), np.arange(16).reshape(4, 4).T)
    expected = np.zeros((4, 4), np.uint8)
    expected[:, 0] = range(16, 20)
    assert_array_equal(image[128:144].reshape(4, 4), expected)
    assert (image[80:128] == 77).all()


def test_table_is_loaded_by_its_instruction() -> None:
    image = np.zeros(1 << 13, np.uint8)
    image[0:8] = np.array([-128, -1, 0, 127] * 2, np.int8).view(np.uint8)
    image[256:512] = np.arange(256)[::-1]
    tile = good_tile(source=Source.STREAM, k=0, cols=1, mult=2, table=1, o_addr=64)
    assert _run(image, tile, Instruction(opcode=Opcode.TABLE, p_addr=256), tile, HALT).code == ErrorCode.NONE
    assert_array_equal(image[64:68], [255, 128, 127, 0])


@pytest.mark.parametrize("case", malformed_instructions(TINY), ids=lambda case: case.name)
def test_malformed_instruction_stops_with_its_address(case: Malformed) -> None:
    image = _memory()
    good = good_tile(source=Source.ZERO, k=0, o_addr=64)
    result = _run(image, good, case.raw, good_tile(o_addr=128), HALT)
    assert result.instructions == 1
    assert isinstance(result.error, IsaError)
    assert (result.error.code, result.error.address, result.error.index) == (
        case.code,
        0x1000 + INSTRUCTION_BYTES,
        1,
    )
    assert not image[64:80].any()  # what came before is done
    assert_array_equal(image[128:144], _memory()[128:144])  # what comes after is not
    with pytest.raises(IsaError, match=rf"{case.code.name} error at instruction 1 \(address 0x1040\)"):
        result.raise_for_error()


def test_end_without_halt() -> None:
    result = _run(_memory(), good_tile(o_addr=64))
    assert (result.code, result.instructions) == (ErrorCode.END, 1)
    assert result.error is not None
    assert result.error.address == 0x1000 + INSTRUCTION_BYTES
    assert _run(_memory(), HALT, good_tile()).instructions == 1


@pytest.mark.parametrize(
    "tile",
    [
        good_tile(a_addr=1 << 13),
        good_tile(w_addr=1 << 31),
        good_tile(cols=8, w_stride=1 << 20),
        good_tile(o_addr=(1 << 13) - 4),
        good_tile(scale=Scale.COLUMN, p_addr=1 << 20),
        good_tile(out=Out.STORE8T, cols=8, o_stride=1 << 20),
    ],
)
def test_access_outside_memory_is_a_bus_error(tile: Instruction) -> None:
    assert _run(_memory(), tile, HALT).code == ErrorCode.BUS


def test_code_outside_memory_is_a_bus_error() -> None:
    assert run_isa(np.zeros(64, np.uint8), arch=TINY, code_addr=64, instructions=1).code == ErrorCode.BUS


def test_weights_that_change_are_decoded_again() -> None:
    """The second TILE overwrites the weights of the third, which has the fields of the first."""
    image = np.zeros(1 << 13, np.uint8)
    image[0:4], image[64:68], image[128:132] = 1, 1, 3
    multiply = good_tile(k=1, cols=1, w_addr=64, mult=2, o_addr=256)
    overwrite = good_tile(source=Source.STREAM, k=0, cols=1, a_addr=128, mult=2, o_addr=64)
    assert _run(image, multiply, overwrite, multiply, HALT).code == ErrorCode.NONE
    assert_array_equal(image[256:260], [3] * 4)


def test_softmax_of_one_pass_equals_blocks() -> None:
    """SOFTMAX of 8 keys = MAX over two blocks, then EXP and values block by block."""
    image = _memory()
    scores = dict(k=4, w_dep=1, w_stride=16, mult=1000, shift=9, a_addr=0)
    whole = good_tile(
        **scores, cols=8, w_addr=64, row_op=RowOp.SOFTMAX, out=Out.LANES, row_mult=20000, row_shift=15
    )
    values = dict(operand=1, a_unsigned=1, cols=4, w_dep=1, w_stride=64, scale=Scale.ROW)
    code = [whole, good_tile(**values, k=8, w_addr=128, o_addr=512)]
    for block in range(2):
        code.append(
            good_tile(
                **scores, cols=4, w_addr=64 + 16 * block, row_op=RowOp.MAX, out=Out.NONE, row_first=1 - block
            )
        )
    for block in range(2):
        code.append(
            good_tile(
                **scores,
                cols=4,
                w_addr=64 + 16 * block,
                row_op=RowOp.EXP,
                out=Out.LANES,
                row_mult=20000,
                row_shift=15,
                row_first=1 - block,
                row_last=block,
            )
        )
        last = {} if block else {"psum_out": 1, "out": Out.NONE, "scale": Scale.CONST}
        code.append(
            good_tile(
                **{
                    **values,
                    "k": 4,
                    "w_addr": 128 + 16 * block,
                    "psum_in": block,
                    "o_addr": 528,
                    **last,
                }
            )
        )
    assert _run(image, *code, HALT).code == ErrorCode.NONE
    assert_array_equal(image[512:528], image[528:544])
    assert len(np.unique(image[512:528])) > 4


def test_image_must_be_writeable_bytes() -> None:
    with pytest.raises(TypeError, match="writeable one-dimensional uint8"):
        run_isa(np.zeros(8, np.int8), arch=TINY, code_addr=0, instructions=1)  # type: ignore[arg-type]
