"""Inputs from files and seeds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compiler.compile import compile_model, compile_network
from compiler.program import Program
from models import create_model
from nmforge.encoder import compile_encoder, encoder_inputs
from nmforge.errors import BadInputError
from nmforge.inputs import check_outputs, random_inputs, read_inputs, write_outputs
from sim.simulate import simulate
from tests.nmforge.tiny_demo import SIZES
from tests.sim.small_network import small_network


@pytest.fixture(scope="module")
def encoder() -> Program:
    bert = create_model("minilm_l6", **SIZES).bert  # type: ignore[arg-type, union-attr]
    ids = torch.randint(1, 40, (2, 6))
    batch = encoder_inputs(bert, (ids, torch.ones_like(ids)))  # type: ignore[arg-type]
    return compile_encoder(bert, batch=2, length=6, arch="tiny", calibration=[batch])  # type: ignore[arg-type]


def test_random_inputs_run(encoder: Program) -> None:
    for program in (encoder, compile_network(small_network(), "tiny")):
        inputs = random_inputs(program, 3)
        assert simulate(program, inputs, engine="isa").bit_exact
        again, other = random_inputs(program, 3), random_inputs(program, 4)
        assert all(np.array_equal(inputs[name], again[name]) for name in inputs)
        assert any(not np.array_equal(inputs[name], other[name]) for name in inputs)
    mask = random_inputs(encoder, 3)["attention_mask"]
    assert mask.dtype == np.int64 and mask[:, 0].all() and (np.diff(mask) <= 0).all()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "m": np.ones((2, 3), np.int64)}
    path = tmp_path / f"in{suffix}"
    write_outputs(path, arrays)
    read = read_inputs(path)
    assert all(np.array_equal(read[name], arrays[name]) and read[name].dtype == arrays[name].dtype for name in arrays)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BadInputError, match=f"{path} cannot be read"):
        read_inputs(path)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="inputs are read from .npz or .safetensors, not from 'x.pkl'"):
        read_inputs(tmp_path / "x.pkl")
    with pytest.raises(BadInputError, match="no inputs at"):
        read_inputs(tmp_path / "x.npz")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    with pytest.raises(BadInputError, match="cannot be read"):
        read_inputs(tmp_path / "pickled.npz")
    with pytest.raises(BadInputError, match="outputs are written to"):
        check_outputs(tmp_path / "x.txt")
    with pytest.raises(BadInputError, match="does not exist"):
        check_outputs(tmp_path / "no" / "x.npz")


def test_float_input_of_a_bare_module() -> None:
    x = torch.randn(1, 4, 8)
    program = compile_model(nn.Linear(8, 8), x, arch="tiny", calibration=[x])
    (value,) = random_inputs(program, 0).values()
    assert value.dtype == np.float32 and value.shape == (1, 4, 8)
