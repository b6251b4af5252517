"""What `nmforge compile` compiles."""

from pathlib import Path

import pytest

import nmforge.sources
from algo.checkpoint import save_model
from algo.sparsify import sparsify
from algo.verify import verify
from models.bert import BertClassifier
from nmforge.arguments import parse_pattern
from nmforge.errors import BadInputError
from nmforge.sources import load_source
from tests.nmforge.tiny_demo import data, model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training folder with a dense model, one at 2:4 and one at 1:4."""
    save_model(model(), tmp_path / "train" / "dense", {"identity": {"facts": {"data_seed": 7}}})
    for pattern in ("2:4", "1:4"):
        net = model()
        sparsify(net, {"bert.encoder.*": pattern}, method="magnitude")
        save_model(net, tmp_path / "train" / pattern.replace(":", "of") / "sparse", {"data_seed": 7})

    def prepared(seed: int) -> object:
        assert seed == 7
        return data()

    monkeypatch.setattr(nmforge.sources, "prepare", prepared)
    monkeypatch.setattr(nmforge.sources, "create_model", lambda *_, **__: model())
    return tmp_path


def load(name: object, pattern: str | None = None) -> nmforge.sources.Source:
    table = None if pattern is None else parse_pattern(pattern)
    return load_source(str(name), pattern=table, pretrained=False, calibration=16, seed=0)


def test_trained_folders(folder: Path) -> None:
    for pattern, name in (("2:4", "2of4/sparse"), ("1:4", "1of4/sparse"), ("dense", "dense")):
        source = load(folder, pattern)
        assert source.description.endswith(name) and len(source.calibration) == 1
    assert load(folder / "train" / "1of4" / "sparse").description.endswith("1of4/sparse")
    with pytest.raises(BadInputError, match="several sparse models: choose with --pattern"):
        load(folder)
    with pytest.raises(BadInputError, match=r"no finished model of that pattern; .*1of4/sparse, train/2of4/sparse"):
        load(folder, "3:4")


def test_damaged_weights_are_named(folder: Path) -> None:
    where = folder / "train" / "2of4" / "sparse"
    described = (where / "model.json").read_text()
    (where / "model.json").write_text(described.replace("2:4", "1:4"))
    with pytest.raises(ValueError, match=r"layer 'bert.encoder.layers.0.attention.key' is not 1:4: row 0, group 0"):
        load(where)


def test_registered_models() -> None:
    with pytest.warns(UserWarning, match="calibrated on random tokens"):
        source = load("tinybert_4", "1:8")
    patterns = {name: nm for name, nm in parse_pattern("1:8").items()}
    assert set(map(str, patterns.values())) == {"1:8"} and "random (seed 0)" in source.description
    verify(source.bert, {"encoder.layers.0.up": patterns["bert.encoder.*"]})
    assert not isinstance(source.bert, BertClassifier)
    with pytest.raises(BadInputError, match="unknown model or folder 'tinybert': did you mean tinybert_6 or tinybert_4"):
        load("tinybert")
