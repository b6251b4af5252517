import pytest
import torch

from models import create_model

# Published: torchvision's model pages ("num_params"); L. Liu et al., arXiv 2108.00708, table 1.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnext50_32x4d": 25_028_904,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == PARAMETERS[name]


def test_torchvision_key_names():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in create_model("resnext50_32x4d").state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7) and shapes["fc.bias"] == (1000,)
    assert shapes["layer1.0.conv2.weight"] == (128, 4, 3, 3) and shapes["layer4.2.bn3.running_var"] == (2048,)
    assert shapes["layer2.0.downsample.0.weight"] == (512, 256, 1, 1) and "layer2.1.downsample.0.weight" not in shapes
    assert len(shapes) == 320  # as torchvision's resnext50_32x4d and resnet50


def test_stride_is_in_the_3x3_convolution():
    block = create_model("resnet50", width=8).layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


def test_only_bottlenecks_have_groups():
    with pytest.raises(ValueError, match="only a bottleneck has groups: give bottleneck=True"):
        create_model("resnet18", groups=2)


def test_small_images_and_other_channels():
    model = create_model("resnet18", width=8, blocks=(1, 1), channels=1, small_stem=True, num_classes=4)
    assert model.conv1.weight.shape == (8, 1, 3, 3) and model.conv1.stride == (1, 1)
    shapes = []
    model.layer1.register_forward_hook(lambda _module, given, result: shapes.extend((given[0].shape, result.shape)))
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 4) and shapes == [(2, 8, 28, 28)] * 2
    for shape in ((2, 3, 28, 28), (1, 28, 28)):
        with pytest.raises(ValueError, match=r"images must be \(B, 1, H, W\), not \("):
            model(torch.zeros(shape))


def test_dropout_before_the_classifier():
    model = create_model("resnet18", width=8, blocks=(1,), dropout=0.5).train()
    seen = []
    model.fc.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    model(torch.randn(16, 3, 32, 32))
    assert 0.3 < float((seen[0] == 0).float().mean()) < 0.9
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), not -1"):
        create_model("resnet18", dropout=-1)
