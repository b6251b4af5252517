import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from algo.nm import NM
from compiler.compile import compile_network
from compiler.lower import LoweringError, choose_layouts, lower, order_operators
from compiler.ops import (
    Attention,
    LayerNorm,
    Linear,
    Pointwise,
    QuantNetwork,
    QuantTensor,
    Requant,
    ResidualInput,
)
from compiler.pack import PatternError
from compiler.program import Program
from hw.arch import PRESETS, Arch
from hw.isa import Format, Opcode, Operand, Out, Residual, RowOp, Source
from hw.isa_check import check_instruction
from sim.isa_engine import run_isa
from tests.compiler.random_networks import random_inputs, random_network, random_weight
from tests.sim.oracle import run_oracle

TINY = PRESETS["tiny"]
Shape = tuple[int, int, int]


def _requant(cols: int) -> Requant:
    return Requant(np.zeros(cols, np.int32), np.full(cols, 20000, np.int16), np.full(cols, 21, np.uint8))


def _linear(name: str, x: str, weight: NDArray[np.int8], **extra) -> Linear:
    return Linear(
        name=name, x=x, out=name, weight=weight, requant=_requant(len(weight)), **{"pattern": None, **extra}
    )


def _norm(cols: int) -> LayerNorm:
    return LayerNorm(
        np.full(cols, 9000, np.int16), np.arange(cols, dtype=np.int32), np.full(cols, 16, np.uint8), 5
    )


