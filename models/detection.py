"""What the detectors of the DETR family share: targets, outputs, losses over the layers, and results.

Ref: N. Carion et al., DETR, arXiv 2005.12872, sections 3.1 and A.4 (matching, losses of every decoder layer); X. Zhu et al.,
Deformable DETR, arXiv 2010.04159, appendix A.4 (losses of the encoder's proposals); D. Jia et al., H-DETR, arXiv 2207.13080,
section 3.2 (hybrid matching).

Shapes: B images, Q queries, C classes, N objects of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, distributed, nn

from models.boxes import check_box_shape, check_boxes, clip_boxes, cxcywh_to_xyxy, xyxy_to_cxcywh
from models.checks import check_entries, check_images, check_labels, check_pixels
from models.losses import box_l1_loss, check_finite, class_loss, giou_loss, sigmoid_focal_loss
from models.matcher import BoxMatcher

__all__ = [
    "Augmentation",
    "DetectionCriterion",
    "Detections",
    "Detector",
    "DetectorOutput",
    "Level",
    "Prediction",
    "Target",
    "check_targets",
    "object_count",
    "pad_images",
    "resize_mask",
]


@dataclass(frozen=True)
class Target:
    """The objects of one image: ``labels`` int64 (N,), ``boxes`` float (N, 4), cxcywh as fractions of the image; N may be 0."""

    labels: Tensor
    boxes: Tensor

    @classmethod
    def from_corners(cls, labels: Tensor, boxes: Tensor, *, height: int, width: int) -> Target:
        """From corners (N, 4) in pixels of an image of this size; wrong ones are refused by `check_boxes`."""
        check_boxes(boxes, height=height, width=width)
        size = boxes.new_tensor([width, height, width, height])
        return cls(labels, xyxy_to_cxcywh(clip_boxes(boxes, height=height, width=width) / size))

    def to(self, device: torch.device | str) -> Target:
        """The same on another device."""
        return Target(self.labels.to(device), self.boxes.to(device))


def check_targets(targets: Sequence[Target], *, images: int, classes: int) -> None:
    """Refuse targets that do not belong to so many images and classes.

    Raises
    ------
    TypeError
        Entries that are no `Target`, labels that are not int64, boxes that are not floating point.
    ValueError
        Another number of targets than images, labels or boxes of a wrong shape or range; the message has the number of the image.
    """
    check_entries(targets, Target, images=images, name="targets")
    for number, target in enumerate(targets):
        name = f"boxes of image {number} (cxcywh, as fractions of the image)"
        check_box_shape(target.boxes, name=name)
        check_labels(target.labels, target.boxes, classes=classes, image=number, name="boxes")
        check_boxes(cxcywh_to_xyxy(target.boxes), height=1, width=1, name=name)


class Level(NamedTuple):
    """A feature map: ``features`` (B, channels, H, W), ``mask`` bool (B, H, W), True inside the image, False in the padding."""

    features: Tensor
    mask: Tensor


class Prediction(NamedTuple):
    """Answers of the queries: ``logits`` (B, Q, C), ``boxes`` (B, Q, 4), cxcywh as fractions of the image."""

    logits: Tensor
    boxes: Tensor


class DetectorOutput(NamedTuple):
    """What a detector gives.

    Members
    -------
    layers
        Predictions after each decoder layer; the last are the result.
    encoder
        Proposals of a two-stage detector, one for each cell of the feature maps, or None.
    many
        Of hybrid matching, in training: predictions of the one-to-many queries after each decoder layer; else empty.
    """

    layers: tuple[Prediction, ...]
    encoder: Prediction | None = None
    many: tuple[Prediction, ...] = ()

    @property
    def logits(self) -> Tensor:
        """Class logits of the last layer (B, Q, C)."""
        return self.layers[-1].logits

    @property
    def boxes(self) -> Tensor:
        """Boxes of the last layer (B, Q, 4)."""
        return self.layers[-1].boxes

    def images(self, start: int, stop: int) -> DetectorOutput:
        """The output for some images of the batch."""
        cut = lambda item: Prediction(item.logits[start:stop], item.boxes[start:stop])
        encoder = None if self.encoder is None else cut(self.encoder)
        return DetectorOutput(tuple(map(cut, self.layers)), encoder, tuple(map(cut, self.many)))


class Detections(NamedTuple):
    """What was found in one image, best first: ``scores`` (K,), ``labels`` int64 (K,), ``boxes`` (K, 4), corners in pixels."""

    scores: Tensor
    labels: Tensor
    boxes: Tensor


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images (3, H, W) of any sizes -> a batch (B, 3, H, W) padded with zeros at right and bottom, and its mask (B, H, W)."""
    if not images:
        raise ValueError("a batch needs at least one image")
    for number, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != images[0].shape[0]:
            raise ValueError(f"images must be ({images[0].shape[0]}, H, W), not {tuple(image.shape)} (image {number})")
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.bool, device=batch.device)
    for image, place, inside in zip(images, batch, mask):
        place[:, : image.shape[1], : image.shape[2]] = image
        inside[: image.shape[1], : image.shape[2]] = True
    return batch, mask


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Bool (B, H, W) -> bool (B, *size), by the nearest pixel."""
    return nn.functional.interpolate(mask[None].float(), size=tuple(size))[0].to(torch.bool)


@dataclass(frozen=True, kw_only=True)
class DetectionCriterion:
    """Match every layer's predictions with the objects and sum the losses of classes and boxes.

    Sums are divided by the number of objects in the batch (at least 1; the mean over the processes where several train together).
    With a ``focal`` matcher classes are independent sigmoids, else a softmax whose last class is "no object", of weight
    ``no_object``. ``repeats`` and ``many_weight`` are K and lambda of hybrid matching.
    """

    matcher: BoxMatcher = BoxMatcher()
    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    no_object: float = 0.1
    repeats: int = 6
    many_weight: float = 1.0

    def __call__(self, output: DetectorOutput, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is what a training minimises.

        Names are ``class``, ``l1`` and ``giou`` for the last layer, with the number of the layer (``l1_0``) for the others, with
        ``_encoder`` for proposals, and beginning with ``many_`` for the one-to-many queries.

        Raises
        ------
        ValueError
            Predictions or losses that are not finite.
        """
        losses = self._layers(output.layers, targets)
        if output.encoder is not None:
            # proposals only tell objects from background: class 0 stands for all
            anything = [Target(torch.zeros_like(target.labels), target.boxes) for target in targets]
            losses |= _suffixed(self._layer(output.encoder, anything), "_encoder")
        if output.many:
            repeated = [Target(target.labels.repeat(self.repeats), target.boxes.repeat(self.repeats, 1)) for target in targets]
            many = self._layers(output.many, repeated)
            losses |= {f"many_{name}": self.many_weight * value for name, value in many.items()}
        check_finite(losses)
        return losses

    def _layers(self, layers: Sequence[Prediction], targets: Sequence[Target]) -> dict[str, Tensor]:
        losses = self._layer(layers[-1], targets)
        for number, layer in enumerate(layers[:-1]):
            losses |= _suffixed(self._layer(layer, targets), f"_{number}")
        return losses

    def _layer(self, prediction: Prediction, targets: Sequence[Target]) -> dict[str, Tensor]:
        logits, boxes = prediction
        pairs = [self.matcher(*image, target.labels, target.boxes) for image, target in zip(zip(logits, boxes), targets)]
        image = torch.cat([torch.full_like(queries, number) for number, (queries, _) in enumerate(pairs)])
        query = torch.cat([queries for queries, _ in pairs])
        labels = torch.cat([target.labels[objects] for target, (_, objects) in zip(targets, pairs)])
        expected = torch.cat([target.boxes[objects] for target, (_, objects) in zip(targets, pairs)])
        count, matched = object_count(targets, logits.device), boxes[image, query]
        return {
            "class": self.class_weight * self._classes(logits, image, query, labels, count),
            "l1": self.l1_weight * box_l1_loss(matched, expected).sum() / count,
            "giou": self.giou_weight * giou_loss(matched, expected).sum() / count,
        }

    def _classes(self, logits: Tensor, image: Tensor, query: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        if self.matcher.focal:
            truth = torch.zeros_like(logits)
            truth[image, query, labels] = 1
            return sigmoid_focal_loss(logits, truth, alpha=self.matcher.alpha).sum() / count
        classes = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
        classes[image, query] = labels
        return class_loss(logits, classes, no_object=self.no_object)


def _suffixed(losses: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {name + suffix: value for name, value in losses.items()}


def object_count(targets: Sequence[Any], device: torch.device) -> Tensor:
    """How many ``labels`` the targets of a batch have, the mean over the processes, at least 1: float32 scalar."""
    count = torch.tensor(float(sum(len(target.labels) for target in targets)), device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        count /= distributed.get_world_size()
    return count.clamp(min=1)


class Augmentation(Protocol):
    """Several copies of a batch in training; see `models.feataug`."""

    def losses(
        self, detector: Detector, images: Tensor, mask: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]: ...


class Detector(nn.Module):
    """A detector in two halves, so that features can be augmented between them: `extract` and `detect`.

    Members
    -------
    num_classes
        Classes of objects, "no object" not counted.
    criterion
        What `losses` computes.
    augmentation
        FeatAug or DataAug, which `losses` applies in training mode, or None. Nothing else of a detector knows about it.
    """

    num_classes: int
    criterion: DetectionCriterion
    augmentation: Augmentation | None = None

    def extract(self, images: Tensor, mask: Tensor) -> list[Level]:
        """Images (B, 3, H, W) and their mask (B, H, W) -> feature maps that the transformer reads, finest first."""
        raise NotImplementedError

    def detect(self, levels: Sequence[Level]) -> DetectorOutput:
        """Feature maps -> predictions of every decoder layer."""
        raise NotImplementedError

    def forward(self, images: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """Detect objects.

        Parameters
        ----------
        images
            Float (B, 3, H, W), normalised as the backbone expects.
        mask
            Bool (B, H, W), True inside the images, as `pad_images` gives it; None: no padding.
        """
        return self.detect(self.extract(images, self.check_images(images, mask)))

    def losses(self, images: Tensor, targets: Sequence[Target], mask: Tensor | None = None) -> dict[str, Tensor]:
        """Weighted losses by name of images with known objects; see `DetectionCriterion` and `check_targets`.

        A pixel that is not finite is refused, as in `predict`: ValueError with the number of the image.
        """
        mask = self.check_images(images, mask)
        check_pixels(images)
        check_targets(targets, images=len(images), classes=self.num_classes)
        if self.training and self.augmentation is not None:
            return self.augmentation.losses(self, images, mask, targets)
        return self.criterion(self(images, mask), targets)

    @torch.no_grad()
    def predict(
        self, images: Tensor, mask: Tensor | None = None, *, top: int = 100, threshold: float = 0.0
    ) -> list[Detections]:
        """What is in each image: at most ``top`` objects with a score above ``threshold``."""
        mask = self.check_images(images, mask)
        check_pixels(images)
        sizes = torch.stack([mask[:, 0].sum(1), mask[:, :, 0].sum(1)], 1)
        return self.results(self(images, mask), sizes, top=top, threshold=threshold)

    def results(self, output: DetectorOutput, sizes: Tensor, *, top: int = 100, threshold: float = 0.0) -> list[Detections]:
        """Turn an output into objects with boxes in pixels, ``sizes`` (B, 2) being width and height of the images.

        With sigmoids the best pairs of query and class count; with softmax each query's best class.
        """
        boxes = cxcywh_to_xyxy(output.boxes) * sizes.to(output.boxes).repeat(1, 2)[:, None]
        if self.criterion.matcher.focal:
            scores, places = output.logits.sigmoid().flatten(1).topk(min(top, output.logits[0].numel()))
            query, labels = places // output.logits.shape[-1], places % output.logits.shape[-1]
        else:
            best, classes = output.logits.softmax(-1)[..., :-1].max(-1)
            scores, query = best.topk(min(top, best.shape[1]))
            labels = classes.gather(1, query)
        found = []
        for score, label, box in zip(scores, labels, boxes.gather(1, query[..., None].expand(-1, -1, 4))):
            keep = score > threshold
            found.append(Detections(score[keep], label[keep], box[keep]))
        return found

    @staticmethod
    def check_images(images: Tensor, mask: Tensor | None) -> Tensor:
        """The mask, or one that is True everywhere; images or masks of a wrong shape are refused."""
        check_images(images, 3)
        shape = (len(images), *images.shape[2:])
        if mask is None:
            return torch.ones(shape, dtype=torch.bool, device=images.device)
        if not isinstance(mask, Tensor):
            raise TypeError(f"the mask must be a bool tensor {shape}, True inside the images, not {type(mask).__name__}")
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"the mask must be bool {shape}, True inside the images, not {mask.dtype} {tuple(mask.shape)}")
        return mask
