"""FCOS: every cell of a pyramid tells its class, its distances to the four sides of a box, and how central it is. No anchors.

It is the student of Group R-CNN, which learns from the boxes that the teacher makes of points.

Ref: Z. Tian et al., FCOS, arXiv 1904.01355. The centre-ness comes from the class tower, and losses and levels are those of the
first version, as in Group R-CNN's code; ``normalised`` is the later one's measure of distances.

Shapes: B images, C classes, h and w cells of a level; distances are left, top, right, bottom, in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.anchors import grid_points
from models.boxes import box_area, paired_iou
from models.dense import SMALL, PyramidConfig, PyramidDetector, image_sizes, initialise_head, select_detections
from models.detection import Detections, Target
from models.fpn import Extra
from models.info import ModelInfo, Published
from models.info import image as image_input
from models.losses import check_finite, sigmoid_focal_loss
from models.registry import describe_models
from models.vision import register_vision_models

__all__ = ["CONFIGS", "FCOS", "FCOSConfig", "FCOSHead", "FCOSOutput", "assign_cells"]


@dataclass(frozen=True, kw_only=True)
class FCOSConfig(PyramidConfig):
    """Sizes of an FCOS. Levels P6 and P7 come from P5.

    ``normalised``: the head's distances are in strides, not pixels; better where training is short.
    """

    extra: Extra = "output"
    relu_extra: bool = True
    norm_groups: int = 32
    normalised: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % self.norm_groups:
            raise ValueError(f"channels must be a multiple of norm_groups {self.norm_groups}, not {self.channels}")


CONFIGS = {
    "fcos_r50": FCOSConfig(),
    "fcos_small": FCOSConfig(**SMALL, norm_groups=8, normalised=True),
}


class FCOSOutput(NamedTuple):
    """Of a level: class logits (B, C, h, w), ``distances`` (B, 4, h, w) > 0 in pixels, logits of the centre-ness (B, 1, h, w)."""

    logits: Tensor
    distances: Tensor
    centre: Tensor


class FCOSHead(nn.Module):
    """Two towers, the same on every level, and a learned factor for each level's distances."""

    def __init__(self, config: FCOSConfig, *, strides: Sequence[int]) -> None:
        super().__init__()
        self.units = tuple(stride if config.normalised else 1 for stride in strides)
        self.class_tower, self.box_tower = (_tower(config.channels, config.convs, config.norm_groups) for _ in range(2))
        self.classes = nn.Conv2d(config.channels, config.num_classes, 3, padding=1)
        self.distances = nn.Conv2d(config.channels, 4, 3, padding=1)
        self.centre = nn.Conv2d(config.channels, 1, 3, padding=1)
        self.scales = nn.ParameterList(torch.ones(()) for _ in strides)
        initialise_head([self], classifier=self.classes)

    def forward(self, levels: Sequence[Tensor]) -> list[FCOSOutput]:
        return [self._level(x, scale, unit) for x, scale, unit in zip(levels, self.scales, self.units)]

    def _level(self, x: Tensor, scale: Tensor, unit: int) -> FCOSOutput:
        seen = self.class_tower(x)
        distances = (self.distances(self.box_tower(x)) * scale).exp() * unit
        return FCOSOutput(self.classes(seen), distances, self.centre(seen))


def _tower(channels: int, convs: int, groups: int) -> nn.Sequential:
    layer = lambda: (nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.ReLU())
    return nn.Sequential(*(nn.Sequential(*layer()) for _ in range(convs)))


