"""A microscope image of cell nuclei with a number for every nucleus, cut into tiles: real data of the package stardist.

One grey image of 512 x 512 pixels, fluorescence, with 125 nuclei marked by hand that cover a fifth of it. The columns at the
right are held out: no pixel is in both parts.

Ref: J. Caicedo et al., Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl, Nature Methods 16, 2019.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from algo.data import PACKAGES, package_file
from algo.folders import open_image

__all__ = ["NUCLEI_CLASSES", "NucleiTiles", "cut_nuclei", "nuclei_image", "nuclei_tiles", "semantic_classes"]

NUCLEI_CLASSES = ("background", "nucleus", "border")
"""What the numbers in `NucleiTiles.classes` mean."""

_FILES = {
    "img2d.tif": "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750",
    "mask2d.tif": "59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f",
}
"""Name: SHA-256."""


class NucleiTiles(NamedTuple):
    """Tiles of one size.

    Members
    -------
    images
        uint8 (N, 1, size, size).
    classes
        int64 (N, size, size), numbers of `NUCLEI_CLASSES`.
    instances
        int64 (N, size, size): the number of the nucleus, as in the whole image, or 0.
    """

    images: Tensor
    classes: Tensor
    instances: Tensor


@lru_cache(maxsize=1)
def nuclei_image() -> tuple[Tensor, Tensor]:
    """The whole image, uint8 (1, 512, 512), and the number of each pixel's nucleus or 0, int64 (512, 512); do not change them.

    Raises
    ------
    FileNotFoundError
        The package is not installed; the message has the command.
    ValueError
        A file is not the published one.
    """
    image, instances = (_read(name) for name in _FILES)
    return image.to(torch.uint8)[None], instances


def nuclei_tiles(*, size: int = 64, stride: int | None = None, held_out: float = 0.25) -> tuple[NucleiTiles, NucleiTiles]:
    """Give training and held-out tiles.

    Parameters
    ----------
    size
        Side of a tile in pixels, 16 to 256. A nucleus is some 23 pixels wide.
    stride
        Distance of training tiles, 1..size; None: ``size``, no overlap. Held-out tiles never overlap each other.
    held_out
        Share of the columns held out, in (0, 1); rounded up to whole tiles.

    Raises
    ------
    ValueError
        A value out of range, or tiles so large that a part has none; else errors as for `nuclei_image`.
    """
    stride = size if stride is None else stride
    if not isinstance(size, int) or not 16 <= size <= 256:
        raise ValueError(f"size must be an integer in 16..256, not {size!r}")
    if not 1 <= stride <= size:
        raise ValueError(f"stride must be in 1..{size}, not {stride!r}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, not {held_out!r}")
    image, instances = nuclei_image()
    width = image.shape[2]
    border = width + size * int(-width * held_out // size)  # the held-out part is whole tiles wide
    if border < size:
        raise ValueError(f"tiles of size {size} with held_out {held_out} leave nothing to train on: smaller ones are needed")
    train = cut_nuclei(image, instances, columns=(0, border), size=size, stride=stride)
    return train, cut_nuclei(image, instances, columns=(border, width), size=size, stride=size)


def cut_nuclei(image: Tensor, instances: Tensor, *, columns: tuple[int, int], size: int, stride: int) -> NucleiTiles:
    """Cut the tiles that lie wholly in ``columns`` (first, end) of an image (1, H, W), row by row; see `nuclei_tiles`."""
    first, end = columns
    layers = torch.cat([image.long(), semantic_classes(instances)[None], instances[None]])[:, :, first:end]
    if min(layers.shape[1:]) < size:
        raise ValueError(f"no tile of size {size} fits into {layers.shape[1]} rows and {end - first} columns")
    tiles = layers.unfold(1, size, stride).unfold(2, size, stride).flatten(1, 2)
    images, classes, numbers = tiles.clone().unbind(0)
    return NucleiTiles(images[:, None].to(torch.uint8), classes, numbers)


def semantic_classes(instances: Tensor) -> Tensor:
    """Classes of `NUCLEI_CLASSES` from numbers of nuclei (H, W): the border is what of a nucleus has another neighbour.

    Neighbours are the four beside a pixel; what is outside the image counts as the pixel itself.
    """
    padded = F.pad(instances[None].float(), (1, 1, 1, 1), mode="replicate")[0].to(instances.dtype)
    beside = (padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1])
    border = torch.stack([other != instances for other in beside]).any(0)
    return torch.where(instances == 0, 0, torch.where(border, 2, 1))


def _read(name: str) -> Tensor:
    path = package_file("stardist", name)
    if hashlib.sha256(path.read_bytes()).hexdigest() != _FILES[name]:
        again = f"pip install --force-reinstall --no-deps stardist=={PACKAGES['stardist']}"
        raise ValueError(f"{path} is not the published file (checksum differs): run  {again}")
    return torch.from_numpy(np.array(open_image(path)).astype(np.int64))
