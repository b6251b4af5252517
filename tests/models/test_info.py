import pytest
import torch

from models import ModelInfo, Published, create_model, describe_models, list_models, model_info, registry
from models.info import Input, image


@pytest.mark.parametrize("name", list_models())
def test_every_model_is_described(name):
    info = model_info(name)
    assert info.family != "other" and info.paper and len(info.paper.split(".")[0]) == 4
    assert info.inputs and all(given.shape[0] == 1 for given in info.inputs)
    assert all(list(published.figures()) and 0 <= published.within < 0.2 for published in info.published)


@pytest.mark.parametrize("name", [name for name in list_models() if model_info(name).published])
def test_published_parameters(name):
    with torch.device("meta"):
        own = sum(parameter.numel() for parameter in create_model(name).parameters())
    for published in model_info(name).published:
        if published.parameters is not None:
            assert abs(own - published.parameters) <= published.within * published.parameters, published.source


def test_inputs():
    assert image(3, 224) == (Input("images", (1, 3, 224, 224)),) and image(1, 8, 6)[0].shape == (1, 1, 8, 6)
    tensor = Input("ids", (1, 4), torch.int64).tensor()
    assert tensor.device.type == "meta" and tensor.dtype == torch.int64 and tensor.shape == (1, 4)


def test_figures_are_those_given():
    assert list(Published(source="x", macs=5, parameters=3).figures()) == [("parameters", 3), ("macs", 5)]


def test_describing(monkeypatch):
    monkeypatch.setattr(registry, "_builders", dict.fromkeys(("a", "b"), torch.nn.Identity))
    monkeypatch.setattr(registry, "_infos", {})
    one, two = Published(source="x", macs=1), Published(source="y", macs=2)
    describe_models(("a",), ModelInfo(family="F", paper="2000.00001"), {"a": (one, two)})
    assert model_info("a").published == (one, two) and model_info("b") == ModelInfo(family="other")
    with pytest.raises(ValueError, match="the model 'a' is described already"):
        describe_models(("a",), ModelInfo(family="G"))
    with pytest.raises(ValueError, match="unknown model 'c'"):
        describe_models(("c",), ModelInfo(family="G"))
    with pytest.raises(ValueError, match="figures are given for 'a', which is not among the names: b"):
        describe_models(("b",), ModelInfo(family="G"), {"a": one})
    with pytest.raises(ValueError, match="unknown model 'bb'"):
        model_info("bb")
