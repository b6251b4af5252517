"""Aerial images of trees with a box around every crown, cut into tiles: real data of the package deepforest.

Two colour images of Yellowstone (2299 x 2472 and 1249 x 1035 pixels) with 853 trees marked by hand in Pascal VOC files. The
lower part of each image is held out: no pixel is in both parts.

Ref: B. Weinstein et al., A benchmark dataset for canopy crown detection, PLoS Comput. Biol. 17 (7), 2021 (NeonTreeEvaluation).
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as xml
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from algo.data import PACKAGES, package_file
from algo.folders import open_image

__all__ = ["BoxTiles", "cut_tiles", "tree_images", "tree_tiles"]

_IMAGES = {
    "2019_YELL_2_528000_4978000_image_crop2": (
        "a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767",
        "bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11",
    ),
    "2019_YELL_2_541000_4977000_image_crop": (
        "178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131",
        "cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631",
    ),
}
"""Name: SHA-256 of the PNG file and of the annotations."""


class BoxTiles(NamedTuple):
    """``images`` uint8 (N, 3, size, size); ``boxes[n]`` float32 (k, 4), x1 y1 x2 y2 in pixels of tile n, within 0..size.

    There is one class; a tile may have no box.
    """

    images: Tensor
    boxes: list[Tensor]


@lru_cache(maxsize=1)
def tree_images() -> tuple[tuple[Tensor, Tensor], ...]:
    """The whole images: uint8 (3, H, W) and boxes float32 (k, 4) of each; do not change them in place.

    Raises
    ------
    FileNotFoundError
        The package is not installed; the message has the command.
    ValueError
        A file is not the published one.
    """
    return tuple(_read(name) for name in _IMAGES)


def tree_tiles(
    *, size: int = 256, stride: int | None = None, held_out: float = 0.3, visible: float = 0.5
) -> tuple[BoxTiles, BoxTiles]:
    """Give training and held-out tiles.

    Parameters
    ----------
    size
        Side of a tile in pixels, >= 16. A tree is 40 pixels wide in the median, 8 to 108.
    stride
        Distance of training tiles, 1..size; None: ``size``, no overlap. Held-out tiles never overlap each other.
    held_out
        Share of the rows of each image held out, in (0, 1); rounded up to whole tiles.
    visible
        As for `cut_tiles`.

    Raises
    ------
    ValueError
        A value out of range, or tiles so large that a part has none; else errors as for `tree_images`.
    """
    stride = size if stride is None else stride
    if not isinstance(size, int) or size < 16:
        raise ValueError(f"size must be an integer >= 16, not {size!r}")
    if not 1 <= stride <= size:
        raise ValueError(f"stride must be in 1..{size}, not {stride!r}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, not {held_out!r}")
    train, test = [], []
    for image, boxes in tree_images():
        height = image.shape[1]
        border = height - size * -int(-height * held_out // size)  # the held-out part is whole tiles high
        train.append(cut_tiles(image, boxes, rows=(0, border), size=size, stride=stride, visible=visible))
        test.append(cut_tiles(image, boxes, rows=(max(border, 0), height), size=size, stride=size, visible=visible))
    parts = _join(train), _join(test)
    if not all(len(part.images) for part in parts):
        raise ValueError(f"tiles of size {size} with held_out {held_out} leave a part without tiles: smaller ones are needed")
    return parts


def cut_tiles(
    image: Tensor, boxes: Tensor, *, rows: tuple[int, int], size: int, stride: int, visible: float = 0.5
) -> BoxTiles:
    """Cut the tiles of ``size`` that lie wholly in ``rows`` (first, end) of an image (3, H, W), row by row.

    A box is clipped to a tile, and left out of it if less than the share ``visible`` (0..1) of its area is inside.
    """
    if not 0 <= visible <= 1:
        raise ValueError(f"visible must be in 0..1, not {visible!r}")
    tops = range(rows[0], rows[1] - size + 1, stride)
    lefts = range(0, image.shape[2] - size + 1, stride)
    corners = [(left, top) for top in tops for left in lefts]
    tiles = [image[:, top : top + size, left : left + size] for left, top in corners]
    images = torch.stack(tiles) if tiles else image.new_zeros(0, 3, size, size)
    return BoxTiles(images, [_clip(boxes, left, top, size, visible) for left, top in corners])


def _clip(boxes: Tensor, left: int, top: int, size: int, visible: float) -> Tensor:
    moved = boxes - boxes.new_tensor([left, top, left, top])
    inside = moved.clamp(0, size)
    area = _area(inside)
    return inside[(area > 0) & (area >= visible * _area(moved))]


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _join(parts: list[BoxTiles]) -> BoxTiles:
    return BoxTiles(torch.cat([part.images for part in parts]), [boxes for part in parts for boxes in part.boxes])


def _read(name: str) -> tuple[Tensor, Tensor]:
    picture, notes = (package_file("deepforest", f"{name}.{kind}") for kind in ("png", "xml"))
    for path, published in zip((picture, notes), _IMAGES[name]):
        if hashlib.sha256(path.read_bytes()).hexdigest() != published:
            again = f"pip install --force-reinstall --no-deps deepforest=={PACKAGES['deepforest']}"
            raise ValueError(f"{path} is not the published file (checksum differs): run  {again}")
    pixels = torch.from_numpy(np.array(open_image(picture).convert("RGB"))).permute(2, 0, 1).contiguous()
    marks = [thing.find("bndbox") for thing in xml.parse(notes).getroot().iter("object")]
    sides = ("xmin", "ymin", "xmax", "ymax")
    return pixels, torch.tensor([[float(mark.findtext(side, "nan")) for side in sides] for mark in marks if mark is not None])
