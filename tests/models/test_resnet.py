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
