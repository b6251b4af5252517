"""Inputs and outputs of the user's model."""

import numpy as np
import pytest
import torch

from compiler.compile import compile_network
from compiler.program import ModelTensor, Program
from sim.model_io import dequantise_outputs, quantise_inputs
from tests.sim.small_network import random_input, small_network


@pytest.fixture(scope="module")
def integer() -> Program:
    return compile_network(small_network(), "tiny")


@pytest.fixture(scope="module")
def real() -> Program:
    """The same with a model's face: float inputs of another shape."""
    spec = {"dtype": "float32", "shape": (18, 21), "scale": 0.5}
    return compile_network(
        small_network(), "tiny",
        inputs=[ModelTensor(name="features", tensor="x", **spec)], outputs=[ModelTensor(name="result", tensor="y", **spec)],
    )


def test_integers_pass_as_they_are(integer: Program) -> None:
    values = random_input()
    for inputs in (values, [values], {"x": values}, torch.from_numpy(values), values.astype(np.int64)):
        assert np.array_equal(quantise_inputs(integer, inputs)["x"], values)
    (output,) = dequantise_outputs(integer, {"y": values})
    assert isinstance(output, np.ndarray) and np.array_equal(output, values)


def test_floats_are_rounded_and_clipped(real: Program) -> None:
    values = torch.zeros(18, 21)
    values[0, :6] = torch.tensor([0.5, -0.75, 1.25, 0.74, 1000.0, -1000.0])
    levels = quantise_inputs(real, values)["x"]
    assert levels.shape == (2, 9, 21) and levels.dtype == np.int8
    assert levels[0, 0, :7].tolist() == [1, -2, 2, 1, 127, -128, 0]
    (output,) = dequantise_outputs(real, {"y": levels})
    assert isinstance(output, torch.Tensor) and output.dtype == torch.float32 and output.shape == (18, 21)
    assert output[0, :6].tolist() == [0.5, -1.0, 1.0, 0.5, 63.5, -64.0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], r"takes 1 inputs \('features'\), not 0"),
        ([torch.zeros(18, 21)] * 2, r"takes 1 inputs \('features'\), not 2"),
        ({"x": torch.zeros(18, 21)}, r"inputs are 'features', not 'x'"),
        (torch.zeros(18, 20), r"input 'features' must have the shape \(18, 21\), not \(18, 20\)"),
        (torch.zeros(18, 21, dtype=torch.float64), r"input 'features' must be of float32, not float64"),
        (torch.full((18, 21), torch.nan), r"input 'features' must be finite"),
    ],
)
def test_bad_inputs(real: Program, inputs: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantise_inputs(real, inputs)  # type: ignore[arg-type]


def test_bad_integers(integer: Program) -> None:
    with pytest.raises(ValueError, match=r"input 'x' must be of an integer type, not float32"):
        quantise_inputs(integer, random_input().astype(np.float32))
