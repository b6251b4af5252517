"""Rows that go through the array instead of being copied one by one."""

import numpy as np
import pytest
import torch

from compiler.compile import compile_model, compile_network
from compiler.ops import QuantNetwork, QuantTensor, Rearrange, RowSource
from hw.arch import PRESETS
from hw.isa import Out, Source
from models.odconv import ODConv2d
from sim.simulate import simulate
from tests.compiler.random_networks import random_inputs
from tests.compiler.random_rows import random_rows


def moved(arch, rows, *, length=64, channels=40):
    """A network that takes rows of a tensor, and its program on `arch`."""
    rows = np.asarray(rows, np.int64)
    part = RowSource(tensor="x", rows=rows, to=np.arange(len(rows)), start=0, at=0, width=channels, mult=1 << 14, shift=14)
    tensors = {
        "x": QuantTensor("x", (1, length, channels), "int8", 1.0), "y": QuantTensor("y", (1, len(rows), channels), "int8", 1.0)
    }
    network = QuantNetwork(tensors=tensors, ops=(Rearrange(name="y", out="y", sources=(part,)),), inputs=("x",), outputs=("y",))
    return network, compile_network(network, PRESETS[arch])


@pytest.mark.parametrize("arch", ["tiny", "sta256", "sta1024", "sta4096"])
@pytest.mark.parametrize("rows", [
    np.full(64, 5), np.arange(63, -1, -1), np.arange(1, 64, 2), np.repeat(np.arange(32), 2), np.arange(64) ^ 1,
], ids=["one", "reversed", "odd", "twice", "swapped"])  # fmt: skip
def test_rows_in_any_order(arch, rows):
    network, program = moved(arch, rows)
    inputs = random_inputs(np.random.default_rng(0), network)
    run = simulate(program, inputs, engine="isa")
    assert run.bit_exact, run.mismatches
    assert np.array_equal(run.tensors["y"], inputs["x"][:, rows])
    if PRESETS[arch].rows > 8:
        assert any(i.source == Source.ARRAY for i in program.instructions[:-1])


def test_rows_that_stay_together_are_copied():
    _, program = moved("sta1024", np.arange(32, 64))
    (copy, _) = program.instructions
    assert (copy.source, copy.out) == (Source.STREAM, Out.STORE8)


def test_one_row_for_all():
    """The row as weights, then an instruction for each tile."""
    network, program = moved("sta1024", np.full(320, 5))
    assert program.instruction_count == 1 + 10 + 1
    assert all(i.k == 1 for i in program.instructions[1:-1])
    assert simulate(program, engine="cycle").cycles < 2_000  # 32 copies for the first tile alone took 5,000


def test_zeros_between_rows_need_no_instruction():
    to = np.arange(0, 32, 2)
    part = RowSource(tensor="x", rows=to[::-1].copy(), to=to, start=0, at=0, width=40, mult=1 << 14, shift=14)
    tensors = {name: QuantTensor(name, (1, 32, 40), "int8", 1.0) for name in ("x", "y")}
    network = QuantNetwork(tensors=tensors, ops=(Rearrange(name="y", out="y", sources=(part,)),), inputs=("x",), outputs=("y",))
    program = compile_network(network, PRESETS["sta1024"])
    inputs = random_inputs(np.random.default_rng(0), network)
    run = simulate(program, inputs, engine="isa")
    assert run.bit_exact and not run.tensors["y"][:, 1].any()
    assert program.instruction_count == 3


@pytest.mark.parametrize("seed", range(12))
def test_arrays_of_64_rows(seed):
    """Whose loader turns tiles by two rows at least: tails of odd lengths, odd rows, transposes and products of both."""
    network = random_rows(seed, PRESETS["sta4096"])
    program = compile_network(network, PRESETS["sta4096"])
    run = simulate(program, random_inputs(np.random.default_rng(seed), network), engine="isa")
    assert run.bit_exact, run.mismatches


@pytest.mark.parametrize("groups", [1, 4, 32])
def test_mixed_kernels(groups):
    """Omni-dimensional dynamic convolution: an instruction for each tile, not one for each value of the attention."""
    torch.manual_seed(0)
    layer = ODConv2d(32, 64 if groups < 32 else 32, 3, padding=1, groups=groups, kernels=4).eval()
    x = torch.randn(2, 32, 8, 8)
    program = compile_model(layer, x, arch="sta256", calibration=[x], host="forbid")
    run = simulate(program, x, engine="isa")
    assert run.bit_exact, run.mismatches
    expected = layer(x)
    assert torch.nn.functional.cosine_similarity(run.outputs[0].flatten(), expected.flatten(), dim=0) > 0.995
    if groups != 4:
        assert program.instruction_count < 600


@pytest.mark.parametrize("arch", ["tiny", "sta1024", "sta4096"])
@pytest.mark.parametrize("batch", [1, 5])
def test_mean_of_an_image(arch, batch):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 20, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)).eval()
    x = torch.randn(batch, 3, 10, 7)
    program = compile_model(network, x, arch=arch, calibration=[x], host="forbid")
    run = simulate(program, x, engine="isa")
    assert run.bit_exact, run.mismatches
    assert torch.nn.functional.cosine_similarity(run.outputs[0].flatten(), network(x).flatten(), dim=0) > 0.995
    (mean,) = [operator for operator in program.operators if operator.name.endswith(".average")]
    assert sum(stop - start for start, stop in mean.spans) < batch * (70 if arch == "tiny" else 12)
