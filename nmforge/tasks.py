"""The tasks that nmforge brings: movie sentences, R8, 20 Newsgroups, MNIST-5k, folders of images, Hugging Face data on disk.

    task = get_task("mnist5k", batch_size=64)
    model = task.model(seed=0)
    train(model, task.batches, task.loss, TrainConfig(epochs=10, lr=1e-3))
    task.evaluate(model)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algo.batches import ImageBatch, LazyImages, TextBatch, collate_texts, image_batches, text_batches, walk
from algo.data import Sentence, movie_sentences
from algo.data import mnist5k as digits
from algo.data import newsgroups as newsgroup_texts
from algo.data import r8 as r8_texts
from algo.folders import Transform, hugging_face, image_folder, open_image
from algo.tasks import DataConfig, Task, get_task, list_tasks, register_task
from models.registry import create_model
from models.tokenizer import load_tokenizer

__all__ = ["get_task", "hf", "imagefolder", "list_tasks", "mnist5k", "movies", "newsgroups", "r8"]

HELD_OUT_BATCH = 128


@register_task
def movies(config: DataConfig) -> Task:
    """Is a movie sentence positive or negative? MiniLM-L6, 8,070 sentences and 2,000 held out."""
    train, test = movie_sentences(seed=config.seed, test_size=config.test_size or 2000)
    return _texts("movies", ("negative", "positive"), train, test, config)


@register_task
def r8(config: DataConfig) -> Task:
    """Topic of a Reuters article, 8 classes. MiniLM-L6."""
    corpus = r8_texts()
    return _texts("r8", corpus.classes, corpus.train, _some(corpus.test, config), config)


@register_task
def newsgroups(config: DataConfig) -> Task:
    """Group of a post, 20 classes. MiniLM-L6."""
    corpus = newsgroup_texts()
    return _texts("newsgroups", corpus.classes, corpus.train, _some(corpus.test, config), config)


@register_task
def mnist5k(config: DataConfig) -> Task:
    """4,000 digits and 1,000 held out. A vision transformer of 4 layers."""
    train, test = digits(seed=config.seed, test_size=config.test_size or 1000)
    train_images, test_images = ((part.images.float() / 255 - 0.1307) / 0.3081 for part in (train, test))
    # Augmentation shifts zeros in: of the scaled pixels that is a faint grey, and it does no harm.
    batches = image_batches(
        train_images, train.labels, size=config.train_size, batch_size=config.batch_size, seed=config.seed,
        augment=2 if config.augment else 0,
    )  # fmt: skip

    def held_out() -> list[ImageBatch]:
        parts = zip(test_images.split(HELD_OUT_BATCH), test.labels.split(HELD_OUT_BATCH), strict=True)
        return [ImageBatch(*part) for part in parts]

    return Task(
        name="mnist5k", classes=tuple("0123456789"), build=_vision("vit_mnist", 10), batches=batches, held_out=held_out,
        inputs=lambda batch: (batch.pixels,), labels=lambda batch: batch.labels, layers="blocks.*",
        facts=_facts(config, train=len(train.labels)),
    )  # fmt: skip


@register_task
def imagefolder(config: DataConfig) -> Task:
    """Images in ``folder/train/CLASS/`` and ``folder/test/CLASS/``. DeiT-T by default."""
    folder = _folder(config)
    train = image_folder(folder, "train")
    test = image_folder(folder, config.test_split, classes=train.classes)
    return _images("imagefolder", train.classes, train.files, train.labels, test.files, test.labels, config)


@register_task
def hf(config: DataConfig) -> Task:
    """A data set that Hugging Face's ``datasets`` saved to disk: images or texts, by its columns."""
    folder = _folder(config)
    train, test = hugging_face(folder, "train"), hugging_face(folder, config.test_split)
    column = config.image if config.image in train.column_names else config.text
    for name in (column, config.label):
        if name not in train.column_names:
            there = ", ".join(train.column_names)
            raise ValueError(f"{folder} has no column {name!r}: it has {there} (data.text, data.image, data.label)")
    labels = [list(part[config.label]) for part in (train, test)]
    names = getattr(train.features[config.label], "names", None)
    found = sorted(set(labels[0]))
    classes = tuple(names or map(str, found))
    number = {value: index for index, value in enumerate(range(len(classes)) if names else found)}
    strange = next((value for part in labels for value in part if value not in number), None)
    if strange is not None:
        raise ValueError(f"{folder} has a label {strange!r} that is no class: it has {', '.join(classes)}")
    ys = [[number[value] for value in part] for part in labels]
    if column == config.text:
        texts = [list(zip(part[column], y, strict=True)) for part, y in zip((train, test), ys, strict=True)]
        return _texts("hf", classes, texts[0], _some(texts[1], config), config)
    return _images("hf", classes, _Column(train, column), ys[0], _Column(test, column), ys[1], config)


