"""Masks: resizing, overlaps, boxes around them, and what a set of scored masks says of an image.

A mask is (H, W): bool, or numbers of which 0 is outside; soft masks and logits are float. An image without any has (0, H, W).

Ref: B. Cheng et al., MaskFormer, arXiv 2107.06278, section 3.4 (semantic and instance inference); F. Milletari et al., V-Net,
arXiv 1606.04797 (dice).

Shapes: B images, Q queries, N and M masks, C classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Instances",
    "best_instances",
    "check_masks",
    "instance_masks",
    "masks_to_boxes",
    "pairwise_dice",
    "pairwise_mask_iou",
    "resize_masks",
    "semantic_map",
    "semantic_masks",
    "semantic_scores",
]


def resize_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (..., H, W) to (..., *size): float bilinearly (pixel centres keep their places), bool and whole numbers by the
    nearest pixel; the dtype stays. No masks stay no masks."""
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"masks cannot be resized to {height} x {width} pixels")
    flat = masks.reshape(-1, 1, *masks.shape[-2:])
    if not len(flat):
        return masks.new_zeros(*masks.shape[:-2], height, width)
    if masks.is_floating_point():
        flat = F.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False)
    else:  # indices, since interpolate takes floats only, which cannot hold every int64
        rows, columns = (torch.arange(new, device=masks.device) * old // new for new, old in zip(size, masks.shape[-2:]))
        flat = flat[..., rows[:, None], columns]
    return flat.reshape(*masks.shape[:-2], height, width)


def _sizes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels that each pair shares, and the sum of their areas: (N, M) each."""
    if a.shape[-2:] != b.shape[-2:]:
        raise ValueError(f"masks must have one size, not {tuple(a.shape[-2:])} and {tuple(b.shape[-2:])}: resize one of them")
    a, b = (masks.flatten(-2).to(torch.promote_types(masks.dtype, torch.float32)) for masks in (a, b))
    return a @ b.T, a.sum(1)[:, None] + b.sum(1)


def pairwise_mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs: bool or soft masks (N, H, W) and (M, H, W) -> (N, M) in [0, 1]; 0 of empty masks."""
    shared, total = _sizes(a, b)
    return shared / (total - shared).clamp(min=torch.finfo(shared.dtype).tiny)


def pairwise_dice(a: Tensor, b: Tensor) -> Tensor:
    """2 |A B| / (|A| + |B|) of all pairs: bool or soft masks (N, H, W) and (M, H, W) -> (N, M) in [0, 1]; 0 of empty masks."""
    shared, total = _sizes(a, b)
    return 2 * shared / total.clamp(min=torch.finfo(shared.dtype).tiny)


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Smallest boxes around masks, in pixels: (N, H, W) -> float32 (N, 4), corners ``(x1, y1, x2, y2)``.

    The right and lower edges are those of the last pixel, so that a box's area is at least the mask's; zeros for an empty mask.
    """
    height, width = masks.shape[-2:]
    boxes = []
    for axis, size in ((1, width), (2, height)):  # over rows: what columns are used; over columns: what rows
        used = (masks != 0).any(axis)
        place = torch.arange(size, device=masks.device)
        boxes.append((torch.where(used, place, size).amin(1), torch.where(used, place + 1, 0).amax(1)))
    (left, right), (top, bottom) = boxes
    return torch.stack([left, top, right, bottom], 1).float() * (right > left)[:, None]


def instance_masks(labels: Tensor) -> Tensor:
    """Masks of a map of instance numbers, 0 being none: whole numbers (H, W) -> bool (N, H, W), by ascending number."""
    numbers = labels.unique()
    return labels == numbers[numbers != 0][:, None, None]


def semantic_masks(labels: Tensor, *, ignore: int = -1) -> tuple[Tensor, Tensor]:
    """One mask for each class that a semantic map has, ``ignore`` left out: (H, W) -> classes int64 (N,), bool (N, H, W)."""
    classes = labels.unique()
    classes = classes[classes != ignore]
    return classes.long(), labels == classes[:, None, None]


def semantic_scores(logits: Tensor, masks: Tensor) -> Tensor:
    """Score of each class in each pixel: every mask votes for its query's classes.

    Parameters
    ----------
    logits
        Class logits (B, Q, C + 1), the last class being "no object".
    masks
        Mask logits (B, Q, H, W).

    Returns
    -------
    Tensor
        (B, C, H, W), >= 0: ``sum over q of softmax(logits)[q, c] * sigmoid(masks)[q]``.
    """
    return torch.einsum("bqc,bqhw->bchw", logits.softmax(-1)[..., :-1], masks.sigmoid())


def semantic_map(logits: Tensor, masks: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Best class of each pixel, int64 (B, H, W); arguments as for `semantic_scores`, scores resized to ``size`` first."""
    scores = semantic_scores(logits, masks)
    return (scores if size is None else resize_masks(scores, size)).argmax(1)


class Instances(NamedTuple):
    """Objects of one image, best first: ``scores`` (K,), ``labels`` int64 (K,), ``masks`` bool (K, H, W)."""

    scores: Tensor
    labels: Tensor
    masks: Tensor


def best_instances(
    logits: Tensor, masks: Tensor, size: Sequence[int] | None = None, *, threshold: float = 0.5, top: int | None = None
) -> list[Instances]:
    """The objects of each image: the best pairs of query and class, scored by class times mean probability within the mask.

    Masks are the pixels with a logit above 0; empty ones are left out, and so are scores below ``threshold``.

    Parameters
    ----------
    logits, masks
        As for `semantic_scores`.
    size
        Pixels (H, W) to which masks are resized, by the nearest pixel; None: as they are.
    top
        How many pairs are looked at; None: as many as queries.
    """
    found = []
    for image, mask in zip(logits.softmax(-1)[..., :-1], masks):
        classes = image.shape[1]
        scores, places = image.flatten().topk(min(top or len(image), image.numel()))
        chosen = mask[places // classes]
        inside = chosen > 0
        certainty = (chosen.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        scores, order = (scores * certainty).sort(descending=True)
        labels, inside = (places % classes)[order], inside[order]
        inside = inside if size is None else resize_masks(inside, size)
        keep = (scores >= threshold) & inside.flatten(1).any(1)
        found.append(Instances(scores[keep], labels[keep], inside[keep]))
    return found


def check_masks(masks: Tensor, *, height: int, width: int, name: str = "masks") -> None:
    """Refuse what are no masks of an image; none at all, shape (0, height, width), is right.

    Raises
    ------
    TypeError
        Not bool.
    ValueError
        Another shape, or an empty mask; the message has its number.
    """
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        kind = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"{name} must be a bool tensor, not {kind}")
    if masks.ndim != 3 or tuple(masks.shape[1:]) != (height, width):
        raise ValueError(f"{name} must be (N, {height}, {width}), not {tuple(masks.shape)}")
    empty = ~masks.flatten(1).any(1)
    if bool(empty.any()):
        raise ValueError(f"{name} must hold a pixel each; mask {int(empty.nonzero()[0])} is empty: leave it out")
