import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algo.distill import DistillConfig, distillation
from algo.sparsify import sparsify
from algo.train import TrainConfig, train


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3))


X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def make(config: DistillConfig, teacher: nn.Module | None = None):
    return distillation(teacher or net(0), lambda model, batch: model(batch[0]), lambda batch: batch[1], config)


def test_a_student_that_is_its_teacher_has_no_distance() -> None:
    loss = make(DistillConfig(alpha=1.0, hidden=1.0, layers=("0",)))
    assert loss(net(0), (X, Y)).item() == pytest.approx(0, abs=1e-6)
    assert loss(net(1), (X, Y)).item() > 0.01


def test_terms() -> None:
    student, teacher, heat = net(1), net(0), 3.0
    own, opinion = student(X), teacher(X)
    soft = -((opinion / heat).softmax(1) * ((own / heat).log_softmax(1) - (opinion / heat).log_softmax(1))).sum(1).mean()
    hidden = F.mse_loss(student[0](X), teacher[0](X))
    expected = 0.25 * F.cross_entropy(own, Y) + 0.75 * heat**2 * soft + 2.0 * hidden
    loss = make(DistillConfig(alpha=0.75, temperature=heat, hidden=2.0, layers=("0",)), teacher)
    assert loss(student, (X, Y)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_teacher_does_not_learn_and_a_sparse_student_comes_nearer() -> None:
    teacher, student = net(0), net(0)
    before = teacher[1].weight.clone()
    sparsify(student, {"*.0": "2:4", "1": "2:4"})
    loss = make(DistillConfig(alpha=1.0), teacher)
    losses = train(student, lambda epoch: [(X, Y)] * 4, loss, TrainConfig(epochs=10, lr=0.01)).losses
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(teacher[1].weight, before) and not any(p.requires_grad for p in teacher.parameters())


def test_unknown_layers_and_wrong_values() -> None:
    with pytest.raises(ValueError, match="no module matches 'block.*'; there are 0, 0.0"):
        make(DistillConfig(hidden=1.0, layers=("block.*",)))
    for field, value, message in (
        ("alpha", 1.5, "alpha must be in"), ("temperature", 0.0, "temperature must be > 0"),
        ("hidden", -1.0, "hidden must be >= 0"), ("hidden", 1.0, "hidden states need layers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            DistillConfig(**{field: value})
