import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from algo.sparsify import sparsify
from compiler.compile import compile_model, compile_network
from compiler.graph import CompileError
from compiler.program import ModelTensor, Program
from hw.arch import PRESETS
from sim.isa_engine import run_isa
from sim.model_io import dequantise_outputs, quantise_inputs
from tests.compiler.random_networks import random_network

TINY = PRESETS["tiny"]


class _Encoder(nn.Module):
    """One layer of torch's own encoder, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding))


def _example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    return torch.randn(2, 9, 24, generator=generator), padding


def _model() -> nn.Module:
    torch.manual_seed(0)
    return _Encoder().eval()


def _run(program: Program, inputs: Any) -> tuple[torch.Tensor, ...]:
    image = program.memory_image(quantise_inputs(program, inputs))
    run_isa(image, arch=program.arch, code_addr=0, instructions=program.instruction_count).raise_for_error()
    return dequantise_outputs(
        program, {t.tensor: program.read_tensor(image, t.tensor) for t in program.outputs}
    )  # type: ignore[return-value]


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_model(_model(), _example(), arch=TINY, calibration=[_example(s) for s in range(4)])


def test_compiled_model_computes_what_the_model_does(program: Program) -> None:
    inputs = _example(9)
    (got,), expected = _run(program, inputs), _model()(*inputs).detach()
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    keep = ~inputs[1]
    # root mean square: a row outside the calibrated range may be clipped, which is the quantiser's business
    assert float((got - expected)[keep].square().mean().sqrt()) < 0.1 * float(expected.std())


def test_inputs_and_outputs_are_the_models(program: Program) -> None:
    x, padding = program.inputs
    assert (x.name, x.shape, x.dtype, x.kind) == ("x", (2, 9, 24), "torch.float32", "activation")
    assert (padding.name, padding.shape, padding.dtype) == ("padding", (2, 9), "torch.bool")
    assert (padding.kind, padding.inverted) == ("keymask", True)
    (head,) = program.outputs
    assert (head.shape, head.dtype) == ((2, 9, 5), "torch.float32")
    assert all(operator.source for operator in program.operators if operator.kind == "linear")


def test_sparse_model_keeps_its_pattern() -> None:
    model = _model()
    sparsify(model, {"encoder.*linear1": "2:4", "head": "1:8"})
    with pytest.warns(
        UserWarning, match="no calibration data: scales are chosen from the example inputs alone"
    ):
        program = compile_model(model, _example(), arch="tiny")
    patterns = {o.source: o.pattern for o in program.operators if o.kind == "linear"}
    assert patterns["head"] == "1:8"
    assert patterns["encoder.layers.0.linear1"] == "2:4"
    assert patterns["encoder.layers.0.linear2"] == "dense"


def test_progress_is_reported() -> None:
    seen: list[tuple[str, int, int | None]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile_model(
            nn.Linear(4, 4), torch.randn(1, 3, 4), arch="tiny", progress=lambda *event: seen.append(event)
        )
    assert [stage for stage, done, total in seen if done == total] == ["passes", "calibrate", "lower"]
    assert seen[0] == ("trace", 0, 1)


def test_what_cannot_be_compiled() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumsum(x, 1)

    with pytest.raises(CompileError, match="cumsum"):
        compile_model(Odd(), torch.randn(1, 3, 4), arch="tiny", calibration=[torch.randn(1, 3, 4)])
    with pytest.raises(ValueError, match="unknown arch preset 'sta7'; known presets: tiny"):
        compile_model(nn.Linear(4, 4), torch.randn(1, 3, 4), arch="sta7")
    wide = nn.Sequential(nn.Linear(4, 40), nn.Softmax(-1))
    with pytest.raises(CompileError, match="a softmax over 40 columns does not fit the 32 of tiny"):
        compile_model(wide, torch.randn(1, 3, 4), arch="tiny", calibration=[torch.randn(1, 3, 4)], host="forbid")


def test_networks_own_tensors_are_the_default() -> None:
    network = random_network(0, TINY)
    program = compile_network(network, TINY)
    assert [t.name for t in program.inputs] == list(network.inputs)
    assert [t.tensor for t in program.outputs] == list(network.outputs)
    assert all(t.shape == network.tensors[t.tensor].shape for t in program.inputs + program.outputs)
    given = [ModelTensor(name="a", tensor=network.inputs[0], shape=(1,), dtype="torch.float32", scale=1.0)]
    assert compile_network(network, "tiny", inputs=given, outputs=()).inputs == tuple(given)
    assert isinstance(program.constants, np.ndarray)


class _Two(nn.Module):
    """The second image is convolved first; or the first input is turned, the second not."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.a, self.b = (nn.Linear(9, 9) if turned else nn.Conv2d(3, 8, 3) for _ in range(2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y @ self.a(y @ x) if self.turned else self.a(y) - self.b(x)


@pytest.mark.parametrize("turned", [False, True])
def test_inputs_keep_their_order(turned: bool) -> None:
    torch.manual_seed(0)
    shape = (2, 9, 9) if turned else (1, 3, 6, 6)
    module, inputs = _Two(turned).eval(), (torch.randn(shape), torch.randn(shape))
    program = compile_model(module, inputs, arch="tiny", calibration=[inputs])
    assert [spec.name for spec in program.inputs] == ["x", "y"]
    (found,) = _run(program, inputs)
    assert torch.cosine_similarity(found.flatten(), module(*inputs).flatten(), 0) > 0.99
