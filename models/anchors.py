"""Anchors of a pyramid, boxes as offsets from others, and which anchor answers for which object.

Ref: S. Ren et al., Faster R-CNN, arXiv 1506.01497, eq. 2 (offsets); T.-Y. Lin et al., Focal Loss (RetinaNet), arXiv 1708.02002,
section 4 (nine anchors a cell, IoU 0.5 and 0.4).

Shapes: A anchors, N objects; boxes are corners in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh

__all__ = ["assign_anchors", "cell_anchors", "decode_boxes", "encode_boxes", "grid_points", "level_anchors"]

_LARGEST = math.log(1000 / 16)  # a side grows by at most this factor in one step


def grid_points(size: Sequence[int], stride: int, *, offset: float = 0.0, device: torch.device | None = None) -> Tensor:
    """Places of the cells of a map, row by row: x and y, (cell + ``offset``) ``stride`` pixels.

    ``size`` is (height, width); the result (height width, 2).
    """
    height, width = size
    y = (torch.arange(height, device=device) + offset) * stride
    x = (torch.arange(width, device=device) + offset) * stride
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1).float()


def cell_anchors(
    stride: int, *, base: float = 4.0, scales: int = 3, ratios: Sequence[float] = (0.5, 1.0, 2.0)
) -> Tensor:
    """Anchors around the origin, (ratios scales, 4): sides ``base stride 2^(i / scales)``, heights ratio times the widths."""
    side = base * stride * 2 ** (torch.arange(scales, dtype=torch.float64) / scales)
    root = torch.tensor(ratios, dtype=torch.float64).sqrt()[:, None]
    half = torch.stack([side / root, side * root], -1).flatten(0, 1) / 2
    return torch.cat([-half, half], 1).float()


def level_anchors(size: Sequence[int], stride: int, anchors: Tensor) -> Tensor:
    """Anchors of all cells: (height width len(anchors), 4), those of a cell next to each other; cell (0, 0) is at the origin."""
    points = grid_points(size, stride, device=anchors.device).repeat(1, 2)
    return (points[:, None] + anchors).flatten(0, 1)


def encode_boxes(boxes: Tensor, anchors: Tensor, *, deviations: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes as offsets from anchors, (..., 4) twice: centre in sides of the anchor, log of sizes, over ``deviations``.

    Both need a positive width and height, else the result is not finite.
    """
    box, anchor = xyxy_to_cxcywh(boxes), xyxy_to_cxcywh(anchors)
    offsets = torch.cat([(box[..., :2] - anchor[..., :2]) / anchor[..., 2:], (box[..., 2:] / anchor[..., 2:]).log()], -1)
    return offsets / offsets.new_tensor(deviations)


def decode_boxes(offsets: Tensor, anchors: Tensor, *, deviations: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The inverse of `encode_boxes`; no side changes by more than a factor of 62.5."""
    anchor, offsets = xyxy_to_cxcywh(anchors), offsets * offsets.new_tensor(deviations)
    sizes = anchor[..., 2:] * offsets[..., 2:].clamp(-_LARGEST, _LARGEST).exp()
    return cxcywh_to_xyxy(torch.cat([anchor[..., :2] + offsets[..., :2] * anchor[..., 2:], sizes], -1))


def assign_anchors(anchors: Tensor, boxes: Tensor, *, positive: float = 0.5, negative: float = 0.4) -> Tensor:
    """Which object each anchor answers for: corners (A, 4) and (N, 4) -> int64 (A,).

    Its best object where the IoU is at least ``positive``; -1, background, where every IoU is below ``negative``; -2, neither,
    between. Moreover each object has all the anchors of its highest IoU, however low; of several such objects the last.
    """
    result = torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    if not len(boxes):
        return result
    iou = pairwise_iou(anchors, boxes)
    best, who = iou.max(1)
    result[best >= negative] = -2
    result = torch.where(best >= positive, who, result)
    highest = iou.max(0).values
    chosen = (iou == highest) & (highest > 0)
    last = boxes.new_tensor(range(1, len(boxes) + 1)) * chosen
    return torch.where(chosen.any(1), last.argmax(1), result)
