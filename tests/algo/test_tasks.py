import pytest
import torch
from torch import nn

from algo import tasks
from algo.tasks import DataConfig, Task, get_task, list_tasks, register_task


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry with one small task."""
    monkeypatch.setattr(tasks, "_builders", {})

    @register_task
    def line(config: DataConfig) -> Task:
        x = torch.eye(4)
        batch = (x, torch.tensor([0, 1, 1, 0]))
        return Task(
            name="line", classes=("a", "b"), build=lambda name: nn.Linear(4, 2), batches=lambda epoch: [batch],
            held_out=lambda: [batch, (x[:2], torch.tensor([1, 1]))], inputs=lambda batch: (batch[0],),
            labels=lambda batch: batch[1], layers="*", facts={"size": config.batch_size},
        )  # fmt: skip


def test_a_task(lines: None) -> None:
    task = get_task("line", batch_size=3)
    assert list_tasks() == ["line"] and task.facts == {"size": 3}
    model = task.model(seed=1)
    torch.manual_seed(0)
    assert torch.equal(task.model(1).weight, model.weight) and not torch.equal(task.model(2).weight, model.weight)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]]))
        model.bias.zero_()
    assert task.evaluate(model.train()) == pytest.approx(5 / 6) and not model.training
    assert task.loss(model, task.batches(0)[0]).item() == pytest.approx(0.3132617)


def test_wrong_use(lines: None) -> None:
    with pytest.raises(ValueError, match="unknown task 'lines': did you mean line?"):
        get_task("lines")
    with pytest.raises(ValueError, match="unknown task 'zzz': known: line"):
        get_task("zzz")
    with pytest.raises(TypeError, match="a DataConfig or its fields, not both"):
        get_task("line", DataConfig(), batch_size=2)
    with pytest.raises(ValueError, match="a task named 'line' is already registered, by .*test_tasks"):
        register_task(tasks._builders["line"])


@pytest.mark.parametrize("field", ["batch_size", "max_length", "image_size", "workers", "train_size", "test_size"])
def test_wrong_data_config(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be >= 1, not 0"):
        DataConfig(**{field: 0})
