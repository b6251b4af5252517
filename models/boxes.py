"""Boxes: the two notations, areas and overlaps, flips, crops and checks.

A box is four floats in the last dimension: corners ``(x1, y1, x2, y2)``, "xyxy", or centre and size ``(cx, cy, w, h)``,
"cxcywh"; x grows to the right, y down. Every function but `cxcywh_to_xyxy` takes corners, in pixels or as fractions of the image.
Overlaps of boxes without area are 0, never nan.

Ref: H. Rezatofighi et al., Generalized Intersection over Union, arXiv 1902.09630, algorithm 1.

Shapes: N and M boxes; ``...`` any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "box_area",
    "check_box_shape",
    "check_boxes",
    "clip_boxes",
    "crop_boxes",
    "cxcywh_to_xyxy",
    "flip_boxes",
    "paired_giou",
    "paired_iou",
    "pairwise_giou",
    "pairwise_iou",
    "xyxy_to_cxcywh",
]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size (..., 4) -> corners (..., 4)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners (..., 4) -> centre and size (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def box_area(boxes: Tensor) -> Tensor:
    """Areas of corners (..., 4): (...); 0 where a corner is on the wrong side."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union of broadcast corners."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared, box_area(a) + box_area(b) - shared


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where both are 0."""
    return part / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of each box with its partner: corners (..., 4) twice -> (...) in [0, 1]."""
    return _ratio(*_overlap(a, b))


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of each box with its partner: corners (..., 4) twice -> (...) in [-1, 1]."""
    shared, union = _overlap(a, b)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return _ratio(shared, union) - _ratio(hull - union, hull)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs: corners (N, 4) and (M, 4) -> (N, M) in [0, 1]."""
    return paired_iou(a[..., :, None, :], b[..., None, :, :])


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of all pairs: corners (N, 4) and (M, 4) -> (N, M) in [-1, 1]."""
    return paired_giou(a[..., :, None, :], b[..., None, :, :])


def clip_boxes(boxes: Tensor, *, height: float, width: float) -> Tensor:
    """Corners (..., 4) moved into an image; boxes outside it lose their area."""
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def flip_boxes(boxes: Tensor, *, width: float) -> Tensor:
    """Corners (..., 4) in the image mirrored left to right."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], -1)


def crop_boxes(boxes: Tensor, window: tuple[float, float, float, float]) -> tuple[Tensor, Tensor]:
    """Corners (N, 4) as seen in a window ``(x1, y1, x2, y2)`` of the image.

    A box belongs to the window that holds its centre (the right and lower edge excluded) if some area remains.

    Returns
    -------
    tuple
        The clipped corners (K, 4) of the boxes that stay, from the window's corner on, and which stay: bool (N,).
    """
    left, top, right, bottom = window
    if not (left < right and top < bottom):
        raise ValueError(f"a window must be (x1, y1, x2, y2) with x1 < x2 and y1 < y2, not {window}")
    moved = boxes - boxes.new_tensor([left, top, left, top])
    size = boxes.new_tensor([right - left, bottom - top])
    centre = (moved[:, :2] + moved[:, 2:]) / 2
    clipped = clip_boxes(moved, height=bottom - top, width=right - left)
    keep = ((centre >= 0) & (centre < size)).all(1) & (box_area(clipped) > 0)
    return clipped[keep], keep


def check_boxes(boxes: Tensor, *, height: float, width: float, name: str = "boxes") -> None:
    """Refuse corners that are no boxes of an image; none at all, shape (0, 4), is right.

    Raises
    ------
    TypeError
        Not a floating-point tensor.
    ValueError
        Not (N, 4), not finite, x2 < x1 or y2 < y1, or outside the image by more than 1e-4 of its size; the message has the
        first wrong box.
    """
    check_box_shape(boxes, name=name)
    limit = boxes.new_tensor([width, height, width, height])
    slack = 1e-4 * limit
    rules = (
        (boxes.isfinite(), "finite"),
        (boxes[:, 2:] >= boxes[:, :2], "(x1, y1, x2, y2) with x2 >= x1 and y2 >= y1"),
        ((boxes >= -slack) & (boxes <= limit + slack), f"inside the image, {width:g} wide and {height:g} high: clip them"),
    )
    for good, rule in rules:
        if not bool(good.all()):
            row = int((~good).any(1).nonzero()[0])
            values = [round(value, 4) for value in boxes[row].tolist()]
            raise ValueError(f"{name} must be {rule}; box {row} is {values}")


def check_box_shape(boxes: Tensor, *, name: str = "boxes") -> None:
    """Refuse what is not boxes (N, 4), whatever their values and their form; errors as of `check_boxes`."""
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        kind = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"{name} must be a floating-point tensor, not {kind}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} must be (N, 4), not {tuple(boxes.shape)}")
