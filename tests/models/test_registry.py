import pytest
import torch
from torch import nn

from models import create_model, list_models, model_info, register_model, registry
from models.bert import CONFIGS as BERTS

TINY = {"layers": 1, "hidden": 24, "heads": 2, "intermediate": 16, "vocabulary": 30}


def test_lists_sorted_names():
    assert list_models() == sorted(list_models())
    assert {"bert_base", "minilm_l6", "tinybert_4"} <= set(list_models())


@pytest.mark.parametrize("name", sorted(BERTS))
def test_every_bert_builds_and_runs(name):
    model = create_model(name, **TINY)
    assert not model.training
    assert model(torch.ones(2, 5, dtype=torch.long)).shape == (2, 5, 24)


def test_published_sizes():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in create_model(name).parameters())
            for name in ("bert_base", "minilm_l6")
        }
    assert sizes == {"bert_base": 108_891_648, "minilm_l6": 22_565_376}


@pytest.mark.parametrize("name", sorted({model_info(name).family: name for name in list_models()}.values()))
def test_a_network_of_every_family_refuses_what_is_no_input(name):
    info = model_info(name)
    with torch.device("meta"):
        model = create_model(name)
    model = model if info.counted is None else info.counted(model)
    given = info.inputs[0].tensor()
    other = given.to(torch.uint8 if given.is_floating_point() else torch.float32)
    for wrong, kind in (
        (given[:0], ValueError), (given[:, :0], ValueError), (given[0], ValueError), (other, TypeError), ([given], TypeError),
        (None, TypeError),
    ):  # fmt: skip
        with pytest.raises(kind, match="^(images|token numbers) must be "):
            model(wrong)


def test_unknown_name_offers_near_ones():
    with pytest.raises(ValueError, match="unknown model 'minilm_l13': did you mean minilm_l12 or minilm_l6"):
        create_model("minilm_l13")
    with pytest.raises(ValueError, match="unknown model 'zzz': known: "):
        create_model("zzz")
    with pytest.raises(ValueError, match="unknown model 'LLaMA-7B': did you mean llama_7b"):
        create_model("LLaMA-7B")
    with pytest.raises(ValueError, match="unknown model 'r50': did you mean "):  # a part of names
        create_model("r50")
    with pytest.raises(TypeError, match="must be a string, not int"):
        create_model(3)  # type: ignore[arg-type]


def test_pretrained_is_a_bool_or_a_path():
    with pytest.raises(TypeError, match="pretrained must be True, False or a path, not None"):
        create_model("resnet18", pretrained=None)  # type: ignore[arg-type]


def test_register(monkeypatch):
    monkeypatch.setattr(registry, "_builders", {})

    @register_model
    def line(*, pretrained=False, width=3):
        return nn.Linear(width, 1)

    assert list_models() == ["line"] and create_model("line", width=5).in_features == 5
    with pytest.raises(ValueError, match="a model named 'line' is already registered"):
        register_model(line)
