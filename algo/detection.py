"""Average precision and recall of detectors, as the COCO benchmark defines them.

For a class and an intersection over union t, each image's detections, best score first, take the free true box of the highest
IoU >= t. Precision and recall follow from the detections of all images in order of score; precision is made monotonic and
averaged over 101 recalls 0, 0.01, ..., 1. AP is the mean over classes and t = 0.5, 0.55, ..., 0.95. Within a range of areas,
true boxes outside it are ignored: who takes one counts neither as right nor as wrong, nor does who takes none and is outside.

Ref: T.-Y. Lin et al., Microsoft COCO, arXiv 1405.0312, and the evaluation's page at cocodataset.org. Crowd regions are not
modelled. Equal to pycocotools otherwise, ties included (`tests/algo/test_detection.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

__all__ = ["AREAS", "DetectionReport", "Detections", "Truths", "average_precision", "overlaps"]

AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Ranges of box areas in square pixels, both ends included (so COCO has it)."""

_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
_GROUPS = 64  # (image, class) pairs matched at once: bounds the memory


class Detections(NamedTuple):
    """What a detector gives for an image: ``boxes`` (k, 4), x1 y1 x2 y2, ``scores`` (k,) and ``labels`` (k,) integers >= 0."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Truths(NamedTuple):
    """What is in an image: ``boxes`` (k, 4), x1 y1 x2 y2, and ``labels`` (k,) integers >= 0."""

    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class DetectionReport:
    """Average precision (``ap``) and recall (``ar``), 0..1, at most ``limits`` detections of a class in an image counting.

    NaN where no true box says anything. ``per_class`` is the AP of each class that has true boxes.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar: tuple[float, ...]
    """At each of ``limits``."""
    ar_small: float
    ar_medium: float
    ar_large: float
    limits: tuple[int, ...]
    per_class: dict[int, float]


