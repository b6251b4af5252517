"""Data on disk: folders of images by class, and Hugging Face data sets saved with ``save_to_disk``.

Images become float tensors: cropped and resized, scaled to [0, 1], normalised by ImageNet's mean and deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImageFolder", "Transform", "hugging_face", "image_folder"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolder(NamedTuple):
    """Files and their classes' numbers."""

    classes: tuple[str, ...]
    files: list[Path]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """From an image to (3, size, size).

    Without ``augment``: the short side becomes 8/7 of ``size``, the centre is cut out. With it: a random part of 25 to 100 % of
    the area, mirrored half of the time; ``seed`` and the place in the data decide, so that a resumed run sees the same.
    """

    size: int
    augment: bool = False
    seed: int = 0

    def __call__(self, image: Any, place: int) -> Tensor:
        image = image.convert("RGB")
        width, height = image.size
        box, mirror = self._random(width, height, place) if self.augment else (self._centre(width, height), False)
        pixels = torch.from_numpy(np.array(image.resize((self.size, self.size), box=box), dtype=np.float32))
        pixels = (pixels / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
        return (pixels.flip(1) if mirror else pixels).permute(2, 0, 1).contiguous()

    def _centre(self, width: int, height: int) -> tuple[float, float, float, float]:
        side = min(width, height) * 7 / 8
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def _random(self, width: int, height: int, place: int) -> tuple[tuple[float, float, float, float], bool]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        area, across, down, mirror = torch.rand(4, generator=generator).tolist()
        side = min(width, height) * (0.25 + 0.75 * area) ** 0.5
        left, top = across * (width - side), down * (height - side)
        return (left, top, left + side, top + side), mirror < 0.5


def image_folder(folder: Path, split: str, *, classes: Sequence[str] | None = None) -> ImageFolder:
    """List ``folder/split/<class>/*``, sorted.

    Parameters
    ----------
    classes
        Of the training split; others are refused.

    Raises
    ------
    FileNotFoundError
        No such folder; the message has the layout that is expected.
    ValueError
        No classes, a class without images, or an unknown class.
    """
    root = folder / split
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: images are expected in {folder}/train/CLASS/ and {folder}/{split}/CLASS/")
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not found:
        raise ValueError(f"{root} has no folders: one for each class is expected")
    names = tuple(classes or found)
    strange = [name for name in found if name not in names]
    if strange:
        raise ValueError(f"{root} has a class {strange[0]!r} that the training images do not have")
    files: list[Path] = []
    labels: list[int] = []
    for name in found:
        images = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in _SUFFIXES)
        if not images:
            raise ValueError(f"{root / name} has no images ({', '.join(sorted(_SUFFIXES))})")
        files += images
        labels += [names.index(name)] * len(images)
    return ImageFolder(names, files, labels)


def open_image(path: Path) -> Any:
    """Decode a file; ValueError with its name if it is damaged."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no whole image ({error}): replace or delete it") from None


def hugging_face(folder: Path, split: str) -> Any:
    """A split of a data set that ``datasets`` saved with ``save_to_disk``.

    Raises
    ------
    ImportError
        The package ``datasets`` is not installed.
    FileNotFoundError, ValueError
        No data set there, or no such split.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError("Hugging Face data sets need the package datasets: pip install 'nmforge[hf]'") from None
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give data.folder, where datasets' save_to_disk wrote to")
    found = datasets.load_from_disk(str(folder))
    if not isinstance(found, dict):
        raise ValueError(f"{folder} holds one split only: save a DatasetDict with train and {split}")
    if split not in found:
        raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(found)} (data.test_split)")
    return found[split]
