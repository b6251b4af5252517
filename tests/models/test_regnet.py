import pytest
import torch

from models import create_model
from models.regnet import CONFIGS, stage_shapes

# Published: torchvision's model pages ("num_params") for 400MF (its own last width), 800MF, 1.6GF and 3.2GF;
# timm's results table (2.68, 5.16 and 6.20 M) for 200MF, 400MF and 600MF.
PARAMETERS = {
    "regnet_x_200mf": 2_684_792,
    "regnet_x_400mf": 5_157_512,
    "regnet_x_400mf_tv": 5_495_976,
    "regnet_x_600mf": 6_196_040,
    "regnet_x_800mf": 7_259_656,
    "regnet_x_1_6gf": 9_190_136,
    "regnet_x_3_2gf": 15_296_552,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == PARAMETERS[name]


def test_widths_and_depths_of_the_paper():
    """arXiv 2003.13678, table of RegNetX models in appendix."""
    assert stage_shapes(CONFIGS["regnet_x_400mf"]) == [(32, 1, 16), (64, 2, 16), (160, 7, 16), (384, 12, 16)]
    assert stage_shapes(CONFIGS["regnet_x_3_2gf"]) == [(96, 2, 48), (192, 6, 48), (432, 15, 48), (1008, 2, 48)]
    assert stage_shapes(CONFIGS["regnet_x_400mf_tv"])[-1] == (400, 12, 16)


def test_torchvision_key_names():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in create_model("regnet_x_400mf").state_dict().items()}
    assert shapes["stem.0.weight"] == (32, 3, 3, 3)
    assert shapes["trunk_output.block2.block2-0.proj.0.weight"] == (64, 32, 1, 1)
    assert shapes["trunk_output.block2.block2-1.f.b.0.weight"] == (64, 16, 3, 3)
    assert shapes["trunk_output.block4.block4-11.f.c.1.running_mean"] == (384,)


def test_errors():
    with pytest.raises(ValueError, match="initial must be a multiple of 8, slope >= 0 and ratio > 1, not 20, "):
        create_model("regnet_x_200mf", initial=20)