class FCOS(PyramidDetector):
    """Images (B, 3, H, W) -> an `FCOSOutput` for each level, finest first."""

    config: FCOSConfig

    def __init__(self, config: FCOSConfig) -> None:
        super().__init__(config)
        self.head = FCOSHead(config, strides=self.strides)

    def forward(self, images: Tensor) -> list[FCOSOutput]:
        return self.head(self.extract(images))

    def losses(self, images: Tensor, targets: Sequence[Target], mask: Tensor | None = None) -> dict[str, Tensor]:
        """Losses by name: ``class`` (focal), ``box`` (-log IoU, weighted by the centre-ness) and ``centre``.

        Parameters and errors as for `models.retinanet.RetinaNet.losses`.
        """
        sizes, corners = self._check(images, targets, mask)
        logits, distances, centre, points = self._flat(self(images))
        limits = self._limits(points)
        places = torch.cat(points)
        classes, boxes, centres = logits.sum() * 0, distances.sum() * 0, centre.sum() * 0
        count, total = 0, 0.0
        for image, (target, box) in enumerate(zip(targets, corners)):
            who = assign_cells(places, box, limits)
            counted = (places < sizes[image]).all(1)
            found = (who >= 0) & counted
            truth = torch.zeros_like(logits[image])
            truth[found, target.labels[who[found]]] = 1
            classes = classes + sigmoid_focal_loss(logits[image], truth)[counted].sum()
            wanted = _distances(places[found], box[who[found]])
            central = _centrality(wanted)
            overlap = paired_iou(_corners(places[found], distances[image, found]), box[who[found]])
            boxes = boxes - (overlap.clamp(min=1e-6).log() * central).sum()
            centres = centres + F.binary_cross_entropy_with_logits(centre[image, found, 0], central, reduction="sum")
            count, total = count + int(found.sum()), total + float(central.sum())
        losses = {"class": classes / max(count, 1), "box": boxes / max(total, 1e-6), "centre": centres / max(count, 1)}
        check_finite(losses)
        return losses

    @torch.no_grad()
    def predict(
        self, images: Tensor, mask: Tensor | None = None, *, top: int = 100, threshold: float = 0.05
    ) -> list[Detections]:
        """What is in each image, in pixels; the score is probability times centre-ness."""
        sizes = image_sizes(images, mask)
        outputs = self(images)
        places = self._points(outputs)
        found = []
        for image, size in enumerate(sizes):
            level = [FCOSOutput(*(part[image].flatten(1).T for part in output)) for output in outputs]
            boxes = [_corners(place, one.distances) for place, one in zip(places, level)]
            scores = [one.logits.sigmoid() * one.centre.sigmoid() for one in level]
            found.append(select_detections(boxes, scores, size, threshold=threshold, top=top))
        return found

    def _points(self, outputs: Sequence[FCOSOutput]) -> list[Tensor]:
        return [
            grid_points(output.logits.shape[2:], stride, offset=0.5, device=output.logits.device)
            for output, stride in zip(outputs, self.strides)
        ]

    def _flat(self, outputs: Sequence[FCOSOutput]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Logits (B, cells, C), distances (B, cells, 4), centre-ness (B, cells, 1) of all levels; places of each level."""
        flat = (torch.cat([part.flatten(2).transpose(1, 2) for part in parts], 1) for parts in zip(*outputs))
        logits, distances, centre = flat
        return logits, distances, centre, self._points(outputs)

    def _limits(self, points: Sequence[Tensor]) -> Tensor:
        """Lowest and highest largest distance that a cell answers for, (cells, 2): 0 to 8 strides, then 4 to 8, at last 4 on."""
        rows = []
        for level, (place, stride) in enumerate(zip(points, self.strides)):
            low = 4.0 * stride if level else 0.0
            high = 8.0 * stride if level < len(points) - 1 else math.inf
            rows.append(place.new_tensor([low, high]).expand(len(place), 2))
        return torch.cat(rows)


def assign_cells(places: Tensor, boxes: Tensor, limits: Tensor) -> Tensor:
    """Which object each cell answers for: the smallest box that it is inside of and whose farthest side is within its limits.

    Places (K, 2), corners (N, 4), limits (K, 2) -> int64 (K,); -1: none.
    """
    if not len(boxes):
        return torch.full((len(places),), -1, dtype=torch.int64, device=places.device)
    distances = _distances(places[:, None], boxes)
    farthest = distances.amax(2)
    able = (distances.amin(2) > 0) & (farthest >= limits[:, :1]) & (farthest <= limits[:, 1:])
    area, who = torch.where(able, box_area(boxes), math.inf).min(1)
    return torch.where(area < math.inf, who, -1)


def _distances(places: Tensor, boxes: Tensor) -> Tensor:
    """From places (..., 2) to the sides of boxes (..., 4): left, top, right, bottom, positive inside."""
    return torch.cat([places - boxes[..., :2], boxes[..., 2:] - places], -1)


def _corners(places: Tensor, distances: Tensor) -> Tensor:
    """The inverse of `_distances`."""
    return torch.cat([places - distances[..., :2], places + distances[..., 2:]], -1)


def _centrality(distances: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) min(t, b) / max(t, b)), (K, 4) -> (K,) in (0, 1]: equation 3."""
    near, far = (pick(distances[:, :2], distances[:, 2:]) for pick in (torch.minimum, torch.maximum))
    return (near / far).prod(1).sqrt()


register_vision_models(FCOS, CONFIGS, {
    "fcos_r50": "FCOS, ResNet-50, 80 classes, 32.3 M parameters.",
    "fcos_small": "FCOS on a quarter-width ResNet-18, one class: for training in minutes.",
})  # fmt: skip


describe_models(
    ("fcos_r50",),
    ModelInfo(family="FCOS", paper="1904.01355", inputs=image_input(3, 800, 1066)),
    {
        "fcos_r50": Published(
            source="torchvision's fcos_resnet50_fpn, whose weights say 32,269,600", parameters=32_297_370,
            note="80 classes for 91 (-25,355), norms not frozen (+53,120), a scale a level (+5)",
        ),
    },
)  # fmt: skip
describe_models(("fcos_small",), ModelInfo(family="FCOS", paper="1904.01355", inputs=image_input(3, 128), note="ours, for tests"))
