"""Whole networks by name: examples and calibration batches of one shape."""

from pathlib import Path

import pytest
import torch

import nmforge.whole
from nmforge.errors import BadInputError
from nmforge.whole import whole_source
from tests.nmforge.tiny_demo import model

OPTIONS = {"pattern": None, "pretrained": False, "batch": 2, "length": 5, "calibration": 4, "seed": 0}


def test_random_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmforge.whole, "create_model", lambda *_, **__: model().bert)
    with pytest.warns(UserWarning, match="calibrated on random tokens"):
        found = whole_source("tinybert_4", **OPTIONS)  # type: ignore[arg-type]
    assert found.example["input_ids"].shape == found.example["attention_mask"].shape == (2, 5)
    assert found.description == "tinybert_4, random (seed 0) weights"
    with pytest.raises(BadInputError, match="length must be <= 512, the positions of the model, not 600"):
        whole_source("tinybert_4", **{**OPTIONS, "length": 600})  # type: ignore[arg-type]


def test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmforge.whole, "create_model", lambda *_, **__: torch.nn.Conv2d(3, 4, 3))
    with pytest.warns(UserWarning, match="calibrated on random images"):
        found = whole_source("resnet18", **OPTIONS)  # type: ignore[arg-type]
    assert found.example.shape == (2, 3, 224, 224)


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="unknown model 'resnet99'"):
        whole_source("resnet99", **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="--pattern and --pretrained are for registered models"):
        whole_source(str(tmp_path / "m.onnx"), **{**OPTIONS, "pretrained": True})  # type: ignore[arg-type]
