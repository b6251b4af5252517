import pytest
import torch
from torch import nn

from algo.ema import EMA
from algo.sparsify import finalize, sparsify
from algo.verify import verify


def test_mean_of_two_steps() -> None:
    layer = nn.Linear(2, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    mean = EMA(layer, 0.5)
    nn.init.constant_(layer.weight, 3.0)
    mean.update(layer, 100)
    assert mean.mean["weight"].tolist() == [[2.0, 2.0]]
    with mean.applied(layer):
        assert layer.weight.tolist() == [[2.0, 2.0]]
    assert layer.weight.tolist() == [[3.0, 3.0]]
    other = EMA(layer, 0.5)
    other.load(mean.mean)
    other.apply(layer)
    assert layer.weight.tolist() == [[2.0, 2.0]]


def test_the_first_steps_are_soon_forgotten() -> None:
    layer = nn.Linear(1, 1, bias=False)
    mean = EMA(layer, 0.999)
    nn.init.constant_(layer.weight, 5.0)
    for step in range(60):
        mean.update(layer, step)
    assert mean.mean["weight"].item() == pytest.approx(5.0, abs=1e-3)


def test_the_averaged_model_obeys_its_pattern() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    sparsify(layer, "2:4")
    mean = EMA(layer, 0.9)
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    mean.update(layer, 50)
    mean.apply(layer)
    verify(layer, finalize(layer))


def test_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    assert list(EMA(layer, 0.9).mean) == ["weight"]


def test_wrong_decay() -> None:
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\), not 1.0"):
        EMA(nn.Linear(1, 1), 1.0)
