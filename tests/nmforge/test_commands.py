"""What the commands do, without the command line (which tests/nmforge/test_cli.py covers)."""

from pathlib import Path

import pytest
import torch

import nmforge.sources
from compiler.compile import compile_network
from hw.arch import get_arch
from nmforge.commands import _of_size, _sizes, build_program, compare_layers, quantisation_options, run_program
from nmforge.errors import BadInputError
from nmforge.sentiment import SentimentConfig
from sim.memory import MemoryModel
from tests.nmforge.tiny_demo import model
from tests.sim.small_network import small_network


def test_sizes_of_the_training() -> None:
    plain = SentimentConfig()
    assert _sizes(None, None, None) == plain
    changed = _sizes(3, 2, 100)
    assert (changed.dense.epochs, changed.idp.train.epochs, changed.sentences) == (3, 2, 100)
    assert changed.dense.lr == plain.dense.lr and changed.idp.train.lr == plain.idp.train.lr


def test_a_program_for_another_arch(tmp_path: Path) -> None:
    path = tmp_path / "x.nmf"
    compile_network(small_network(), "tiny").save(path)
    options = {"engine": "isa", "inputs": None, "outputs": None, "check": True, "memory": MemoryModel(), "trace": None, "seed": 0}
    _, run = run_program(path, arch=get_arch("tiny"), **options)  # type: ignore[arg-type]
    assert run.bit_exact
    with pytest.raises(BadInputError, match=r"x.nmf was compiled for tiny, not for sta256: compile it again"):
        run_program(path, arch=get_arch("sta256"), **options)  # type: ignore[arg-type]


def test_more_tokens_than_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmforge.sources, "create_model", lambda *_, **__: model().bert)
    with pytest.warns(UserWarning), pytest.raises(BadInputError, match="length must be <= 512, the positions"):
        build_program(
            "tinybert_4", tmp_path / "x.nmf", pattern=None, arch=get_arch("tiny"), batch=1, length=513, pretrained=False,
            calibration=2, listing=None, seed=0,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("wrong", "message"), [
    ({"observer": "max"}, "--observer: observer must be one of minmax, percentile, mse, entropy"),
    ({"observer": "mse:3"}, "--observer: only percentile has a parameter"),
    ({"smooth": 2.0}, r"--smooth must be in \[0, 1\], not 2.0"),
    ({"residual_bits": 12}, "--residual-bits must be 8 or 16, not 12"),
    ({"bits16": ["auto", "layers.*"]}, "--bits16 auto chooses for itself"),
])  # fmt: skip
def test_options_of_quantisation(wrong: dict[str, object], message: str) -> None:
    right = {"observer": "percentile:99.9", "smooth": 0.5, "bias_correction": True, "bits16": ["a", "b"], "residual_bits": 16}
    assert quantisation_options(**right)["bits16"] == ("a", "b")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=message):
        quantisation_options(**(right | wrong))  # type: ignore[arg-type]


def test_layers_of_an_encoder_are_compared_and_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmforge.sources, "create_model", lambda *_, **__: model().bert)
    options = {
        "pattern": None, "arch": get_arch("tiny"), "batch": 1, "length": 5, "pretrained": False, "calibration": 2, "seed": 0,
        "whole": False, "host": "allow", "quantisation": {"smooth": 0.5},
    }
    with pytest.warns(UserWarning, match="calibrated on random tokens"):
        result = compare_layers("tinybert_4", tmp_path / "layers.png", count=2, **options)
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["worst"]) == 2 and result["worst"][0]["sqnr"] == min(layer["sqnr"] for layer in result["layers"])
    with pytest.raises(BadInputError, match="a plot is written to .svg or .png, not to 'layers.gif'"):
        compare_layers("tinybert_4", tmp_path / "layers.gif", count=2, **options)


def test_inputs_are_brought_to_the_size_of_the_program() -> None:
    values = torch.arange(6).view(2, 3)
    assert _of_size(values, 3, 2).tolist() == [[0, 1], [3, 4], [0, 1]]
    assert _of_size(values, 1, 5).tolist() == [[0, 1, 2, 0, 0]]
