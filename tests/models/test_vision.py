import pytest
import torch
from safetensors.torch import save_file

from models import ResNetConfig, create_model, list_models, model_info
from models.checks import check_images, check_positive
from models.vision import DropPath

CONVOLUTIONAL = ("ResNet", "ResNeXt", "MobileNetV2", "RegNetX", "ODConv", "DG-Net")
NAMES = [name for name in list_models() if model_info(name).family in CONVOLUTIONAL]


@pytest.mark.parametrize("name", NAMES)
def test_classifiers_of_any_image_size(name):
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


def test_images_are_checked():
    check_images(torch.zeros(2, 3, 4, 5), 3)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), not \(2, 1, 4, 5\)"):
        check_images(torch.zeros(2, 1, 4, 5), 3)


def test_drop_path():
    torch.manual_seed(0)
    x, drop = torch.ones(4000, 2, 3), DropPath(0.25)
    kept = drop(x).flatten(1)
    assert kept.std(1).max() == 0 and kept.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop.eval()(x), x) and torch.equal(DropPath(0.0)(x), x)
