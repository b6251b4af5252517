"""Dimensions that vary, on the command line."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import nmforge.sources
import nmforge.whole
from compiler.compile import compile_model
from compiler.dynamic import DynamicProgram, load
from compiler.shapes import Dim
from nmforge.arguments import parse_dynamic, parse_sizes
from nmforge.cli import app
from nmforge.dynamic import dynamic_dims
from nmforge.errors import BadInputError
from tests.nmforge.tiny_demo import model


def nmforge_command(*arguments: object):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_texts() -> None:
    assert parse_dynamic(["length=16, 32", "tokens:1=4"]) == {"length": (16, 32), "tokens:1": (4,)}
    assert parse_sizes(["length=16", "batch = 1"]) == {"length": 16, "batch": 1}
    for wrong in (["length"], ["length=a"], ["length=0"], ["=3"], ["n=1", "n=2"], ["n="]):
        with pytest.raises(BadInputError, match="--dynamic is written like length=16,32,64 or tokens:1=16,32"):
            parse_dynamic(wrong)
    for wrong in (["length"], ["length=1,2"], ["n=1", "n=1"]):
        with pytest.raises(BadInputError, match="--shape is written like length=32"):
            parse_sizes(wrong)


def test_names_become_dimensions() -> None:
    known = {"length": {"x": 1, "mask": 1}}
    n = Dim("length", (4, 8))
    assert dynamic_dims({"length": (4, 8), "x:2": (3,)}, known) == {"x": {1: n, 2: Dim("x_2", (3,))}, "mask": {1: n}}
    assert dynamic_dims({}, known) is None
    with pytest.raises(BadInputError, match="unknown dimension of --dynamic 'lenght': did you mean length"):
        dynamic_dims({"lenght": (4,)}, known)
    with pytest.raises(BadInputError, match="--dynamic names dimension 1 of x twice"):
        dynamic_dims({"length": (4, 8), "x:1": (3,)}, known)


def test_an_encoder_of_several_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmforge.sources, "create_model", lambda *_, **__: model().bert)
    path, run = tmp_path / "x.nmf", ("simulate", tmp_path / "x.nmf", "--engine", "isa", "--json")
    result = nmforge_command(
        "compile", "tinybert_4", "--arch", "tiny", "--calibration", 2, "-o", path, "--listing", tmp_path / "x.txt",
        "--dynamic", "length=3,5", "--dynamic", "batch=2", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert [row["sizes"] for row in facts["variants"]] == [{"batch": 2, "length": 3}, {"batch": 2, "length": 5}]
    assert facts["file_bytes"] == path.stat().st_size
    for options, length in (((), 5), (("--shape", "length=3"), 3)):
        record = json.loads(nmforge_command(*run, *options, "--outputs", tmp_path / "out.npz").stdout)
        assert record["bit_exact"] and record["sizes"] == {"batch": 2, "length": length}
        with np.load(tmp_path / "out.npz") as file:
            assert [file[name].shape for name in file.files] == [(2, length, 16)]
    np.savez(tmp_path / "in.npz", hidden_states=np.zeros((2, 3, 16), np.float32), attention_mask=np.ones((2, 3), np.int64))
    assert json.loads(nmforge_command(*run, "--inputs", tmp_path / "in.npz").stdout)["sizes"]["length"] == 3
    np.savez(tmp_path / "in.npz", hidden_states=np.zeros((2, 4, 16), np.float32), attention_mask=np.ones((2, 4), np.int64))
    refused = nmforge_command(*run, "--inputs", tmp_path / "in.npz")
    assert refused.exit_code == 2 and "length may be 3 or 5 in this program" in " ".join(refused.stderr.split())
    assert "--shape: length may be 3 or 5" in " ".join(nmforge_command(*run, "--shape", "length=4").stderr.split())
    listed = json.loads(nmforge_command("report", path, "--json").stdout)
    assert [row["sizes"]["length"] for row in listed["variants"]] == [3, 5]
    small = json.loads(nmforge_command("report", path, "--json", "--shape", "length=3").stdout)
    assert "variants" not in small and small["rows"][0]["shape"] == [6, 16]
    assert "the largest:" in nmforge_command("report", path).stdout
    assert "batch = 2, length = 3" in nmforge_command("simulate", path, "--engine", "cycle", "--shape", "length=3").stdout
    load(path).at(batch=2, length=3).save(path)  # type: ignore[union-attr]
    assert "the program has fixed shapes" in " ".join(nmforge_command(*run, "--shape", "length=3").stderr.split())


def test_a_whole_network_and_an_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmforge.whole, "create_model", lambda *_, **__: model().bert)
    path, file = tmp_path / "x.nmf", tmp_path / "m.onnx"
    options = ("--whole", "--arch", "tiny", "--batch", 1, "-o", path, "--dynamic", "length=3,5")
    result = nmforge_command("compile", "tinybert_4", *options)
    assert result.exit_code == 0 and "2 shapes, the figures are of the largest" in result.stdout
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            nn.Linear(8, 8), (torch.randn(2, 5, 8),), file, dynamo=True, verbose=False,
            dynamic_shapes={"input": {1: torch.export.Dim("tokens", min=2, max=9)}},
        )  # fmt: skip
    result = nmforge_command("compile", file, "--arch", "tiny", "-o", path, "--dynamic", "tokens=3,5")
    assert result.exit_code == 0, result.output
    made = load(path)
    assert isinstance(made, DynamicProgram) and made.at(tokens=3).inputs[0].shape == (2, 3, 8)
    result = nmforge_command("compile", file, "--arch", "tiny", "-o", path)
    assert result.exit_code == 2 and "--dynamic" in result.stderr
    with pytest.raises(ValueError, match="dynamic names 'tokens', but the inputs are input"):
        compile_model(str(file), dynamic={"tokens": {1: (3,)}}, arch="tiny")
