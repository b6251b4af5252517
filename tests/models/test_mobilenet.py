import pytest
import torch

from models import create_model

# Published: torchvision's model page (1.0); OSVAI/ODConv README (0.75, 0.5: 2.64, 1.97 M);
# L. Liu et al., arXiv 2108.00708, table 1 (2.0: 11.258 M).
PARAMETERS = {1.0: 3_504_872, 0.75: 2_636_424, 0.5: 1_968_680, 2.0: 11_258_088}


@pytest.mark.parametrize("width", PARAMETERS)
def test_published_sizes(width):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model("mobilenet_v2", width=width).parameters()) == PARAMETERS[width]


def test_torchvision_key_names():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in create_model("mobilenet_v2").state_dict().items()}
    assert shapes["features.0.0.weight"] == (32, 3, 3, 3) and shapes["features.1.conv.0.0.weight"] == (32, 1, 3, 3)
    assert shapes["features.2.conv.1.0.weight"] == (96, 1, 3, 3) and shapes["features.2.conv.3.running_mean"] == (24,)
    assert shapes["features.18.0.weight"] == (1280, 320, 1, 1) and shapes["classifier.1.weight"] == (1000, 1280)


def test_errors():
    with pytest.raises(ValueError, match="width must be > 0, not 0"):
        create_model("mobilenet_v2", width=0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), not 1"):
        create_model("mobilenet_v2", dropout=1)
    with pytest.raises(ValueError, match=r"a stage must be \(expansion, channels, blocks, stride\), .*not \(1, 16, 0, 1\)"):
        create_model("mobilenet_v2", stages=((1, 16, 0, 1),))
