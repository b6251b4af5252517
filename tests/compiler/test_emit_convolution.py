"""Convolutions as instructions: blocks of grouped ones, what is refused, and equality with the reference on the ISA engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from algo.nm import NM
from compiler.compile import compile_network
from compiler.emit_convolution import blocks
from compiler.ops import Conv, MaxPool, QuantNetwork, QuantTensor, Requant, Window
from compiler.program import program_from_bytes
from compiler.verify_network import LoweringError
from hw.arch import PRESETS
from sim.simulate import simulate
from tests.compiler.random_convolutions import random_convolutions
from tests.compiler.random_networks import random_inputs

TINY, LARGE = PRESETS["tiny"], PRESETS["sta1024"]


def conv(outputs, inputs, groups=1, kernel=(3, 3), pattern=None, **fields):
    weight = np.random.default_rng(0).integers(1, 127, (outputs, *kernel, inputs // groups)).astype(np.int8)
    return Conv(
        name="conv", x="x", out="y", groups=groups, weight=weight,
        window=Window(kernel=kernel, padding=(1, 1)), pattern=pattern,
        requant=Requant(np.zeros(outputs, np.int32), np.ones(outputs, np.int16), np.ones(outputs, np.uint8)), **fields,
    )  # fmt: skip


def network(op, image=(6, 6), channels=8, outputs=8):
    tensors = {
        "x": QuantTensor("x", (1, image[0] * image[1], channels), "int8", 1.0, image),
        "y": QuantTensor("y", (1, image[0] * image[1], outputs), "int8", 1.0, image),
    }
    return QuantNetwork(tensors=tensors, ops=(op,), inputs=("x",), outputs=("y",))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("arch", [TINY, replace(TINY, sparse=False)], ids=["tiny", "dense"])
def test_program_equals_reference(seed, arch):
    net = random_convolutions(1000 + seed, arch)
    program = compile_network(net, arch)
    assert simulate(program, random_inputs(np.random.default_rng(seed), net), engine="isa").bit_exact
    assert program_from_bytes(program.to_bytes()).to_bytes() == program.to_bytes()


@pytest.mark.parametrize("name", ["ecp5", "sta1024", "sta4096", "gemv256"])
@pytest.mark.parametrize("seed", range(3))
def test_program_on_other_arrays(name, seed):
    net = random_convolutions(2000 + seed, PRESETS[name], max_batch=9)
    run = simulate(compile_network(net, PRESETS[name]), random_inputs(np.random.default_rng(seed), net), engine="isa")
    assert run.bit_exact, run.mismatches


def test_depth_wise_weights_take_a_step_for_32_channels():
    """One non-zero in 32: 1/32 of the steps of the dense matrix, and all columns in one instruction a kernel position."""
    (block,) = blocks(conv(96, 96, groups=96), LARGE)
    assert (block.first, block.stop, block.pattern) == (0, 96, NM("1:32"))


def test_wide_depth_wise_layers_are_cut_to_what_the_ring_holds_twice():
    for block in blocks(conv(1280, 1280, groups=1280), LARGE):
        assert 2 * (block.stop - block.first) <= LARGE.lane_depth


def test_groups_load_only_what_they_see():
    found = blocks(conv(256, 256, groups=4), LARGE)
    assert all(block.stop - block.first <= 128 for block in found)
    assert [block.segment.start for block in found] == sorted(block.segment.start for block in found)


def test_pooling_of_negative_values_compares_only_what_is_in_the_image():
    pool = MaxPool(name="pool", x="x", out="y", window=Window(kernel=(3, 3), padding=(1, 1)))
    net = network(pool)
    x = np.random.default_rng(0).integers(-128, -1, (1, 36, 8)).astype(np.int8)
    run = simulate(compile_network(net, TINY), {"x": x}, engine="isa")
    expected = F.max_pool2d(torch.from_numpy(x).reshape(6, 6, 8).permute(2, 0, 1)[None].double(), 3, 1, 1)
    assert run.bit_exact
    assert np.array_equal(run.tensors["y"][0], expected[0].flatten(1).t().numpy())


@pytest.mark.parametrize(
    "change, text",
    [
        ({"groups": 3}, "cannot be cut into 3 groups"),
        ({"weight": np.zeros((8, 3, 3, 4), np.int8)}, "weight must be int8"),
        ({"window": Window(kernel=(3, 3), stride=(0, 1))}, "stride"),
    ],
)
def test_malformed_convolutions(change, text):
    with pytest.raises(LoweringError, match=text):
        compile_network(network(replace(conv(8, 8), **change)), TINY)


def test_rows_that_are_no_image():
    net = network(conv(8, 8))
    broken = replace(net, tensors={**net.tensors, "x": replace(net.tensors["x"], image=(5, 6))})
    with pytest.raises(LoweringError, match=r"x \('x'\) must be an image"):
        compile_network(broken, TINY)
