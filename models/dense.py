"""What the pyramid detectors share (RetinaNet, FCOS, Group R-CNN): backbone and FPN, sizes of images, choice of results.

Shapes: B images, C classes, N objects of an image; boxes are corners in pixels unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import build_backbone
from models.boxes import clip_boxes, cxcywh_to_xyxy
from models.checks import check_images, check_pixels, check_positive
from models.detection import Detections, Detector, Target, check_targets
from models.fpn import FPN, Extra
from models.roi import nms

__all__ = ["SMALL", "PyramidConfig", "PyramidDetector", "image_sizes", "initialise_head", "select_detections"]


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """Sizes of a detector on a pyramid; the defaults are the published ones.

    ``backbone`` and its ``width`` (None: the published one), ``stages`` that are read, ``channels`` of every level,
    ``extra_levels`` and ``extra`` as for `FPN`, ``convs`` in each tower of the head.

    ``frozen_stages`` do not learn, the stem counted as the first. ``frozen_statistics``: batch norm keeps its mean and variance
    while its scale and shift learn. Both are for weights that were trained before; from random weights use 0 and False.
    """

    backbone: str = "resnet50"
    width: int | None = None
    stages: tuple[int, ...] = (2, 3, 4)
    channels: int = 256
    extra_levels: int = 2
    extra: Extra = "input"
    relu_extra: bool = False
    convs: int = 4
    num_classes: int = 80
    frozen_stages: int = 2
    frozen_statistics: bool = True

    def __post_init__(self) -> None:
        check_positive(self, zero=("extra_levels", "frozen_stages"))


SMALL: dict[str, Any] = {
    "backbone": "resnet18",
    "width": 16,
    "channels": 64,
    "extra_levels": 1,
    "convs": 2,
    "num_classes": 1,
    "frozen_stages": 0,
    "frozen_statistics": False,
}
"""A quarter-width ResNet-18 and P3 to P6 of 64 channels, to be trained from random weights in minutes."""


class PyramidDetector(nn.Module):
    """Backbone, pyramid and batch norm's mode; a subclass adds heads, `losses` and `predict`.

    Members
    -------
    strides
        Pixels between neighbouring cells of each level.
    """

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__()
        self.config, self.num_classes = config, config.num_classes
        self.backbone = build_backbone(
            config.backbone,
            stages=config.stages,
            width=config.width,
            frozen_norm=False,
            frozen_stages=config.frozen_stages,
        )
        self.fpn = FPN(
            self.backbone.channels,  # type: ignore[arg-type]
            width=config.channels,
            extra_levels=config.extra_levels,
            extra=config.extra,
            relu_extra=config.relu_extra,
        )
        strides: tuple[int, ...] = self.backbone.strides  # type: ignore[assignment]
        self.strides = (*strides, *(strides[-1] << level for level in range(1, config.extra_levels + 1)))

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`; with ``frozen_statistics`` the backbone's batch norm stays in eval mode."""
        super().train(mode)
        for module in self.backbone.modules():
            if self.config.frozen_statistics and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def extract(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> levels (B, channels, ceil(H / stride), ceil(W / stride)), finest first."""
        check_images(images, 3)
        return self.fpn(self.backbone(images))

    def _check(self, images: Tensor, targets: Sequence[Target], mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Sizes of the images and the objects' corners in pixels; wrong input is refused."""
        sizes = image_sizes(images, mask)
        check_targets(targets, images=len(images), classes=self.num_classes)
        return sizes, [cxcywh_to_xyxy(target.boxes) * size.repeat(2) for target, size in zip(targets, sizes)]


def image_sizes(images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Width and height of each image without its padding, float (B, 2); images and mask as `Detector.forward` has them.

    Raises
    ------
    ValueError
        Wrong shapes, or a pixel that is not finite.
    """
    mask = Detector.check_images(images, mask)
    check_pixels(images)
    return torch.stack([mask[:, 0].sum(1), mask[:, :, 0].sum(1)], 1).to(images.dtype)


def select_detections(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    size: Tensor,
    *,
    threshold: float = 0.05,
    overlap: float = 0.5,
    before: int = 1000,
    top: int = 100,
) -> Detections:
    """Results of one image from the cells or anchors of all levels.

    Of each level the ``before`` best pairs of place and class with a score above ``threshold``; then class-wise NMS at an IoU of
    ``overlap``; then the ``top`` best.

    Parameters
    ----------
    boxes, scores
        Of each level: (A, 4), clipped to the image here, and (A, C).
    size
        (2,): width and height.
    """
    parts = []
    for corners, chances in zip(boxes, scores):
        best, places = chances.flatten().topk(min(before, chances.numel()))
        places = places[best > threshold]
        rows = places // chances.shape[1]
        parts.append((best[best > threshold], places % chances.shape[1], corners[rows]))
    score, label, corner = (torch.cat(columns) for columns in zip(*parts))
    corner = clip_boxes(corner, height=float(size[1]), width=float(size[0]))
    kept = nms(corner, score, threshold=overlap, labels=label, limit=top)
    return Detections(score[kept], label[kept], corner[kept])


def initialise_head(modules: Sequence[nn.Module], *, classifier: nn.Conv2d, chance: float = 0.01) -> None:
    """Normal weights of deviation 0.01 and no bias in convolutions; the classifier starts at the probability ``chance``.

    Ref: T.-Y. Lin et al., arXiv 1708.02002, section 4.1.
    """
    for module in (part for one in modules for part in one.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.constant_(classifier.bias, -math.log((1 - chance) / chance))  # type: ignore[arg-type]