def average_precision(
    found: Sequence[Detections], truths: Sequence[Truths], *, limits: tuple[int, ...] = (1, 10, 100)
) -> DetectionReport:
    """Measure detections against true boxes, one entry for each image in both.

    Parameters
    ----------
    limits
        Most detections of a class in an image that count, ascending; average precision uses the last.

    Raises
    ------
    ValueError
        Lengths or shapes that do not fit, a box with x2 < x1 or y2 < y1, a value that is not finite, wrong ``limits``.
    """
    if len(found) != len(truths):
        raise ValueError(f"{len(found)} images have detections and {len(truths)} have true boxes: one entry for each is needed")
    if not limits or list(limits) != sorted(set(limits)) or limits[0] < 1:
        raise ValueError(f"limits must be ascending integers >= 1, not {limits!r}")
    pictures = [(_detections(image, *one), _truths(image, *two)) for image, (one, two) in enumerate(zip(found, truths))]
    classes = sorted({int(label) for _, (_, labels) in pictures for label in labels})
    precision = np.full((len(classes), len(AREAS), len(_THRESHOLDS)), np.nan)
    recall = np.full((len(limits), *precision.shape), np.nan)
    for row, label in enumerate(classes):
        matched = _match_class(pictures, label, limits[-1])
        precision[row] = _curves(matched, limits[-1])[0]
        for place, limit in enumerate(limits):
            recall[place, row] = _curves(matched, limit)[1]
    return _report(classes, precision, recall, limits)


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union, (..., n, 4) and (..., m, 4) -> (..., n, m) float64; 0 where the intersection is empty."""
    low = np.maximum(boxes[..., :, None, :2], others[..., None, :, :2])
    high = np.minimum(boxes[..., :, None, 2:], others[..., None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    union = _area(boxes)[..., :, None] + _area(others)[..., None, :] - common
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


class _Matches(NamedTuple):
    """Detections of a class in all images: rank in its image (n,), score (n,), right and ignored (n, areas, thresholds)."""

    rank: np.ndarray
    score: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    truths: np.ndarray
    """(areas,) true boxes that count."""


def _match_class(pictures: Sequence[tuple[Any, Any]], label: int, limit: int) -> _Matches:
    groups = []
    for (boxes, scores, labels), (true, true_labels) in pictures:
        mine = np.flatnonzero(labels == label)
        order = mine[np.argsort(-scores[mine], kind="stable")][:limit]
        groups.append((boxes[order], scores[order], true[true_labels == label]))
    low, high = np.array(list(AREAS.values())).T[:, :, None]
    true_boxes = np.concatenate([true for _, _, true in groups])
    counted = ((_area(true_boxes) >= low) & (_area(true_boxes) <= high)).sum(1)
    parts = [part for chunk in _chunks(groups) for part in _match(chunk)]
    rank, score, right, ignored = (np.concatenate(columns) for columns in zip(*parts))
    return _Matches(rank, score, right, ignored, counted)


def _chunks(groups: list[Any]) -> Iterator[list[Any]]:
    return (groups[start : start + _GROUPS] for start in range(0, len(groups), _GROUPS))


def _match(groups: list[Any]) -> Iterator[tuple[np.ndarray, ...]]:
    """Match the detections of some images, best first, in all images, ranges and thresholds at once.

    Arrays: n images, d detections, g true boxes (padded to the most), a ranges, t thresholds.
    """
    depth = max(len(boxes) for boxes, _, _ in groups)
    width = max(max(len(true) for _, _, true in groups), 1)
    boxes, true = np.zeros((len(groups), depth, 4)), np.zeros((len(groups), width, 4))
    for image, (own, _, others) in enumerate(groups):
        boxes[image, : len(own)], true[image, : len(others)] = own, others
    real = np.arange(width) < np.array([len(others) for _, _, others in groups])[:, None]
    low, high = np.array(list(AREAS.values())).T[:, None, :, None]
    outside = (_area(true)[:, None] < low) | (_area(true)[:, None] > high)  # n a g
    iou = overlaps(boxes, true)  # n d g
    needed = np.minimum(_THRESHOLDS, 1 - 1e-10)[:, None]
    free = np.broadcast_to(real[:, None, None], (len(groups), len(AREAS), len(_THRESHOLDS), width)).copy()
    right = np.zeros((len(groups), depth, len(AREAS), len(_THRESHOLDS)), bool)
    ignored = np.zeros_like(right)
    for place in range(depth):
        own = iou[:, place, None, None]
        able = free & (own >= needed)
        # A box that counts comes before one that is ignored, then the higher IoU, then the later box.
        worth = np.where(able, own + 2.0 * ~outside[:, :, None], -1.0)
        best = width - 1 - worth[..., ::-1].argmax(-1)[..., None]
        taken = np.take_along_axis(able, best, -1)
        np.put_along_axis(free, best, np.take_along_axis(free, best, -1) & ~taken, -1)
        skip = np.take_along_axis(np.broadcast_to(outside[:, :, None], free.shape), best, -1) & taken
        area = _area(boxes[:, place])[:, None, None]
        right[:, place] = (taken & ~skip)[..., 0]
        ignored[:, place] = skip[..., 0] | (~taken[..., 0] & ((area < low) | (area > high)))
    for image, (own, scores, _) in enumerate(groups):
        yield np.arange(len(own)), scores, right[image, : len(own)], ignored[image, : len(own)]


def _curves(matches: _Matches, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and last recall, each (areas, thresholds); NaN where no true box counts."""
    kept = np.flatnonzero(matches.rank < limit)
    order = kept[np.argsort(-matches.score[kept], kind="stable")]
    right = (matches.right & ~matches.ignored)[order].cumsum(0).astype(float)
    wrong = (~matches.right & ~matches.ignored)[order].cumsum(0).astype(float)
    precision, recall = np.full((2, *matches.right.shape[1:]), np.nan)
    for area, count in enumerate(matches.truths):
        if not count:
            continue
        share = right[:, area] / count
        exact = right[:, area] / np.maximum(right[:, area] + wrong[:, area], 1)
        falling = np.maximum.accumulate(exact[::-1], axis=0)[::-1]
        padded = np.concatenate([falling, np.zeros((1, falling.shape[1]))])
        for threshold in range(share.shape[1]):
            places = np.searchsorted(share[:, threshold], _RECALLS, side="left")
            precision[area, threshold] = padded[places, threshold].mean()
        recall[area] = share[-1] if len(share) else 0.0
    return precision, recall


def _report(classes: list[int], precision: np.ndarray, recall: np.ndarray, limits: tuple[int, ...]) -> DetectionReport:
    names = list(AREAS)
    ap = {name: _mean(precision[:, place]) for place, name in enumerate(names)}
    ar = {name: _mean(recall[-1, :, place]) for place, name in enumerate(names)}
    return DetectionReport(
        ap=ap["all"],
        ap50=_mean(precision[:, 0, 0]),
        ap75=_mean(precision[:, 0, 5]),
        ap_small=ap["small"],
        ap_medium=ap["medium"],
        ap_large=ap["large"],
        ar=tuple(_mean(part[:, 0]) for part in recall),
        ar_small=ar["small"],
        ar_medium=ar["medium"],
        ar_large=ar["large"],
        limits=limits,
        per_class={label: _mean(precision[row, 0]) for row, label in enumerate(classes)},
    )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _truths(image: int, boxes: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return _boxes(f"true boxes of image {image}", boxes, len(labels)), labels.detach().cpu().numpy()


def _detections(image: int, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    where = f"detections of image {image}"
    if len(scores) != len(labels):
        raise ValueError(f"{where}: {len(scores)} scores and {len(labels)} labels")
    array = scores.detach().cpu().double().numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: a score is not finite")
    return _boxes(where, boxes, len(labels)), array, labels.detach().cpu().numpy()


def _boxes(where: str, boxes: Tensor, count: int) -> np.ndarray:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != count:
        raise ValueError(f"{where}: boxes must be ({count}, 4) for {count} labels, not {tuple(boxes.shape)}")
    array = boxes.detach().cpu().double().numpy()
    if not np.isfinite(array).all() or (array[:, 2:] < array[:, :2]).any():
        raise ValueError(f"{where}: a box is not finite or has x2 < x1 or y2 < y1")
    return array
