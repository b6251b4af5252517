"""From examples to batches: orders that a seed and an epoch decide, texts of like length together, images loaded when needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ImageBatch", "LazyImages", "TextBatch", "collate_texts", "image_batches", "shifted", "text_batches", "walk"]


class TextBatch(NamedTuple):
    """``ids`` and ``mask`` int64 (B, S), ``labels`` int64 (B,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


class ImageBatch(NamedTuple):
    """``pixels`` float (B, C, H, W), ``labels`` int64 (B,)."""

    pixels: Tensor
    labels: Tensor


def walk(count: int, size: int, epoch: int, seed: int) -> list[int]:
    """Numbers of one epoch's examples: ``size`` at a time along an endless row of permutations of ``count``."""
    laps = range(epoch * size // count, ((epoch + 1) * size - 1) // count + 1)
    row: list[int] = []
    for lap in laps:
        row += torch.randperm(count, generator=torch.Generator().manual_seed(7919 * seed + lap)).tolist()
    start = epoch * size - laps.start * count
    return row[start : start + size]


def collate_texts(ids: Sequence[Sequence[int]], labels: Sequence[int], numbers: Sequence[int]) -> TextBatch:
    """Pad the numbered texts to the longest of them; token 0 is padding."""
    length = max(len(ids[number]) for number in numbers)
    rows = torch.zeros(len(numbers), length, dtype=torch.int64)
    for row, number in enumerate(numbers):
        rows[row, : len(ids[number])] = torch.tensor(ids[number])
    return TextBatch(rows, (rows != 0).long(), torch.tensor([labels[number] for number in numbers]))


def text_batches(
    ids: Sequence[Sequence[int]], labels: Sequence[int], *, size: int | None, batch_size: int, seed: int
) -> Callable[[int], list[TextBatch]]:
    """Epochs of ``size`` texts (None: all); texts of similar length go together, batches in random order."""
    count = min(size or len(ids), len(ids))

    def epoch(number: int) -> list[TextBatch]:
        chosen = walk(len(ids), count, number, seed)
        chosen.sort(key=lambda index: (len(ids[index]), index))
        parts = [chosen[start : start + batch_size] for start in range(0, count, batch_size)]
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(1000 * seed + number)).tolist()
        return [collate_texts(ids, labels, parts[index]) for index in order]

    return epoch


def image_batches(
    images: Tensor, labels: Tensor, *, size: int | None, batch_size: int, seed: int, augment: int = 0
) -> Callable[[int], list[ImageBatch]]:
    """Epochs of ``size`` images in memory (None: all), each shifted by up to ``augment`` pixels."""
    count = min(size or len(images), len(images))

    def epoch(number: int) -> list[ImageBatch]:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        found = []
        chosen = torch.tensor(walk(len(images), count, number, seed))
        for part in chosen.split(batch_size):
            pixels = shifted(images[part], augment, generator) if augment else images[part]
            found.append(ImageBatch(pixels, labels[part]))
        return found

    return epoch


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image by up to ``most`` pixels in both directions; what comes in is 0."""
    batch, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (most,) * 4)
    rows = torch.randint(0, 2 * most + 1, (batch, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 2 * most + 1, (batch, 1), generator=generator) + torch.arange(width)
    index = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class LazyImages(Sequence[ImageBatch]):
    """The batches of one epoch, loaded one at a time by several threads; with several processes each loads only its rows.

    Parameters
    ----------
    load
        Place in the data -> pixels (C, H, W). The same for the same place, at any time and in any thread.
    labels
        Of all the data.
    order
        Places of this epoch's examples.
    """

    def __init__(
        self, load: Callable[[int], Tensor], labels: Sequence[int], order: Sequence[int], *, batch_size: int, workers: int
    ) -> None:
        self.load, self.labels, self.workers = load, labels, workers
        self.parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        return [self._load(part) for part in self.parts[index]] if isinstance(index, slice) else self._load(self.parts[index])

    def part(self, index: int, rank: int, world: int) -> tuple[ImageBatch, int]:
        """The rows of one process, and how many rows the whole batch has; see `algo.distributed.share`."""
        places = self.parts[index]
        return self._load(places[rank::world] or places[:1]), len(places)

    def _load(self, places: Sequence[int]) -> ImageBatch:
        if self.workers > 1:
            with ThreadPoolExecutor(self.workers) as pool:
                pixels = list(pool.map(self.load, places))
        else:
            pixels = [self.load(place) for place in places]
        return ImageBatch(torch.stack(pixels), torch.tensor([self.labels[place] for place in places]))
