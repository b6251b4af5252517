"""A task is data, model, loss and metric under one name; the registry of their names.

`nmforge.tasks` registers those that nmforge brings. A task of your own is a function from a `DataConfig` to a `Task`::

    @register_task
    def mine(config: DataConfig) -> Task: ...
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from algo.distributed import to_device
from algo.settings import setting
from algo.train import Batches

__all__ = ["DataConfig", "Task", "TaskBuilder", "get_task", "list_tasks", "register_task"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a task reads, and how it is cut into batches."""

    batch_size: int = setting(64, "examples of a step, shared out to all processes")
    seed: int = setting(0, "of the split, where the data has none, and of the order")
    train_size: int | None = setting(None, "examples of an epoch; epochs walk on through all of them")
    test_size: int | None = setting(None, "held-out examples")
    max_length: int = setting(64, "tokens to which a text is cut")
    augment: bool = setting(False, "images: random shifts, or crops and mirror images")
    folder: Path | None = setting(None, "imagefolder, hf: where the data is")
    image_size: int = setting(224, "imagefolder, hf: pixels of a side")
    workers: int = setting(2, "imagefolder, hf: threads that decode images")
    text: str = setting("text", "hf: column of the text")
    image: str = setting("image", "hf: column of the image")
    label: str = setting("label", "hf: column of the label")
    test_split: str = setting("test", "imagefolder, hf: name of the held-out split")

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "image_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, not {getattr(self, name)!r}")
        for name in ("train_size", "test_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, not {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """Data, model, loss and metric.

    Members
    -------
    classes
        Names of the classes.
    build
        Name of another model, or None -> the model to train, initialised from torch's generator.
    batches
        Training batches of an epoch, see `algo.train.Batches`.
    held_out
        Batches on which accuracy is measured.
    inputs, labels
        A batch's arguments of the model, and its labels.
    layers
        Glob of the layers that one pattern for all is about: not the embedding, not the head.
    facts
        What decides the data (JSON values).
    """

    name: str
    classes: Sequence[str]
    build: Callable[[str | None], nn.Module]
    batches: Batches
    held_out: Callable[[], Iterable[Any]]
    inputs: Callable[[Any], tuple[Tensor, ...]]
    labels: Callable[[Any], Tensor]
    layers: str
    facts: Mapping[str, Any]

    def model(self, seed: int = 0, name: str | None = None) -> nn.Module:
        """A new model, initialised by ``seed``; ``name`` takes another than the task's own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(name)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """(B, classes)."""
        return model(*self.inputs(batch))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.logits(model, batch), self.labels(batch))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Accuracy in [0, 1] on the held-out examples; leaves the model in eval mode."""
        model.eval()
        device = next(model.parameters()).device
        right = count = 0
        with parametrize.cached():
            for batch in self.held_out():
                moved = to_device(batch, device)
                labels = self.labels(moved)
                right += int((self.logits(model, moved).argmax(1) == labels).sum())
                count += len(labels)
        return right / count


TaskBuilder: TypeAlias = Callable[[DataConfig], Task]

_builders: dict[str, TaskBuilder] = {}


def register_task(builder: TaskBuilder) -> TaskBuilder:
    """Record a task under its function's name.

    Raises
    ------
    ValueError
        Another has that name already.
    """
    name = builder.__name__
    if name in _builders:
        raise ValueError(f"a task named {name!r} is already registered, by {_builders[name].__module__}")
    _builders[name] = builder
    return builder


def list_tasks() -> list[str]:
    """Names that `get_task` knows, sorted."""
    return sorted(_builders)


def get_task(name: str, config: DataConfig | None = None, **options: Any) -> Task:
    """Load a registered task.

    Parameters
    ----------
    config
        Its data; or give fields of `DataConfig` as ``options``.

    Raises
    ------
    ValueError
        Unknown name; the message has near ones.
    FileNotFoundError
        The data is not there; the message says what to install.
    """
    if name not in _builders:
        near = difflib.get_close_matches(name, _builders, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(list_tasks()) or 'none'}"
        raise ValueError(f"unknown task {name!r}: {hint}")
    if config is not None and options:
        raise TypeError("give a DataConfig or its fields, not both")
    return _builders[name](config or DataConfig(**options))
