"""Channel permutation: the function stays, what masks keep grows."""

from itertools import combinations

import pytest
import torch
from torch import nn

from algo.mask import magnitude_mask
from algo.nm import NM
from algo.permute import permute_channels, search_order
from algo.sparsify import sparsify
from models import create_model


def kept(matrix, nm):
    return (matrix * magnitude_mask(matrix, nm)).sum().item()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "2:5", "1:8", "4:16"])
def test_gain_over_the_given_and_over_random_orders(pattern):
    torch.manual_seed(0)
    nm = NM(pattern)
    matrix = (torch.randn(24, 80) * torch.rand(80).pow(3)).abs()
    order = search_order([(matrix, nm)], generator=torch.Generator().manual_seed(0), seconds=20)
    assert sorted(order.tolist()) == list(range(80))
    randoms = [kept(matrix[:, torch.randperm(80)], nm) for _ in range(20)]
    assert kept(matrix[:, order], nm) > max(randoms)


def test_near_the_optimum_where_it_can_be_enumerated():
    for seed in range(8):
        torch.manual_seed(seed)
        matrix, nm = torch.rand(5, 8).pow(2), NM("2:4")
        best = max(kept(matrix[:, [*half, *(c for c in range(8) if c not in half)]], nm) for half in combinations(range(8), 4))
        order = search_order([(matrix, nm)], generator=torch.Generator().manual_seed(0), seconds=5)
        assert kept(matrix[:, order], nm) >= 0.98 * best


def test_predicted_gains_are_real():
    """A round's swap changes what is kept by just the gain that was computed: so a search never loses."""
    from algo.permute import _gains

    torch.manual_seed(0)
    matrix, nm = torch.rand(6, 12), NM("2:3")
    slots = torch.tensor([[[0, 1, 2]], [[6, 7, 8]]])
    gains = _gains(matrix, nm, torch.arange(12), slots)
    for i in range(3):
        for j in range(3):
            order = torch.arange(12)
            order[[i, 6 + j]] = order[[6 + j, i]]
            assert gains[0, i, j].item() == pytest.approx(kept(matrix[:, order], nm) - kept(matrix, nm), abs=1e-5)


class Net(nn.Module):
    """Residuals, a depth-wise and a grouped convolution, a concatenation, a flatten before a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.deep, self.group = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1, groups=4)
        self.c, self.up, self.out = nn.Conv2d(48, 12, 1), nn.Linear(12 * 16, 40), nn.Linear(40, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.b(self.a(x).relu())
        x = self.c(torch.cat([x, self.group(self.deep(x))], 1))
        return self.out(self.up(x.flatten(1)).relu())


@pytest.mark.parametrize("pattern", ["2:4", {"a": "1:4", "b": "2:8", "*": "2:4"}])
def test_function_is_preserved(pattern):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 4, 4)
    for p in model.parameters():
        p.data *= torch.rand_like(p).pow(2) + 0.05
    model.norm.running_mean.normal_()
    before, dense = model(x), {name: p.clone() for name, p in model.named_parameters()}
    rows = permute_channels(model, pattern, x, seconds=5)
    assert torch.allclose(model(x), before, atol=1e-5)
    assert any(not torch.equal(p, dense[name]) for name, p in model.named_parameters())
    assert all(row.kept_after >= row.kept_before for row in rows) and any(row.kept_after > row.kept_before for row in rows)
    total = sum((m.weight * magnitude_mask(m.weight, NM("2:4"))).abs().sum() for m in (model.a, model.up, model.out))
    sparsify(model, pattern, method="magnitude")
    assert total > 0


def test_a_residual_network_keeps_more():
    torch.manual_seed(0)
    model, x = create_model("resnet18"), torch.randn(1, 3, 32, 32)
    for module in model.modules():  # trained networks have channels of different size
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.rand(1, module.weight.shape[1], 1, 1).pow(2) + 0.1
    before = model(x)
    rows = permute_channels(model, "2:4", x, seconds=4)
    assert torch.allclose(model(x), before, atol=1e-3 * before.abs().max().item())
    assert len(rows) >= 9 and sum(row.kept_after - row.kept_before for row in rows) / len(rows) > 0.01


def test_errors():
    with pytest.raises(ValueError, match="seconds must be > 0"):
        permute_channels(nn.Linear(8, 8), "2:4", torch.randn(1, 8), seconds=0)
