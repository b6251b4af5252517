import pytest
import torch
from safetensors.torch import save_file

from models import ResNetConfig, create_model, mobilenet, regnet, resnet
from models.vision import check_positive

NAMES = sorted({**resnet.CONFIGS, **mobilenet.CONFIGS, **regnet.CONFIGS})


@pytest.mark.parametrize("name", NAMES)
def test_every_convolutional_network_runs_on_any_size(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=7)
        assert not model.training
        assert model(torch.empty(2, 3, 64, 96)).shape == (2, 7)


def test_own_weights_load_from_a_path(tmp_path):
    model = create_model("resnet18", width=8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = create_model("resnet18", width=8, pretrained=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="do not fit resnet18"):
        create_model("resnet18", width=16, pretrained=tmp_path)


def test_errors():
    with pytest.raises(ValueError, match="resnet18 has no option 'depth': it has bottleneck, blocks, width"):
        create_model("resnet18", depth=3)
    with pytest.raises(ValueError, match="no installable package carries weights of resnet18: give pretrained="):
        create_model("resnet18", pretrained=True)
    with pytest.raises(ValueError, match=r"blocks must hold integers >= 1, not \(2, 0\)"):
        check_positive(ResNetConfig(bottleneck=False, blocks=(2, 0)))
    with pytest.raises(ValueError, match="blocks must not be empty"):
        ResNetConfig(bottleneck=False, blocks=())
