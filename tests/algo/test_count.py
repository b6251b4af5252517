import pytest
import torch
from torch import nn

from algo.count import as_arguments, count
from models import create_model

# MACs, parameters, activations: L. Liu et al., arXiv 2108.00708, table 1 (in G, M, M; three decimals).
TABLE_1 = {
    "resnet50": (4.089, 25.557, 11.114),
    "resnet101": (7.801, 44.549, 16.232),
    "resnext50_32x4d": (4.230, 25.029, 14.401),
    "mobilenet_v2_200": (1.137, 11.258, 13.356),
}
# MACs in M: names of the RegNetX networks are their MACs; arXiv 2003.13678 gives one digit.
REGNETS = {
    "regnet_x_200mf": 200, "regnet_x_400mf": 400, "regnet_x_600mf": 600, "regnet_x_800mf": 800,
    "regnet_x_1_6gf": 1600, "regnet_x_3_2gf": 3200,
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_1)
def test_dense_rows_of_the_paper(name):
    with torch.device("meta"):
        found = count(create_model(name), torch.empty(1, 3, 224, 224))
    assert (round(found.macs / 1e9, 3), round(found.parameters / 1e6, 3), round(found.activations / 1e6, 3)) == TABLE_1[name]
    assert sum(row.macs for row in found.layers) == found.macs


def test_resnet50_exactly():
    with torch.device("meta"):
        found = count(create_model("resnet50"), torch.empty(1, 3, 224, 224))
    assert (found.macs, found.parameters, found.activations) == (4_089_184_256, 25_557_032, 11_113_984)
    assert found.linear_activations == 1000 and len(found.layers) == 54


@pytest.mark.parametrize("name", REGNETS)
def test_regnets_are_as_large_as_their_names(name):
    with torch.device("meta"):
        found = count(create_model(name), torch.empty(1, 3, 224, 224))
    assert found.macs / 1e6 == pytest.approx(REGNETS[name], rel=0.01)


def test_by_hand():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Flatten(), nn.Linear(500, 7))
    found = count(model, torch.randn(2, 4, 7, 7))
    conv, transposed, linear = found.layers
    assert (conv.macs, conv.parameters, conv.activations) == (2 * 25 * 6 * 2 * 9, 6 * 2 * 9 + 6, 2 * 6 * 25)
    assert (transposed.macs, transposed.activations) == (2 * 25 * 6 * 5 * 4, 2 * 5 * 100)
    assert (linear.macs, linear.activations, linear.kind) == (2 * 500 * 7, 14, "linear")
    assert found.macs == conv.macs + transposed.macs + linear.macs
    assert (found.activations, found.linear_activations) == (300 + 1000, 14)


def test_attention_and_repeated_layers_count():
    shared = nn.Linear(8, 8, bias=False)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = shared

        def forward(self, *, x):
            x = self.layer(self.layer(x))
            return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])

    found = count(Twice(), {"x": torch.randn(3, 5, 8)})
    (row,) = found.layers
    assert row.macs == 2 * 3 * 5 * 64 and found.parameters == 64
    assert found.macs == row.macs + 2 * 3 * 5 * 5 * 8


def test_code_that_needs_values_runs_for_real():
    class Peek(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x) if float(x.sum()) > 0 else x

    assert count(Peek(), torch.ones(1, 3)).macs == 12 and count(Peek(), -torch.ones(1, 3)).macs == 0


def test_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count(model, torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_hooks and model[0].weight.device.type == "cpu"


def test_errors():
    with pytest.raises(TypeError, match="inputs must be a tensor, a tuple or a dict of them, not int"):
        as_arguments(3)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        count(nn.Linear(3, 4), torch.ones(1, 5))


@pytest.mark.parametrize(
    ("share", "macs", "kept"), [(0.5, 2.0456, 13.8296), (0.25, 1.0238, 7.9658), (0.125, 0.5129, 5.034), (0.0625, 0.2575, 3.5681)]
)
def test_resnet50_with_sparse_convolutions(share, macs, kept):
    """N:M in every convolution, the classifier dense (A. Zhou et al., arXiv 2102.04010): G MACs and M weights that are left."""
    with torch.device("meta"):
        found = count(create_model("resnet50"), torch.zeros(1, 3, 224, 224))
    convolutions = [row for row in found.layers if row.kind == "conv"]
    less = lambda name: (1 - share) * sum(getattr(row, name) for row in convolutions)
    assert (found.macs - less("macs")) / 1e9 == pytest.approx(macs, abs=1e-4)
    assert (found.parameters - less("parameters")) / 1e6 == pytest.approx(kept, abs=6e-4)