class _Column(Sequence[Any]):
    """Images of a Hugging Face split, decoded when they are asked for."""

    def __init__(self, split: Any, name: str) -> None:
        self.split, self.name = split, name

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Any) -> Any:
        return self.split[index][self.name]


def _texts(name: str, classes: Sequence[str], train: list[Sentence], test: list[Sentence], config: DataConfig) -> Task:
    tokenizer = load_tokenizer("minilm_l6")
    tokenizer.enable_truncation(config.max_length)

    def encode(part: list[Sentence]) -> list[list[int]]:
        return [code.ids for code in tokenizer.encode_batch([text for text, _ in part])]

    ids, test_ids = encode(train), encode(test)
    labels, test_labels = [label for _, label in train], [label for _, label in test]
    # Alike lengths together, to save padding.
    order = sorted(range(len(test_ids)), key=lambda number: len(test_ids[number]))

    def held_out() -> list[TextBatch]:
        parts = [order[start : start + HELD_OUT_BATCH] for start in range(0, len(order), HELD_OUT_BATCH)]
        return [collate_texts(test_ids, test_labels, part) for part in parts]

    def build(model: str | None) -> nn.Module:
        chosen = model or "minilm_l6"
        return create_model(chosen, pretrained=chosen == "minilm_l6", num_classes=len(classes), attention_dropout=0.0)

    return Task(
        name=name, classes=classes, build=build, held_out=held_out,
        batches=text_batches(ids, labels, size=config.train_size, batch_size=config.batch_size, seed=config.seed),
        inputs=lambda batch: (batch.ids, batch.mask), labels=lambda batch: batch.labels, layers="bert.encoder.*",
        facts=_facts(config, train=len(train)) | {"data_seed": config.seed},
    )  # fmt: skip


def _images(
    name: str, classes: Sequence[str], train: Sequence[Any], labels: list[int], test: Sequence[Any], test_labels: list[int],
    config: DataConfig,
) -> Task:  # fmt: skip
    """``train`` and ``test`` have files, or images."""
    plain = Transform(size=config.image_size)
    size = min(config.train_size or len(train), len(train))
    held = range(min(config.test_size or len(test), len(test)))
    # A part that is spread over all classes: the files are sorted by class.
    kept = sorted(torch.randperm(len(test), generator=torch.Generator().manual_seed(config.seed))[: len(held)].tolist())

    def batches(epoch: int) -> LazyImages:
        change = Transform(size=config.image_size, augment=config.augment, seed=config.seed + epoch)
        order = walk(len(train), size, epoch, config.seed)
        return _lazy(train, labels, order, change, config.batch_size, config.workers)

    return Task(
        name=name, classes=classes, build=_vision("deit_tiny", len(classes), config.image_size), batches=batches,
        held_out=lambda: iter(_lazy(test, test_labels, kept, plain, HELD_OUT_BATCH, config.workers)),
        inputs=lambda batch: (batch.pixels,), labels=lambda batch: batch.labels, layers="blocks.*",
        facts=_facts(config, train=len(train)),
    )  # fmt: skip


def _lazy(
    items: Sequence[Any], labels: list[int], order: Sequence[int], change: Transform, batch: int, workers: int
) -> LazyImages:
    def pixels(place: int) -> Tensor:
        item = items[place]
        return change(open_image(item) if isinstance(item, Path) else item, place)

    return LazyImages(pixels, labels, order, batch_size=batch, workers=workers)


def _vision(default: str, classes: int, image: int | None = None) -> Any:
    def build(model: str | None) -> nn.Module:
        name = model or default
        sizes: dict[str, Any] = {"image": image} if image is not None and name.startswith(("deit", "vit", "ceit")) else {}
        return create_model(name, num_classes=classes, **sizes)

    return build


def _some(test: list[Sentence], config: DataConfig) -> list[Sentence]:
    """As many held-out texts as are wanted, in the order of the corpus; drawn by the seed, for a corpus may be sorted."""
    if config.test_size is None or config.test_size >= len(test):
        return test
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(config.seed))[: config.test_size]
    return [test[number] for number in sorted(chosen.tolist())]


def _folder(config: DataConfig) -> Path:
    if config.folder is None:
        raise ValueError("the data is in a folder: give data.folder")
    return config.folder


def _facts(config: DataConfig, **more: Any) -> dict[str, Any]:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items() if key != "workers"}
    return {"data": plain, **more}
