"""RetinaNet: one convolutional head on every level of a pyramid, nine anchors a cell, focal loss.

Ref: T.-Y. Lin et al., Focal Loss, arXiv 1708.02002. Anchors, levels from the backbone's last map and box losses (L1) are those of
Group R-CNN's code (mmdetection); ``extra="output", relu_extra=True`` gives torchvision's.

Shapes: B images, C classes, A anchors of a cell; h and w cells of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.anchors import assign_anchors, cell_anchors, decode_boxes, encode_boxes, level_anchors
from models.dense import SMALL, PyramidConfig, PyramidDetector, image_sizes, initialise_head, select_detections
from models.detection import Detections, Target
from models.info import ModelInfo, Published
from models.info import image as image_input
from models.losses import box_l1_loss, check_finite, sigmoid_focal_loss
from models.registry import describe_models
from models.vision import register_vision_models

__all__ = ["CONFIGS", "LevelOutput", "RetinaHead", "RetinaNet", "RetinaNetConfig"]

LevelOutput = tuple[Tensor, Tensor]
"""Of a level: class logits (B, A C, h, w) and offsets (B, 4 A, h, w), classes and sides fastest."""


@dataclass(frozen=True, kw_only=True)
class RetinaNetConfig(PyramidConfig):
    """Sizes of a RetinaNet; ``anchor_base`` is the side of the smallest square anchor in strides."""

    anchor_base: float = 4.0
    anchor_scales: int = 3
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)


CONFIGS = {
    "retinanet_r50": RetinaNetConfig(),
    "retinanet_small": RetinaNetConfig(**SMALL),
}


class RetinaHead(nn.Module):
    """Two towers of 3x3 convolutions, the same on every level: (B, channels, h, w) of each -> `LevelOutput` of each."""

    def __init__(self, *, channels: int, convs: int, anchors: int, classes: int) -> None:
        super().__init__()
        self.class_tower, self.box_tower = (_tower(channels, convs) for _ in range(2))
        self.classes = nn.Conv2d(channels, anchors * classes, 3, padding=1)
        self.boxes = nn.Conv2d(channels, 4 * anchors, 3, padding=1)
        initialise_head([self], classifier=self.classes)

    def forward(self, levels: Sequence[Tensor]) -> list[LevelOutput]:
        return [(self.classes(self.class_tower(x)), self.boxes(self.box_tower(x))) for x in levels]


def _tower(channels: int, convs: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(convs)]
    return nn.Sequential(*layers)


class RetinaNet(PyramidDetector):
    """Images (B, 3, H, W) -> a `LevelOutput` for each level, finest first."""

    config: RetinaNetConfig

    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__(config)
        self.anchors = len(config.anchor_ratios) * config.anchor_scales
        self.head = RetinaHead(
            channels=config.channels, convs=config.convs, anchors=self.anchors, classes=config.num_classes
        )

    def forward(self, images: Tensor) -> list[LevelOutput]:
        return self.head(self.extract(images))

    def losses(self, images: Tensor, targets: Sequence[Target], mask: Tensor | None = None) -> dict[str, Tensor]:
        """Losses by name: ``class`` and ``box``, sums over anchors divided by the number of those that answer for an object.

        Parameters
        ----------
        images, targets, mask
            As for `models.detection.Detector.losses`; anchors centred in the padding do not count.

        Raises
        ------
        ValueError
            Images, targets or mask that do not fit (`check_targets`), or a loss that is not finite.
        """
        sizes, corners = self._check(images, targets, mask)
        losses = self._losses(self(images), sizes, targets, corners)
        check_finite(losses)
        return losses

    @torch.no_grad()
    def predict(
        self, images: Tensor, mask: Tensor | None = None, *, top: int = 100, threshold: float = 0.05
    ) -> list[Detections]:
        """What is in each image, in pixels: at most ``top`` objects with a score above ``threshold``."""
        sizes = image_sizes(images, mask)
        return self._select(self(images), sizes, top=top, threshold=threshold)

    def level_anchors(self, outputs: Sequence[LevelOutput]) -> list[Tensor]:
        """Anchors of every level: (h w A, 4)."""
        config, device = self.config, outputs[0][0].device
        return [
            level_anchors(
                logits.shape[2:],
                stride,
                cell_anchors(
                    stride, base=config.anchor_base, scales=config.anchor_scales, ratios=config.anchor_ratios
                ).to(device),
            )
            for (logits, _), stride in zip(outputs, self.strides)
        ]

    def by_anchor(self, output: LevelOutput) -> LevelOutput:
        """Class logits (B, h w A, C) and offsets (B, h w A, 4), in the order of `level_anchors`."""
        logits, offsets = (part.permute(0, 2, 3, 1).flatten(1) for part in output)
        return logits.unflatten(1, (-1, self.num_classes)), offsets.unflatten(1, (-1, 4))

    def _select(self, outputs: Sequence[LevelOutput], sizes: Tensor, *, top: int, threshold: float) -> list[Detections]:
        anchors = self.level_anchors(outputs)
        logits, offsets = ([self.by_anchor(output)[part] for output in outputs] for part in range(2))
        return [
            select_detections(
                [decode_boxes(offset[image], anchor) for offset, anchor in zip(offsets, anchors)],
                [logit[image].sigmoid() for logit in logits],
                size,
                threshold=threshold,
                top=top,
            )
            for image, size in enumerate(sizes)
        ]

    def _losses(
        self, outputs: Sequence[LevelOutput], sizes: Tensor, targets: Sequence[Target], corners: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        logits, offsets = (torch.cat(parts, 1) for parts in zip(*map(self.by_anchor, outputs)))
        anchors = torch.cat(self.level_anchors(outputs))
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        classes, boxes, count = logits.sum() * 0, offsets.sum() * 0, 0
        for image, (target, box) in enumerate(zip(targets, corners)):
            who = assign_anchors(anchors, box)
            who[(centres >= sizes[image]).any(1)] = -2
            found = who >= 0
            truth = torch.zeros_like(logits[image])
            truth[found, target.labels[who[found]]] = 1
            classes = classes + sigmoid_focal_loss(logits[image], truth)[who > -2].sum()
            # an object without area has no offsets
            able = found.clone()
            able[found] = (box[who[found], 2:] > box[who[found], :2]).all(1)
            wanted = encode_boxes(box[who[able]], anchors[able])
            boxes = boxes + box_l1_loss(offsets[image, able], wanted).sum()
            count += int(found.sum())
        return {"class": classes / max(count, 1), "box": boxes / max(count, 1)}


register_vision_models(RetinaNet, CONFIGS, {
    "retinanet_r50": "RetinaNet, ResNet-50, 80 classes, 38.0 M parameters.",
    "retinanet_small": "RetinaNet on a quarter-width ResNet-18, one class: for training in minutes.",
})  # fmt: skip


describe_models(
    ("retinanet_r50",),
    ModelInfo(family="RetinaNet", paper="1708.02002", inputs=image_input(3, 800, 1066)),
    {
        "retinanet_r50": Published(
            source="torchvision's retinanet_resnet50_fpn, whose weights say 34,014,999", parameters=37_968_692,
            note="P6 from C5 (+4,128,768), 80 classes for 91 (-228,195), norms not frozen (+53,120)",
        ),
    },
)  # fmt: skip
describe_models(
    ("retinanet_small",), ModelInfo(family="RetinaNet", paper="1708.02002", inputs=image_input(3, 128), note="ours, for tests")
)
