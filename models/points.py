"""Point annotations: where somebody clicked on each object, and which images have boxes instead.

Group R-CNN learns from the few images with boxes, points being drawn in them at random, and turns the points of the others into
boxes, on which a student detector learns.

Ref: S. Zhang et al., Group R-CNN, arXiv 2205.05920, section 4.1, and its code (jshilong/GroupRCNN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.checks import check_entries, check_labels
from models.detection import Detections, Target

__all__ = ["PointTarget", "check_points", "choose_annotated", "pseudo_target", "sample_points"]

INSET = 0.01
"""Share of a box's sides in which no point is drawn."""


@dataclass(frozen=True)
class PointTarget:
    """A point on each object of an image: ``labels`` int64 (N,), ``points`` float (N, 2), x and y as fractions of the image."""

    labels: Tensor
    points: Tensor

    @classmethod
    def from_pixels(cls, labels: Tensor, points: Tensor, *, height: int, width: int) -> PointTarget:
        """From x and y (N, 2) in pixels of an image of this size."""
        return cls(labels, points / points.new_tensor([width, height]))


def check_points(points: Sequence[PointTarget], *, images: int, classes: int) -> None:
    """Refuse points that do not belong to so many images and classes.

    Raises
    ------
    TypeError
        Entries that are no `PointTarget`, labels that are not int64, points that are not floating point.
    ValueError
        Another number of entries than images, wrong shapes or labels, a point that is not finite or outside its image.
    """
    check_entries(points, PointTarget, images=images, name="entries of points")
    for number, entry in enumerate(points):
        place = entry.points
        if not isinstance(place, Tensor) or not place.is_floating_point():
            kind = place.dtype if isinstance(place, Tensor) else type(place).__name__
            raise TypeError(f"points of image {number} must be a floating-point tensor, not {kind}")
        if place.ndim != 2 or place.shape[1] != 2:
            raise ValueError(f"points of image {number} must be (N, 2), not {tuple(place.shape)}")
        check_labels(entry.labels, place, classes=classes, image=number, name="points")
        outside = ~((place >= 0) & (place <= 1)).all(1)  # NaN is not in either range
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            values = [round(value, 4) for value in place[row].tolist()]
            raise ValueError(f"point {row} of image {number} must be in the image, 0 to 1, not {values}")


def sample_points(target: Target, *, generator: torch.Generator | None = None) -> PointTarget:
    """A point in each box, uniform but for 1 % of each side: what training draws anew every time."""
    share = torch.rand(len(target.boxes), 2, generator=generator).to(target.boxes)
    inner = (share - 0.5) * (1 - 2 * INSET)
    return PointTarget(target.labels, (target.boxes[:, :2] + inner * target.boxes[:, 2:]).clamp(0, 1))


def choose_annotated(images: int, *, ratio: float, seed: int = 0) -> Tensor:
    """Which images have boxes rather than points: bool (images,), ``int(ratio images)`` of them, drawn by the seed.

    Raises
    ------
    ValueError
        ``images`` below 1 or ``ratio`` not in [0, 1].
    """
    if images < 1 or not 0 <= ratio <= 1:
        raise ValueError(f"images must be >= 1 and ratio in 0..1, not {images!r} and {ratio!r}")
    chosen = torch.zeros(images, dtype=torch.bool)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    chosen[order[: int(ratio * images)]] = True
    return chosen


def pseudo_target(found: Detections, *, height: int, width: int, threshold: float = 0.0) -> Target:
    """What the teacher found on an image's points as the student's target: boxes with an area and a score above ``threshold``."""
    area = (found.boxes[:, 2:] > found.boxes[:, :2]).all(1)
    keep = area & (found.scores > threshold)
    return Target.from_corners(found.labels[keep], found.boxes[keep], height=height, width=width)
