import pytest
import torch
from torch import nn

from algo.optim import OPTIMIZERS, SCHEDULES, make_optimizer, schedule
from algo.train import TrainConfig


def test_each_optimizer_takes_a_step() -> None:
    for name in OPTIMIZERS:
        layer = nn.Linear(3, 2)
        layer.bias.requires_grad_(False)
        optimizer = make_optimizer(layer, TrainConfig(optimizer=name, lr=0.1))
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
        before = layer.weight.detach().clone()
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert not torch.equal(before, layer.weight)


def test_sgd_is_nesterovs_if_it_has_momentum() -> None:
    configs = [TrainConfig(optimizer="sgd", momentum=momentum) for momentum in (0.0, 0.9)]
    made = [make_optimizer(nn.Linear(1, 1), config) for config in configs]
    assert [optimizer.param_groups[0]["nesterov"] for optimizer in made] == [False, True]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
        ("constant", [1 / 3, 2 / 3] + [1] * 4),
    ],
)
def test_warm_up_then_schedule(name: str, expected: list[float]) -> None:
    factor = schedule(TrainConfig(schedule=name, warmup=1 / 3), 6)
    assert [factor(step) for step in range(6)] == pytest.approx(expected, abs=1e-6)


def test_schedules_start_at_one() -> None:
    assert {fall(0.0) for fall in SCHEDULES.values()} == {1.0}