def _network(
    tensors: dict[str, tuple[Shape, str]], ops, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> QuantNetwork:
    named = {name: QuantTensor(name, shape, dtype, 0.1) for name, (shape, dtype) in tensors.items()}  # type: ignore[arg-type]
    return QuantNetwork(tensors=named, ops=tuple(ops), inputs=inputs, outputs=outputs)


def _attention_network(
    queries: Shape, keys: int, heads: int, *, mask: bool = False, values: str = "v"
) -> QuantNetwork:
    batch, _, channels = queries
    other = (batch, keys, channels)
    tensors = {"q": (queries, "int8"), "k": (other, "int8"), "v": (other, "int8"), "out": (queries, "int8")}
    inputs = ("q", "k", "v")
    if mask:
        tensors["mask"], inputs = ((batch, 1, keys), "keymask"), (*inputs, "mask")
    op = Attention(
        name="attention",
        q="q",
        k="k",
        v=values,
        out="out",
        heads=heads,
        score_mult=20000,
        score_shift=20,
        out_mult=20000,
        out_shift=15,
        mask="mask" if mask else None,
        source="block.0.attention",
    )
    return _network(tensors, [op], inputs, ("out",))


def _run_and_compare(network: QuantNetwork, arch: Arch, **options) -> Program:
    """Compile, run the ISA engine, compare outputs with the plain reference."""
    program = compile_network(network, arch, **options)
    inputs = random_inputs(np.random.default_rng(1), network)
    image, expected = program.memory_image(inputs), run_oracle(network, inputs)
    run_isa(image, arch=arch, code_addr=0, instructions=program.instruction_count).raise_for_error()
    for name in network.outputs:
        np.testing.assert_array_equal(program.read_tensor(image, name), expected[name])
    return program


def _tiles(program: Program) -> list:
    return [i for i in program.instructions if i.opcode == Opcode.TILE]


# -- dependences: an independent look at the finished code ---------------------------------------------------


def _streams(i, arch: Arch) -> list[tuple[int, int]]:
    """(address, bytes) of what the streams that obey `dep` read."""
    column, reads = arch.rows, []
    if i.source == Source.STREAM:
        reads.append((i.a_addr, i.cols * column))
    if i.source == Source.ARRAY and i.operand == Operand.MEMORY:
        reads.append((i.a_addr, i.k * column))
    if i.source == Source.ARRAY and i.w_dep:
        reads += [(i.w_addr + t * i.w_stride, i.k * arch.lanes) for t in range(-(-i.cols // arch.lanes))]
    if i.residual != Residual.NONE:
        reads.append((i.r_addr, i.cols * column * (2 if i.residual == Residual.INT16 else 1)))
    return reads


def _stores(i, arch: Arch) -> list[tuple[int, int]]:
    if i.out == Out.STORE8T:
        return [(i.o_addr + t * i.o_stride, arch.rows * arch.lanes) for t in range(-(-i.cols // arch.lanes))]
    size = {Out.STORE8: 1, Out.STORE16: 2}.get(i.out, 0)
    return [(i.o_addr, i.cols * arch.rows * size)] if size else []


@pytest.mark.parametrize("seed", range(40))
def test_streams_wait_for_the_bytes_they_read_and_never_touch_constants(seed: int) -> None:
    arch = TINY if seed % 2 else PRESETS["sta256"]
    program = compile_network(
        random_network(seed + 1000, arch, ops=9, cross=True), arch, pipeline_depth=seed % 3
    )
    writer = np.full(program.memory_bytes, -1, np.int64)
    for index, instruction in enumerate(program.instructions):
        assert check_instruction(instruction, arch) == 0
        if instruction.opcode != Opcode.TILE:
            continue
        assert instruction.dep <= index
        done = index - instruction.dep if instruction.dep else -1
        for address, size in _streams(instruction, arch):
            assert writer[address : address + size].max(initial=-1) <= done
        for address, size in _stores(instruction, arch):
            assert address >= program.constants_address + len(program.constants)
            writer[address : address + size] = index


@pytest.mark.parametrize("seed", range(6))
def test_lowering_is_deterministic(seed: int) -> None:
    first, second = (compile_network(random_network(seed, TINY), TINY).to_bytes() for _ in range(2))
    assert first == second


def test_memory_is_reused() -> None:
    rng, names = np.random.default_rng(0), [f"t{i}" for i in range(9)]
    tensors = {name: ((1, 8, 16), "int8") for name in names}
    ops = [_linear(b, a, random_weight(rng, 16, 16, None)) for a, b in zip(names, names[1:], strict=False)]
    network = _network(tensors, ops, ("t0",), ("t8",))
    shared, apart = (compile_network(network, TINY, reuse=reuse) for reuse in (True, False))
    assert shared.activation_bytes == 2 * 128  # two that take turns: the input is read once, the output comes last
    assert apart.activation_bytes == 9 * 128
    assert all(info.kept for info in apart.tensors)
    assert [info.name for info in shared.tensors if info.kept] == ["t7", "t8"]


# -- linear --------------------------------------------------------------------------------------------------


def test_long_reduction_is_cut_in_chunks_of_whole_groups() -> None:
    weight = random_weight(np.random.default_rng(0), 40, 150, NM("2:5"))
    network = _network(
        {"x": ((2, 5, 150), "int8"), "y": ((2, 5, 40), "int8")},
        [_linear("y", "x", weight, pattern=NM("2:5"))],
        ("x",),
        ("y",),
    )
    program = _run_and_compare(network, TINY)
    tiles = _tiles(program)
    assert max(i.cols for i in tiles) <= TINY.psum_depth
    assert all(2 * -(-i.k // 5) * 5 <= TINY.lane_depth for i in tiles)
    assert sum(i.k for i in tiles[:5]) == 150
    assert [(i.psum_in, i.psum_out) for i in tiles[:5]] == [(0, 1), (1, 1), (1, 1), (1, 1), (1, 0)]
    assert len(tiles) == (2 + 1) * 2 * 5  # whole row tiles and the shared one, column groups, chunks


def test_sparse_format_is_the_smaller_one_and_its_bytes_are_counted() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "a": (NM("1:8"), Format.INDEX),
        "b": (NM("3:4"), Format.BITMAP),
        "c": (NM("4:4"), Format.DENSE),
    }
    tensors = {name: ((1, 4, 32), "int8") for name in ("x", *weights)}
    ops = [
        _linear(name, "x", random_weight(rng, 32, 32, nm), pattern=nm) for name, (nm, _) in weights.items()
    ]
    program = _run_and_compare(_network(tensors, ops, ("x",), ("a", "b", "c")), TINY, order="operator")
    assert [i.format for i in _tiles(program)] == [format for _, format in weights.values()]
    assert [o.weight_format for o in program.operators] == ["index", "bitmap", "dense"]
    assert [o.pattern for o in program.operators] == ["1:8", "3:4", "dense"]
    # 8 column tiles; 1:8: 4 steps of 4 bytes, 1 word of 16; 3:4: 24 steps, 8 bitmaps of 4 bits in 1 word
    assert [o.weight_bytes for o in program.operators] == [8 * (16 + 16), 8 * (96 + 16), 1024]
    assert [o.effective_macs for o in program.operators] == [4096 / 8, 4096 * 3 / 4, 4096]
    assert program.macs == 3 * 4096
    assert program.weight_bytes == (3 * 1024, 8 * 32 + 8 * 112 + 1024)


def test_violated_pattern_names_the_layer() -> None:
    weight = np.ones((4, 8), np.int8)
    network = _network(
        {"x": ((1, 4, 8), "int8"), "y": ((1, 4, 4), "int8")},
        [_linear("y", "x", weight, pattern=NM("2:4"), source="encoder.fc")],
        ("x",),
        ("y",),
    )
    with pytest.raises(PatternError, match=r"y \(encoder.fc\): weights are not 2:4: row 0, group 0"):
        lower(network, TINY)


def test_norm_needs_its_row_in_one_instruction() -> None:
    def network(k: int, cols: int) -> QuantNetwork:
        weight = np.ones((cols, k), np.int8)
        return _network(
            {"x": ((1, 4, k), "int8"), "y": ((1, 4, cols), "int8")},
            [_linear("y", "x", weight, norm=_norm(cols))],
            ("x",),
            ("y",),
        )

    _run_and_compare(network(100, 32), TINY)
    with pytest.raises(LoweringError, match="rows of 33 columns do not fit row_depth = 32"):
        lower(network(8, 33), TINY)
    arch = replace(TINY, psum_depth=16)
    _run_and_compare(network(60, 32), arch)
    with pytest.raises(LoweringError, match="psum_depth = 16"):
        lower(network(65, 32), arch)


def test_tables_are_loaded_only_when_they_change() -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.integers(-128, 128, 256).astype(np.int8) for _ in range(2))
    names = ["x", "a", "b", "c", "d"]
    ops = [
        _linear(b, a, random_weight(rng, 4, 4, None), table=table)
        for a, b, table in zip(names, names[1:], (one, one.copy(), None, two), strict=False)
    ]
    program = _run_and_compare(_network({n: ((2, 9, 4), "int8") for n in names}, ops, ("x",), ("d",)), TINY)
    assert [i.opcode for i in program.instructions].count(Opcode.TABLE) == 2


# -- attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "expected"), [(0, "SOSOSO"), (1, "SSOSOO"), (2, "SSSOOO")])
def test_scores_run_ahead_of_outputs(depth: int, expected: str) -> None:
    program = _run_and_compare(_attention_network((1, 4, 12), 9, 3), TINY, pipeline_depth=depth)
    order = "".join("S" if i.row_op == RowOp.SOFTMAX else "O" for i in _tiles(program))
    assert order == expected


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "heads"),
    [
        ((2, 5, 6), 33, 2),  # longer than the row unit
        ((1, 3, 8), 130, 2),  # several blocks, longer than the lanes
        ((1, 3, 40), 50, 1),  # heads wider than the partial sums
        ((1, 3, 50), 20, 1),  # scores in chunks
        ((1, 3, 150), 20, 2),  # heads longer than the lanes
    ],
)
def test_long_rows_and_wide_heads(queries: Shape, keys: int, heads: int, mask: bool) -> None:
    program = _run_and_compare(_attention_network(queries, keys, heads, mask=mask), TINY)
    blocked = any(i.row_op == RowOp.MAX for i in _tiles(program))
    assert blocked == (keys > TINY.row_depth)


def test_values_with_a_second_use_are_copied_once() -> None:
    network = _attention_network((1, 5, 12), 5, 3, values="k")
    second = replace(network.ops[0], name="second", out="out2")
    tensors = {**network.tensors, "out2": replace(network.tensors["out"], name="out2")}
    network = replace(network, tensors=tensors, ops=(*network.ops, second), outputs=("out", "out2"))
    program = _run_and_compare(network, TINY)
    assert [t.name for t in program.tensors if t.of == "k"] == ["k", "k@transposed3"]
    assert sum(i.out == Out.STORE8T for i in program.instructions) == 2  # row tiles


def test_layout_of_values() -> None:
    rng = np.random.default_rng(0)
    base = _attention_network((1, 4, 12), 4, 3)
    made = replace(
        base, inputs=("q", "k"), ops=(_linear("v", "k", random_weight(rng, 12, 12, None)), *base.ops)
    )
    assert choose_layouts(made, TINY)["v"].layout == "transposed"
    normed = replace(made, ops=(replace(made.ops[0], norm=_norm(12)), made.ops[1]))
    assert choose_layouts(normed, TINY)["v"].layout == "transposed"  # heads of 4 = lanes
    wide = dataclasses.replace(PRESETS["sta256"], name="wide")
    assert choose_layouts(made, wide)["v"].layout == "transposed"
    assert choose_layouts(normed, wide)["v"].layout == "columns"  # a head would start within a block
    _run_and_compare(normed, wide)
    _run_and_compare(normed, TINY)


def test_masks_share_a_table_when_scores_scale_alike() -> None:
    network = _attention_network((2, 4, 4), 4, 1, mask=True)
    ops = [
        replace(network.ops[0], name=f"a{i}", out=f"out{i}", score_mult=m) for i, m in enumerate((5, 5, 6))
    ]
    tensors = {**network.tensors, **{op.out: replace(network.tensors["out"], name=op.out) for op in ops}}
    del tensors["out"]
    program = _run_and_compare(
        replace(network, tensors=tensors, ops=tuple(ops), outputs=("out0", "out2")), TINY
    )
    assert [(m.mult, m.keys, m.batch) for m in program.masks] == [(5, 4, 2), (6, 4, 2)]


def test_attention_that_does_not_fit() -> None:
    with pytest.raises(
        LoweringError, match=r"attention \(block.0.attention\): heads of 70 features .* 40 keys"
    ):
        lower(_attention_network((1, 4, 70), 40, 1), TINY)
    arch = dataclasses.replace(PRESETS["sta1024"], row_depth=16)
    with pytest.raises(LoweringError, match="40 keys need blocks of 32, and row_depth of sta1024 is 16"):
        lower(_attention_network((1, 4, 4), 40, 1), arch)


# -- schedule and limits -------------------------------------------------------------------------------------


def test_values_come_first() -> None:
    rng = np.random.default_rng(0)
    base = _attention_network((1, 4, 4), 4, 1)
    projections = [_linear(name, "x", random_weight(rng, 4, 4, None)) for name in ("q", "k", "v")]
    unused = _linear("unused", "x", random_weight(rng, 4, 4, None))
    tensors = {**base.tensors, **{n: QuantTensor(n, (1, 4, 4), "int8", 1.0) for n in ("x", "unused")}}
    network = replace(base, tensors=tensors, ops=(*projections, unused, *base.ops), inputs=("x",))
    assert order_operators(network) == [3, 2, 1, 0, 4]


def test_pointwise_without_input() -> None:
    op = Pointwise(
        name="p", x=None, out="y", mult=5, shift=3, residual=ResidualInput("x", 16384, 14), norm=_norm(6)
    )
    network = _network({"x": ((2, 9, 6), "int16"), "y": ((2, 9, 6), "int16")}, [op], ("x",), ("y",))
    program = _run_and_compare(network, TINY)
    assert {i.source for i in _tiles(program)} == {Source.ZERO}


def test_pipeline_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="pipeline_depth must be 0, 1 or 2, not 3"):
        lower(_attention_network((1, 4, 4), 4, 1), TINY, pipeline_depth=3)


def test_a_tensor_that_addresses_do_not_reach() -> None:
    rng = np.random.default_rng(0)
    tensors = {"a": ((1, 1 << 22, 16), "int8"), "b": ((1, 1 << 22, 2048), "int8")}
    network = _network(tensors, [_linear("b", "a", random_weight(rng, 2048, 16, None))], ("a",), ("b",))
    with pytest.raises(LoweringError, match=r"tensor 'b' \(1, 4194304, 2048\) takes 8,589,934,592 bytes, .* a smaller batch"):
        compile_network(network, TINY)
