"""Losses of detectors and segmenters, element by element: the caller sums them and divides by its number of objects.

Ref: T. Lin et al., Focal Loss, arXiv 1708.02002, eq. 5; F. Milletari et al., V-Net (dice), arXiv 1606.04797; N. Carion et al.,
DETR, arXiv 2005.12872, eqs. 2 and 9.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from models.boxes import cxcywh_to_xyxy, paired_giou

__all__ = ["box_l1_loss", "check_finite", "class_loss", "dice_loss", "giou_loss", "sigmoid_focal_loss"]


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of yes-or-no predictions: logits (...) and targets 0 or 1 (...) -> (...).

    ``alpha`` weighs the targets of 1, ``1 - alpha`` those of 0; a negative one weighs both by 1.
    """
    targets = targets.to(logits.dtype)
    probability = logits.sigmoid()
    right = probability * targets + (1 - probability) * (1 - targets)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * (1 - right) ** gamma
    return loss if alpha < 0 else loss * (alpha * targets + (1 - alpha) * (1 - targets))


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 |A B| + 1) / (|A| + |B| + 1) of masks: logits (N, ...) and targets 0 or 1 (N, ...) -> (N,) in [0, 1)."""
    probability, targets = logits.sigmoid().flatten(1), targets.to(logits.dtype).flatten(1)
    shared, sizes = 2 * (probability * targets).sum(1), probability.sum(1) + targets.sum(1)
    return 1 - (shared + 1) / (sizes + 1)


def class_loss(logits: Tensor, labels: Tensor, *, no_object: float = 0.1) -> Tensor:
    """Cross-entropy in which the last class, "no object", has the weight ``no_object``: a mean, so a scalar.

    Parameters
    ----------
    logits
        (..., C + 1).
    labels
        int64 (...), in [0, C]; C is "no object".
    """
    weight = torch.ones(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    weight[-1] = no_object
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), weight)


def box_l1_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Sum of the four differences: (..., 4) twice -> (...)."""
    return (boxes - targets).abs().sum(-1)


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """1 - generalised IoU: (..., 4) in cxcywh twice -> (...) in [0, 2]."""
    return 1 - paired_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))


def check_finite(losses: Mapping[str, Tensor]) -> None:
    """Refuse losses that are no numbers.

    Raises
    ------
    ValueError
        Names the first such loss and its value.
    """
    for name, value in losses.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"the loss {name!r} is not finite ({value.detach().flatten()[0].item()}): "
                "lower the learning rate, or look for non-finite inputs"
            )
