"""Hungarian matching: which prediction answers for which object, by the smallest sum of costs.

The cost functions give a matrix (Q predictions, N objects) for one image; `assign` solves it; `BoxMatcher` and `MaskMatcher` put
the two together as DETR, Deformable-DETR and MaskFormer do.

Ref: N. Carion et al., DETR, arXiv 2005.12872, eq. 1; X. Zhu et al., Deformable DETR, arXiv 2010.04159; B. Cheng et al.,
MaskFormer, arXiv 2107.06278, section 3.2.

Shapes: Q predictions, N objects, C classes, P pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from models.boxes import cxcywh_to_xyxy, pairwise_giou

__all__ = [
    "BoxMatcher",
    "MaskMatcher",
    "assign",
    "box_l1_cost",
    "dice_cost",
    "focal_class_cost",
    "giou_cost",
    "mask_focal_cost",
    "softmax_class_cost",
]


def softmax_class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of the object's class: (Q, C) and whole numbers (N,) -> (Q, N)."""
    return -logits.softmax(-1)[:, labels]


def focal_class_cost(logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of saying the object's class less that of denying it: (Q, C) and whole numbers (N,) -> (Q, N)."""
    probability = logits.sigmoid()
    # 1e-8 inside the logarithms as the authors have it
    positive = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    negative = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    return (positive - negative)[:, labels]


def box_l1_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """Sum of the four differences, (Q, 4) and (N, 4) in cxcywh -> (Q, N)."""
    return torch.cdist(boxes, targets, p=1)


def giou_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """Minus the generalised IoU, (Q, 4) and (N, 4) in cxcywh -> (Q, N)."""
    return -pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))


def mask_focal_cost(logits: Tensor, masks: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Mean focal loss over the pixels: (Q, P) logits and (N, P) masks of 0 and 1 -> (Q, N)."""
    probability = logits.sigmoid()
    positive = alpha * (1 - probability) ** gamma * -F.logsigmoid(logits)
    negative = (1 - alpha) * probability**gamma * -F.logsigmoid(-logits)
    return (positive @ masks.T + negative @ (1 - masks).T) / logits.shape[1]


def dice_cost(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - (2 |A B| + 1) / (|A| + |B| + 1): (Q, P) logits and (N, P) masks of 0 and 1 -> (Q, N)."""
    probability = logits.sigmoid()
    shared = 2 * (probability @ masks.T)
    sizes = probability.sum(1)[:, None] + masks.sum(1)[None]
    return 1 - (shared + 1) / (sizes + 1)


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of rows and columns with the smallest sum of costs, each row and column at most once.

    Parameters
    ----------
    cost
        Float (Q, N).

    Returns
    -------
    tuple
        Rows, ascending, and their columns: int64 (min(Q, N),) each, on the device of ``cost``.

    Raises
    ------
    ValueError
        A cost is not finite: the predictions are not, as a rule.
    """
    if not bool(cost.isfinite().all()):
        row, column = (~cost.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"the cost of prediction {row} for object {column} is {cost[row, column].item()}: "
            "the predictions or the targets are not finite"
        )
    rows, columns = linear_sum_assignment(cost.detach().cpu().double().numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


@dataclass(frozen=True, kw_only=True)
class BoxMatcher:
    """Objects with boxes. ``focal`` compares classes by the focal loss of sigmoids, else by softmax probabilities.

    Defaults are DETR's (1, 5, 2); Deformable-DETR, DAB-DETR and their kin use ``focal=True, class_weight=2``.
    """

    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    focal: bool = False
    alpha: float = 0.25

    def cost(self, logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Costs (Q, N) in float32 of one image; see `__call__`."""
        logits, boxes = logits.detach().float(), boxes.detach().float()
        classes = focal_class_cost(logits, labels, alpha=self.alpha) if self.focal else softmax_class_cost(logits, labels)
        l1, giou = box_l1_cost(boxes, targets), giou_cost(boxes, targets)
        return self.l1_weight * l1 + self.class_weight * classes + self.giou_weight * giou

    def __call__(self, logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Match one image.

        Parameters
        ----------
        logits, boxes
            Predictions (Q, C) and (Q, 4), boxes as cxcywh fractions of the image.
        labels, targets
            Objects: classes int64 (N,) and boxes (N, 4) in the same notation; N may be 0.

        Returns
        -------
        tuple
            Numbers of the predictions, ascending, and of their objects, as `assign` gives them.
        """
        return assign(self.cost(logits, boxes, labels, targets))


@dataclass(frozen=True, kw_only=True)
class MaskMatcher:
    """Objects with masks. Defaults are MaskFormer's: class 1, focal 20, dice 1."""

    class_weight: float = 1.0
    focal_weight: float = 20.0
    dice_weight: float = 1.0

    def cost(self, logits: Tensor, masks: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Costs (Q, N) in float32 of one image; see `__call__`."""
        logits, masks = logits.detach().float(), masks.detach().float().flatten(1)
        targets = targets.to(masks.dtype).flatten(1)
        focal, dice = mask_focal_cost(masks, targets), dice_cost(masks, targets)
        classes = softmax_class_cost(logits, labels)
        return self.focal_weight * focal + self.class_weight * classes + self.dice_weight * dice

    def __call__(self, logits: Tensor, masks: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Match one image.

        Parameters
        ----------
        logits, masks
            Predictions: class logits (Q, C) and mask logits (Q, H, W).
        labels, targets
            Objects: classes int64 (N,) and masks of 0 and 1 or bool (N, H, W), of the size of the predicted ones; N may be 0.

        Returns
        -------
        tuple
            Numbers of the predictions, ascending, and of their objects, as `assign` gives them.
        """
        if masks.shape[1:] != targets.shape[1:]:
            sizes = f"{tuple(masks.shape[1:])} and {tuple(targets.shape[1:])}"
            raise ValueError(f"predicted masks and those of the objects must have one size, not {sizes}: resize one of them")
        return assign(self.cost(logits, masks, labels, targets))
