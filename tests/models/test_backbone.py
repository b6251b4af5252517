import pytest
import torch
from torch import nn

from models import create_model
from models.backbone import Backbone, FrozenBatchNorm2d, build_backbone, freeze_batch_norm, register_backbone


def test_frozen_batch_norm_is_batch_norm_that_stays():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    norm.train()(torch.randn(4, 5, 3, 3) * 2 + 1)
    frozen = freeze_batch_norm(nn.Sequential(norm))[0]
    x = torch.randn(2, 5, 3, 3)
    assert isinstance(frozen, FrozenBatchNorm2d) and not list(frozen.parameters())
    assert torch.equal(frozen.train()(x), norm.eval()(x))


def test_maps_are_those_of_the_network():
    backbone = build_backbone("resnet50", stages=(1, 3), width=8, frozen_norm=False).eval()
    assert isinstance(backbone, Backbone) and backbone.channels == (32, 128) and backbone.strides == (4, 16)
    network = create_model("resnet50", width=8)
    network.load_state_dict(backbone.state_dict(), strict=False)
    images = torch.randn(2, 3, 70, 50)
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    first = network.layer1(x)
    maps = backbone(images)
    assert torch.equal(maps[0], first) and torch.equal(maps[1], network.layer3(network.layer2(first)))
    assert maps[1].shape[2:] == (5, 4) and "layer4.0.conv1.weight" not in backbone.state_dict()


def test_frozen_stages_do_not_learn():
    backbone = build_backbone("resnet18", stages=(4,), width=8, frozen_stages=2)
    still = {name.split(".")[0] for name, value in backbone.named_parameters() if not value.requires_grad}
    assert still == {"conv1", "layer1"}  # norms have no parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (3, 2)}, r"stages must ascend within 1 to 4, not \(3, 2\)"),
        ({"stages": ()}, r"stages must ascend within 1 to 4, not \(\)"),
        ({"stages": (4,), "frozen_stages": 6}, "frozen_stages must be in 0 to 5, not 6"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_backbone("resnet18", **options)


def test_names():
    with pytest.raises(ValueError, match="unknown backbone 'resnet5': did you mean resnet50"):
        build_backbone("resnet5", stages=(4,))
    with pytest.raises(ValueError, match="a backbone named 'resnet50' is already registered"):
        register_backbone("resnet50")(lambda name, **options: nn.Identity())
