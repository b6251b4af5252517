"""Products of two activations: the operator in integers on every engine, and from torch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from compiler.compile import compile_model, compile_network
from compiler.ops import MatMul, QuantNetwork, QuantTensor, ResidualInput
from compiler.program import Program
from compiler.verify_network import LoweringError, check_network
from hw.arch import PRESETS
from hw.numerics import requantise, residual_add, saturate
from sim.reference import run_reference
from sim.simulate import simulate
from tests.compiler.modules import Apply
from tests.compiler.random_networks import random_inputs

TINY = PRESETS["tiny"]


def _network(rng: np.random.Generator) -> QuantNetwork:
    batch, rows, inputs, cols = (int(rng.integers(1, high)) for high in (4, 14, 90, 20))
    shapes = {"x": (batch, rows, inputs), "y": (batch, inputs, cols), "r": (batch, rows, cols), "out": (batch, rows, cols)}
    dtypes = {"out": str(rng.choice(["int8", "int16"])), "r": str(rng.choice(["int8", "int16"]))}
    tensors = {name: QuantTensor(name, shape, dtypes.get(name, "int8"), 1.0) for name, shape in shapes.items()}  # type: ignore[arg-type]
    residual = ResidualInput("r", 20000, 15) if rng.random() < 0.7 else ResidualInput("r", multiply=True)
    op = MatMul(name="product", x="x", y="y", out="out", mult=30000, shift=int(rng.integers(18, 24)), residual=residual)
    return QuantNetwork(tensors=tensors, ops=(op,), inputs=("x", "y", "r"), outputs=("out",))


@pytest.mark.parametrize("seed", range(8))
def test_any_shape_equals_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = _network(rng)
    inputs = random_inputs(rng, network)
    (op,) = network.ops
    assert isinstance(op, MatMul) and op.residual is not None
    got = run_reference(network, inputs)["out"]
    acc = inputs["x"].astype(np.int64) @ inputs["y"].astype(np.int64)
    if not op.residual.multiply:
        wanted = residual_add(requantise(acc, 0, op.mult, op.shift), inputs["r"], op.residual.mult, op.residual.shift)
        assert np.array_equal(got, saturate(wanted, 16 if got.dtype == np.int16 else 8))
    run = simulate(compile_network(network, TINY), inputs)
    assert run.bit_exact, run.mismatches


def test_from_torch() -> None:
    torch.manual_seed(0)
    layers = {"s": nn.Linear(12, 7), "g": nn.Linear(12, 12), "h": nn.Linear(12, 5)}
    module = Apply(lambda m, x: m.h(torch.bmm(m.s(m.g(x)), m.g(x)) + x), **layers).eval()
    x = torch.randn(2, 7, 12)
    program = compile_model(module, x, arch="tiny", calibration=[x], host="forbid")
    assert isinstance(program, Program)
    run = simulate(program, x, engine="isa")
    assert run.bit_exact
    with torch.no_grad():
        wanted = module(x)
    assert float((run.outputs[0] - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize("written", [False, True])
def test_attention_with_wider_values(written: bool) -> None:
    def attend(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (m.q, m.k, m.v))  # type: ignore[operator]
        shares = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1)
        mixed = shares @ v if written else nn.functional.scaled_dot_product_attention(q, k, v)
        return m.o(mixed.transpose(1, 2).flatten(2))  # type: ignore[operator]

    torch.manual_seed(0)
    widths = {"q": (16, 16), "k": (16, 16), "v": (16, 24), "o": (24, 5)}
    module, x = Apply(attend, **{name: nn.Linear(*sizes) for name, sizes in widths.items()}).eval(), torch.randn(2, 7, 16)
    program = compile_model(module, x, arch="tiny", calibration=[x], host="forbid")
    run = simulate(program, x, engine="isa")
    assert run.bit_exact
    with torch.no_grad():
        assert torch.cosine_similarity(torch.as_tensor(run.outputs[0]).flatten(), module(x).flatten(), 0) > 0.99


def test_errors() -> None:
    network = _network(np.random.default_rng(0))
    for name, shape, message in (("y", (9, 9, 9), "y .'y'. must have the shape"), ("out", (9, 9, 9), "must have the shape")):
        tensors = {**network.tensors, name: replace(network.tensors[name], shape=shape)}
        with pytest.raises(LoweringError, match=message):
            check_network(replace(network, tensors=tensors), TINY)
    with pytest.raises(LoweringError, match="as many rows as lanes"):
        check_network(network, PRESETS["gemv256"])
