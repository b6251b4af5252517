"""DataAug and FeatAug: several transformed copies of a batch in one step, each matched one-to-one.

DataAug transforms the images, FeatAug the feature maps between backbone and transformer, so that the backbone runs once. Boxes
are transformed alike; masks too, and position encodings follow from the masks. All copies pass through the same transformer with
the same queries, are matched by themselves, and their losses are averaged. There are no parameters; evaluation is the detector's.

Ref: R. Fang et al., FeatAug-DETR, arXiv 2303.01503. A reconstruction from abstract and README: which copies there are (the
original and one transformed), the scale of the crops and how they are sampled are our choices; the paper's figures are not
reproduced.

Shapes: B images, K copies, H and W cells or pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.boxes import crop_boxes, cxcywh_to_xyxy, flip_boxes, xyxy_to_cxcywh
from models.detection import Detector, Level, Target

__all__ = ["Copies", "crop_level", "crop_targets", "flip_level", "flip_targets", "random_windows"]

TRANSFORMS = ("flip", "crop", "flip_crop")


@dataclass(frozen=True, kw_only=True)
class Copies:
    """What is added to each batch in training; `Detector.augmentation` holds it.

    Parameters
    ----------
    copies
        One transform for each copy beside the original, or one name: ``flip`` (FeatAug-Flip), ``crop``, a random window scaled
        to the size of the whole, or ``flip_crop``, a flipped window (FeatAug-FC).
    features
        Transform the feature maps (FeatAug); False: the images (DataAug).
    scale
        Least and greatest side of a window, as a fraction of the image's, drawn from torch's generator.
    """

    copies: str | tuple[str, ...] = ("flip",)
    features: bool = True
    scale: tuple[float, float] = (0.5, 0.9)

    def __post_init__(self) -> None:
        names = (self.copies,) if isinstance(self.copies, str) else tuple(self.copies)
        object.__setattr__(self, "copies", names)
        wrong = [name for name in names if name not in TRANSFORMS]
        if wrong or not names:
            raise ValueError(f"copies must be of {', '.join(TRANSFORMS)}, not {self.copies!r}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be (least, greatest) in (0, 1], not {self.scale!r}")

    def losses(self, detector: Detector, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The detector's losses by name, each the mean over the copies."""
        if self.features:
            levels, groups = self.transform(detector.extract(images, mask), targets)
        else:
            ((images, mask),), groups = self.transform([Level(images, mask)], targets)
            levels = detector.extract(images, mask)
        output, size = detector.detect(levels), len(targets)
        parts = [
            detector.criterion(output.images(number * size, (number + 1) * size), group) for number, group in enumerate(groups)
        ]
        return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}

    def transform(self, levels: Sequence[Level], targets: Sequence[Target]) -> tuple[list[Level], list[list[Target]]]:
        """Maps of (1 + K) B images, the originals first, and the targets of each copy."""
        copies, groups = [list(levels)], [list(targets)]
        for name in self.copies:
            copy, group = list(levels), list(targets)
            if "crop" in name:
                windows = random_windows(len(targets), self.scale)
                copy, group = [crop_level(level, windows) for level in copy], crop_targets(group, windows)
            if "flip" in name:
                copy, group = [flip_level(level) for level in copy], flip_targets(group)
            copies.append(copy)
            groups.append(group)
        join = lambda parts: Level(torch.cat([part.features for part in parts]), torch.cat([part.mask for part in parts]))
        return [join(parts) for parts in zip(*copies)], groups


def flip_level(level: Level) -> Level:
    """Mirror each image left to right within its own width; padding stays at the right."""
    features, mask = level
    width = mask.any(1).sum(1, keepdim=True)  # (B, 1) cells that are not padding
    column = torch.arange(features.shape[-1], device=features.device)[None]
    source = torch.where(column < width, width - 1 - column, column)
    index = source[:, None, None].expand(*features.shape)
    return Level(features.gather(3, index), mask)


def crop_level(level: Level, windows: Tensor) -> Level:
    """Scale a window of each image to the size of the whole, bilinearly; padding is not looked at.

    ``windows`` is float (B, 4): corners as fractions of the image.
    """
    features, mask = level
    height, width = features.shape[-2:]
    grids = []
    for axis, (cells, total) in enumerate(((mask.any(1).sum(1), width), (mask.any(2).sum(1), height))):
        low, high = windows[:, axis, None].to(features), windows[:, axis + 2, None].to(features)
        inside = cells[:, None].to(features)
        place = (torch.arange(total, device=features.device, dtype=features.dtype) + 0.5) / inside
        source = ((low + (high - low) * place) * inside).clamp(min=0.5)  # in cells, 0.5 being the middle of the first
        grids.append(torch.minimum(source, inside - 0.5) * 2 / total - 1)
    grid = torch.stack([grids[0][:, None].expand(-1, height, -1), grids[1][:, :, None].expand(-1, -1, width)], -1)
    cropped = F.grid_sample(features, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return Level(torch.where(mask[:, None], cropped, features), mask)


def flip_targets(targets: Sequence[Target]) -> list[Target]:
    """The objects of mirrored images."""
    flip = lambda boxes: xyxy_to_cxcywh(flip_boxes(cxcywh_to_xyxy(boxes), width=1))
    return [Target(target.labels, flip(target.boxes)) for target in targets]


def crop_targets(targets: Sequence[Target], windows: Tensor) -> list[Target]:
    """The objects whose centre is in the window, clipped and scaled with it; ``windows`` as in `crop_level`."""
    cropped = []
    for target, window in zip(targets, windows.tolist()):
        corners, keep = crop_boxes(cxcywh_to_xyxy(target.boxes), tuple(window))
        size = corners.new_tensor([window[2] - window[0], window[3] - window[1]]).repeat(2)
        cropped.append(Target(target.labels[keep], xyxy_to_cxcywh((corners / size).clamp(0, 1))))
    return cropped


def random_windows(count: int, scale: tuple[float, float]) -> Tensor:
    """Windows (count, 4) anywhere in the image, of the image's aspect ratio: corners as fractions."""
    side = scale[0] + (scale[1] - scale[0]) * torch.rand(count, 1)
    corner = torch.rand(count, 2) * (1 - side)
    return torch.cat([corner, corner + side], 1)
