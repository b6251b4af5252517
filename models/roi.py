"""Regions of interest: features pooled from a box (RoIAlign), and non-maximum suppression.

Ref: K. He et al., Mask R-CNN, arXiv 1703.06870, section 3 (RoIAlign); T.-Y. Lin et al., Feature Pyramid Networks, arXiv
1612.03144, eq. 1 (level of a box). Equal to torchvision's ``roi_align(aligned=True)``, mmcv's RoIAlign, and torchvision's ``nms``
and class-wise NMS (without their shift of coordinates, so without its rounding).

Shapes: K boxes, B images, C channels, H and W cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.boxes import box_area, pairwise_iou

__all__ = ["nms", "pyramid_level", "pyramid_roi_align", "roi_align"]

_CHUNK = 64  # boxes at a time: bounds the half-pooled map (64, size, C, W)


def roi_align(
    features: Tensor, boxes: Tensor, image: Tensor, *, size: int = 7, scale: float = 1.0, sampling_ratio: int = 0
) -> Tensor:
    """Pool each box to ``size`` x ``size`` bins, each the mean of bilinear samples on a regular grid in it.

    Interpolation is separable, so a box's bins are a product of three matrices: rows, features, columns. No gradient reaches the
    boxes.

    Parameters
    ----------
    features
        (B, C, H, W).
    boxes
        Corners (K, 4) in pixels.
    image
        int64 (K,): the image of each box.
    scale
        Cells per pixel: 1 / stride. The centre of cell (0, 0) is at 0.5 / ``scale`` pixels.
    sampling_ratio
        Samples a bin in each direction; 0: as many as cells, rounded up, so none for a box without area, whose bins are 0.

    Returns
    -------
    Tensor
        (K, C, size, size). Samples more than a cell outside the map count as 0.
    """
    if boxes.shape != (len(image), 4):
        raise ValueError(f"boxes must be ({len(image)}, 4), one for each entry of image, not {tuple(boxes.shape)}")
    if len(image) and not 0 <= int(image.min()) <= int(image.max()) < len(features):
        raise ValueError(f"image must be in 0..{len(features) - 1}, not {int(image.min())}..{int(image.max())}")
    corners = boxes.detach() * scale - 0.5
    columns = _interpolation(corners[:, 0], corners[:, 2], features.shape[3], size, sampling_ratio)
    rows = _interpolation(corners[:, 1], corners[:, 3], features.shape[2], size, sampling_ratio)
    pooled = features.new_zeros(len(boxes), features.shape[1], size, size)
    for number in image.unique().tolist():
        by_row = features[number].transpose(0, 1).flatten(1)  # (H, C W)
        for mine in (image == number).nonzero()[:, 0].split(_CHUNK):
            half = (rows[mine].flatten(0, 1) @ by_row).view(len(mine), size, features.shape[1], features.shape[3])
            bins = half @ columns[mine].transpose(1, 2)[:, None]  # (k, size, C, size)
            pooled = pooled.index_copy(0, mine, bins.transpose(1, 2))
    return pooled


def _interpolation(low: Tensor, high: Tensor, cells: int, size: int, sampling_ratio: int) -> Tensor:
    """Weight of every cell in every bin, (K, size, cells), along one direction."""
    step = (high - low) / size
    samples = torch.full_like(step, sampling_ratio) if sampling_ratio else step.ceil().clamp(min=0)
    most = int(samples.max()) if len(samples) else 0
    grid = torch.arange(most, device=low.device, dtype=low.dtype)
    within = (grid + 0.5) / samples[:, None].clamp(min=1)  # (K, most)
    places = low[:, None, None] + (torch.arange(size, device=low.device)[:, None] + within[:, None]) * step[:, None, None]
    counts = (grid < samples[:, None])[:, None] & (places >= -1) & (places <= cells)
    share = counts / samples[:, None, None].clamp(min=1)
    places = places.clamp(0, cells - 1)
    first = places.floor()
    second_share = (places - first) * share
    weights = low.new_zeros(len(low), size, cells)
    weights.scatter_add_(2, first.long(), share - second_share)
    return weights.scatter_add_(2, (first.long() + 1).clamp(max=cells - 1), second_share)


def pyramid_level(boxes: Tensor, *, levels: int, finest: float = 56.0) -> Tensor:
    """Which level a box is pooled from: corners (K, 4) -> int64 (K,), 0 the finest.

    Boxes with sides below 2 ``finest`` pixels go to level 0, each doubling one level up.
    """
    return torch.log2(box_area(boxes).sqrt() / finest + 1e-6).floor().clamp(0, levels - 1).long()


def pyramid_roi_align(
    maps: Sequence[Tensor], boxes: Tensor, image: Tensor, *, strides: Sequence[int], size: int = 7, sampling_ratio: int = 0
) -> Tensor:
    """`roi_align` of each box from the level of `pyramid_level`: maps (B, C, H_i, W_i) of these strides -> (K, C, size, size)."""
    level = pyramid_level(boxes, levels=len(maps))
    pooled = maps[0].new_zeros(len(boxes), maps[0].shape[1], size, size)
    for number, (features, stride) in enumerate(zip(maps, strides)):
        mine = (level == number).nonzero()[:, 0]
        part = roi_align(features, boxes[mine], image[mine], size=size, scale=1 / stride, sampling_ratio=sampling_ratio)
        pooled = pooled.index_copy(0, mine, part)
    return pooled


BLOCK = 2048
"""Boxes that `nms` compares at a time, so that its memory grows with their number and not with its square."""


def nms(
    boxes: Tensor, scores: Tensor, *, threshold: float, labels: Tensor | None = None, limit: int | None = None
) -> Tensor:
    """Non-maximum suppression: drop a box that overlaps a kept one of higher score by an IoU above ``threshold``.

    Parameters
    ----------
    boxes, scores
        Corners (K, 4) and (K,); of equal scores the first comes first.
    labels
        (K,): only boxes of one label suppress each other; None: all do.
    limit
        Most boxes kept.

    Returns
    -------
    Tensor
        int64: numbers of the kept boxes, best first.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in 0..1, not {threshold!r}")
    order = scores.sort(descending=True, stable=True).indices
    kept = order[:0]
    for block in order.split(BLOCK):
        if limit is not None and len(kept) >= limit:
            break
        block = block[~_rivals(boxes, labels, kept, block, threshold).any(0)]
        kept = torch.cat([kept, block[_undisputed(_rivals(boxes, labels, block, block, threshold).triu(1))]])
    return kept[:limit]


def _rivals(boxes: Tensor, labels: Tensor | None, one: Tensor, other: Tensor, threshold: float) -> Tensor:
    """Which boxes suppress each other: their numbers (K,) and (L,) -> bool (K, L)."""
    rival = pairwise_iou(boxes[one], boxes[other]) > threshold
    return rival if labels is None else rival & (labels[one][:, None] == labels[other])


def _undisputed(rival: Tensor) -> Tensor:
    """Which of K boxes, best first, stay: bool (K, K), above the diagonal, -> bool (K,).

    Dropped are the rivals of kept ones. The greedy result is the only set of which that holds; each round settles at least the
    first box that was not settled, usually nearly all.
    """
    kept = torch.ones(len(rival), dtype=torch.bool, device=rival.device)
    while True:
        after = ~(rival & kept[:, None]).any(0)
        if torch.equal(after, kept):
            return kept
        kept = after
