"""How well semantic maps agree with the truth: confusion matrix, intersection over union, accuracy.

Ref: M. Everingham et al., The Pascal Visual Object Classes Challenge: A Retrospective, IJCV 111, 2015, section 4.2.2
(intersection over union of all pixels of the data together, class by class).

Shapes: K classes; maps are whole numbers of any shape, the same for prediction and truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SegmentationReport", "SegmentationScore", "confusion_matrix"]


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int, *, ignore: int | None = None) -> Tensor:
    """Count pixels by class: int64 (K, K), rows are the truth, columns the prediction.

    Pixels whose truth is ``ignore`` do not count.

    Raises
    ------
    TypeError
        Maps that are not whole numbers.
    ValueError
        Maps of different shapes, or a class out of range.
    """
    for name, value in (("predicted", predicted), ("truth", truth)):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be whole numbers of classes, not {value.dtype}")
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted and truth must have one shape, not {tuple(predicted.shape)} and {tuple(truth.shape)}")
    predicted, truth = predicted.flatten().long(), truth.flatten().long()
    if ignore is not None:
        counted = truth != ignore
        predicted, truth = predicted[counted], truth[counted]
    for name, value in (("predicted", predicted), ("truth", truth)):
        if len(value) and not (0 <= int(value.min()) and int(value.max()) < classes):
            raise ValueError(f"{name} must be in 0..{classes - 1}, not {int(value.min())}..{int(value.max())}")
    return torch.bincount(truth * classes + predicted, minlength=classes**2).view(classes, classes)


@dataclass(frozen=True)
class SegmentationReport:
    """Agreement of all pixels together, each in [0, 1], or nan where there is nothing to measure.

    Members
    -------
    iou
        Of each class: pixels in both over pixels in either; nan for a class that is in neither.
    mean_iou
        Mean over the classes that are in the truth or the prediction.
    accuracy
        Share of pixels that are right.
    pixels
        How many were counted.
    """

    iou: tuple[float, ...]
    mean_iou: float
    accuracy: float
    pixels: int


class SegmentationScore:
    """Adds up maps, batch by batch; `report` at any time."""

    def __init__(self, classes: int, *, ignore: int | None = None) -> None:
        if not isinstance(classes, int) or classes < 1:
            raise ValueError(f"classes must be an integer >= 1, not {classes!r}")
        self.classes, self.ignore = classes, ignore
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count maps; errors as for `confusion_matrix`."""
        self.matrix += confusion_matrix(predicted, truth, self.classes, ignore=self.ignore).cpu()

    def report(self) -> SegmentationReport:
        """What was added so far."""
        matrix = self.matrix.double()
        right = matrix.diagonal()
        either = matrix.sum(0) + matrix.sum(1) - right
        iou = right / either  # 0 / 0 is nan
        return SegmentationReport(
            tuple(iou.tolist()), float(iou.nanmean()), float(right.sum() / matrix.sum()), int(self.matrix.sum())
        )
