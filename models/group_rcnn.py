"""Group R-CNN: from one point on each object to its box.

    RetinaNet ── 135 anchors around each point ── NMS: a group of 50 proposals per point (instance)
    levels (no gradient) ── RoIAlign ── where the point is, relative to each cell ── one kernel per instance ── box head, 3 stages

Ref: S. Zhang et al., Group R-CNN for Weakly Semi-supervised Object Detection with Points, arXiv 2205.05920, and its code
(jshilong/GroupRCNN); Z. Cai and N. Vasconcelos, Cascade R-CNN, arXiv 1712.00726.

Sizes, thresholds and weights are the code's. It differs where the code's result depends on what it should not:
padding of short groups counts neither in an instance's mean nor in a loss, and is never a result (the code sends zeros through
the head); an instance all of whose proposals others suppressed keeps its best one (the code takes some other instance's);
batches are laid out instance by instance (the code's kernels meet other instances' proposals if a batch has several images);
refined boxes are clipped to the image in training, too; a level smaller than ``nearest`` gives what it has.

Shapes: B images, I instances of all images, G proposals of an instance (``group``), C classes, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.anchors import decode_boxes, encode_boxes, grid_points
from models.boxes import clip_boxes, paired_iou
from models.dense import SMALL, image_sizes
from models.detection import Detections, Target
from models.info import ModelInfo, Published
from models.info import image as image_input
from models.losses import check_finite
from models.points import PointTarget, check_points
from models.registry import describe_models
from models.retinanet import LevelOutput, RetinaNet, RetinaNetConfig
from models.roi import nms, pyramid_roi_align
from models.vision import register_vision_models

__all__ = [
    "CONFIGS",
    "GroupRCNN",
    "GroupRCNNConfig",
    "Groups",
    "ImagePart",
    "InstanceHead",
    "StageOutput",
    "group_proposals",
    "nearest_cells",
]

Stage = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class GroupRCNNConfig(RetinaNetConfig):
    """Sizes of a Group R-CNN.

    ``nearest`` cells of each level give a point's proposals; of these NMS at ``proposal_overlap`` leaves at most ``group`` an
    instance and ``limit`` an image. ``roi_levels``: levels that boxes are pooled from, to ``roi_size`` bins.
    A stage has its positive IoU, the deviations of its offsets and its weight. ``result_overlap``: NMS of results.
    """

    nearest: int = 3
    group: int = 50
    limit: int = 1000
    proposal_overlap: float = 0.7
    result_overlap: float = 0.5
    roi_levels: int = 4
    roi_size: int = 7
    hidden: int = 1024
    norm_groups: int = 32
    stage_iou: tuple[float, ...] = (0.5, 0.6, 0.7)
    stage_deviations: tuple[Stage, ...] = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    stage_weights: tuple[float, ...] = (1.0, 0.5, 0.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.stage_iou) == len(self.stage_deviations) == len(self.stage_weights):
            raise ValueError("stage_iou, stage_deviations and stage_weights must have one entry for each stage")
        if self.channels % self.norm_groups:
            raise ValueError(f"channels must be a multiple of norm_groups {self.norm_groups}, not {self.channels}")


CONFIGS = {
    "group_rcnn_r50": GroupRCNNConfig(),
    "group_rcnn_small": GroupRCNNConfig(**SMALL, group=20, roi_levels=3, roi_size=5, hidden=128, norm_groups=8),
}


class Groups(NamedTuple):
    """Proposals by instance, those of the first image first.

    Members
    -------
    boxes
        (I, G, 4), best first, zeros behind.
    real
        bool (I, G): False where there are zeros.
    image, labels
        int64 (I,).
    points
        (I, 2), pixels.
    """

    boxes: Tensor
    real: Tensor
    image: Tensor
    labels: Tensor
    points: Tensor


class StageOutput(NamedTuple):
    """``rois`` (I, G, 4) that went in, class logits (I, G, C + 1), the last for background, and ``offsets`` (I, G, 4)."""

    rois: Tensor
    logits: Tensor
    offsets: Tensor


def nearest_cells(points: Tensor, *, size: Sequence[int], stride: int, count: int) -> Tensor:
    """The cells whose places, cell times ``stride``, are nearest to each point.

    Points (N, 2) in pixels and ``size``, height and width of the map -> int64 (k, N), k <= ``count``.
    """
    places = grid_points(size, stride, device=points.device)
    distances = (places[:, None] - points).square().sum(-1)
    return distances.topk(min(count, len(places)), dim=0, largest=False).indices


def group_proposals(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, size: int = 50, threshold: float = 0.7, limit: int = 1000
) -> tuple[Tensor, Tensor]:
    """Group one image's proposals by instance: class-wise NMS over all of them, then the best of each instance.

    Parameters
    ----------
    boxes, scores
        Proposals of N instances, (N, P, 4) and (N, P).
    labels
        int64 (N,): only instances of one class compete.
    size
        Most proposals of an instance.
    threshold, limit
        IoU of the NMS, and how many proposals it leaves in the image.

    Returns
    -------
    tuple
        Boxes (N, size, 4), best first, zeros behind, and which are real: bool (N, size). If nothing of an instance is left, its
        best proposal is.
    """
    count, each = scores.shape
    kept = nms(
        boxes.flatten(0, 1), scores.flatten(), threshold=threshold, labels=labels.repeat_interleave(each), limit=limit
    )
    owner = torch.arange(count, device=boxes.device)
    lost = owner[~torch.isin(owner, kept // each)]
    kept = torch.cat([kept, lost * each + scores[lost].argmax(1)]) if len(lost) else kept
    mine = kept // each == owner[:, None]  # (N, kept)
    rank = (mine.cumsum(1) - 1)[mine.nonzero(as_tuple=True)]
    instance, place = mine.nonzero(as_tuple=True)
    instance, place, rank = (part[rank < size] for part in (instance, place, rank))
    grouped, real = boxes.new_zeros(count, size, 4), torch.zeros(count, size, dtype=torch.bool, device=boxes.device)
    grouped[instance, rank] = boxes.flatten(0, 1)[kept[place]]
    real[instance, rank] = True
    return grouped, real


class InstanceHead(nn.Module):
    """Three stages of class and box from pooled features, each instance with a kernel of its own.

    The kernel, D x D of a 1x1 convolution, is a linear function of the instance's mean feature and its class. What fuses them,
    the norm and what joins the point's place to the features are the same in all stages.
    """

    def __init__(self, config: GroupRCNNConfig) -> None:
        super().__init__()
        width, flat = config.channels, config.channels * config.roi_size**2
        self.config = config
        self.place = nn.Conv2d(width + 2, width, 3, padding=1)
        self.embedding = nn.Embedding(config.num_classes, width)
        self.fuse = nn.Linear(2 * width, width)
        self.generators = nn.ModuleList(nn.Linear(width, width * width) for _ in config.stage_iou)
        self.norm = nn.GroupNorm(config.norm_groups, width)
        self.heads = nn.ModuleList(_StageHead(flat, config.hidden, config.num_classes) for _ in config.stage_iou)
        nn.init.normal_(self.embedding.weight)

    def forward(self, maps: Sequence[Tensor], groups: Groups, sizes: Tensor, strides: Sequence[int]) -> list[StageOutput]:
        """Levels (B, D, h, w) with these strides, and sizes (B, 2) of the images -> outputs of the stages in turn.

        With no instance every shape has I = 0.
        """
        outputs, rois = [], groups.boxes
        limit = sizes[groups.image][:, None]
        for stage in range(len(self.heads)):
            output = StageOutput(rois, *self._stage(stage, maps, groups, rois, strides))
            outputs.append(output)
            refined = self.refine(stage, output)
            rois = torch.minimum(refined.clamp(min=0), limit.repeat(1, 1, 2))
        return outputs

    def refine(self, stage: int, output: StageOutput) -> Tensor:
        """Boxes (I, G, 4) that a stage's offsets lead to; without gradient, not clipped."""
        return decode_boxes(output.offsets.detach(), output.rois, deviations=self.config.stage_deviations[stage])

    def _stage(
        self, stage: int, maps: Sequence[Tensor], groups: Groups, rois: Tensor, strides: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        pooled = self.pool(maps, groups, rois, strides)
        kernels = self.kernels(stage, pooled, groups)
        x = F.relu(self.norm(instance_convolution(pooled, kernels).flatten(0, 1)))
        logits, offsets = self.heads[stage](x)
        return logits.unflatten(0, rois.shape[:2]), offsets.unflatten(0, rois.shape[:2])

    def pool(self, maps: Sequence[Tensor], groups: Groups, rois: Tensor, strides: Sequence[int]) -> Tensor:
        """Instance-aware features of each proposal: (I, G, D, size, size)."""
        each, size = rois.shape[1], self.config.roi_size
        boxes, image = rois.flatten(0, 1), groups.image.repeat_interleave(each)
        features = pyramid_roi_align(maps, boxes, image, strides=strides, size=size)
        points = groups.points.repeat_interleave(each, 0)
        places = relative_places(maps, boxes, points, strides=strides, size=size)
        return self.place(torch.cat([features, places], 1)).unflatten(0, rois.shape[:2])

    def kernels(self, stage: int, pooled: Tensor, groups: Groups) -> Tensor:
        """A kernel for each instance, (I, D, D), outputs first, from its mean feature and its class."""
        share = groups.real / groups.real.sum(1, keepdim=True).clamp(min=1)
        mean = (pooled.mean((3, 4)) * share[..., None]).sum(1)
        fused = self.fuse(torch.cat([self.embedding(groups.labels), mean], 1))
        return self.generators[stage](fused).unflatten(1, (mean.shape[1], mean.shape[1]))


class _StageHead(nn.Module):
    """Two hidden layers, then classes and offsets: (K, D, size, size) -> (K, C + 1) and (K, 4)."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.classes = nn.Linear(hidden, classes + 1)
        self.offsets = nn.Linear(hidden, 4)
        for layer, deviation in ((self.classes, 0.01), (self.offsets, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.hidden(x.flatten(1))
        return self.classes(x), self.offsets(x)


def instance_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """A 1x1 convolution, a kernel for each instance, as one grouped one: (I, G, D, s, s) and (I, E, D) -> (I, G, E, s, s)."""
    instances, outputs = kernels.shape[:2]
    if not instances:
        return x.new_zeros(0, x.shape[1], outputs, *x.shape[3:])
    folded = x.transpose(0, 1).flatten(1, 2)  # (G, I D, s, s)
    result = F.conv2d(folded, kernels.flatten(0, 1)[..., None, None], groups=instances)
    return result.unflatten(1, (instances, outputs)).transpose(0, 1)


def relative_places(
    maps: Sequence[Tensor], boxes: Tensor, points: Tensor, *, strides: Sequence[int], size: int
) -> Tensor:
    """Where a proposal's point lies, seen from its bins, in cells: boxes (K, 4) and points (K, 2) -> (K, 2, size, size).

    It is the RoIAlign of the map (point - place) / stride. That is linear in the point, so one map of the places and of ones
    serves all points.
    """
    grids = []
    for x, stride in zip(maps, strides):
        place = grid_points(x.shape[2:], stride, device=x.device).to(x.dtype).T.unflatten(1, x.shape[2:])
        grids.append(torch.cat([place / stride, torch.full_like(place[:1], 1 / stride)])[None])
    image = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    pooled = pyramid_roi_align(grids, boxes, image, strides=strides, size=size)
    return points[:, :, None, None] * pooled[:, 2:] - pooled[:, :2]


class GroupRCNN(RetinaNet):
    """Images (B, 3, H, W) and points -> the groups and the outputs of the stages.

    `losses` and `predict` are those of the whole; `RetinaNet.predict`, which finds objects without points, is `detect`.
    """

    config: GroupRCNNConfig

    def __init__(self, config: GroupRCNNConfig) -> None:
        super().__init__(config)
        if config.roi_levels > len(self.strides):
            raise ValueError(f"roi_levels must be at most {len(self.strides)}, the levels there are, not {config.roi_levels}")
        self.projection = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.instances = InstanceHead(config)

    def forward(  # type: ignore[override]
        self, images: Tensor, points: Sequence[PointTarget], mask: Tensor | None = None
    ) -> tuple[Groups, list[StageOutput]]:
        sizes = self._check_points(images, points, mask)
        levels = self.extract(images)
        return self._instances(levels, self.head(levels), sizes, points)

    def losses(  # type: ignore[override]
        self, images: Tensor, targets: Sequence[Target], points: Sequence[PointTarget], mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses by name: RetinaNet's ``class`` and ``box``, and ``class_0``, ``box_0``, ... of the stages, weighted.

        Parameters
        ----------
        images, targets, mask
            As for `models.detection.Detector.losses`.
        points
            A point for each object, in the order of the targets; `sample_points` draws them.

        Raises
        ------
        ValueError, TypeError
            Input that does not fit (`check_targets`, `check_points`), or a loss that is not finite.
        """
        sizes, corners = self._check(images, targets, mask)
        self._check_points(images, points, mask)
        for number, (target, entry) in enumerate(zip(targets, points)):
            if not torch.equal(target.labels, entry.labels):
                raise ValueError(f"image {number} has other labels with its points than with its boxes: one point for each box")
        levels = self.extract(images)
        outputs = self.head(levels)
        losses = self._losses(outputs, sizes, targets, corners)
        groups, stages = self._instances(levels, outputs, sizes, points)
        truth = torch.cat(list(corners))
        for stage, output in enumerate(stages):
            losses |= self._stage_losses(stage, output, groups, truth)
        check_finite(losses)
        return losses

    @torch.no_grad()
    def predict(  # type: ignore[override]
        self, images: Tensor, points: Sequence[PointTarget], mask: Tensor | None = None
    ) -> list[Detections]:
        """A box for each point, in the order of the points, with a score: mean over the stages of the probability of its class.

        Boxes are corners in pixels. Class-wise NMS over the instances of an image chooses; an instance that others suppress
        altogether keeps its own best.
        """
        groups, stages = self(images, points, mask)
        sizes = image_sizes(images, mask)
        boxes = self.instances.refine(len(stages) - 1, stages[-1])
        chances = torch.stack([output.logits.softmax(-1) for output in stages]).mean(0)
        place = groups.labels[:, None, None].expand(-1, boxes.shape[1], 1)
        scores = chances.gather(2, place)[..., 0].masked_fill(~groups.real, -1)
        results = []
        for image, (width, height) in enumerate(sizes.tolist()):
            mine = groups.image == image
            corners = clip_boxes(boxes[mine], height=height, width=width)
            best = self._choose(corners, scores[mine], groups.labels[mine])
            row = torch.arange(len(best), device=best.device)
            results.append(Detections(scores[mine][row, best], groups.labels[mine], corners[row, best]))
        return results

    @torch.no_grad()
    def detect(self, images: Tensor, mask: Tensor | None = None, *, top: int = 100, threshold: float = 0.05) -> list[Detections]:
        """What the RetinaNet part finds without points."""
        sizes = image_sizes(images, mask)
        return self._select(self.head(self.extract(images)), sizes, top=top, threshold=threshold)

    def project(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The maps that boxes are pooled from, of the finest levels; without gradient to these."""
        return [F.relu(self.projection(x.detach())) for x in levels[: self.config.roi_levels]]

    def proposals(
        self, outputs: Sequence[LevelOutput], image: int, size: Tensor, points: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Boxes (N, P, 4) and scores (N, P) of the anchors around the points (N, 2), pixels, of one image.

        P is 135 with three cells, nine anchors and five levels.
        """
        boxes, scores = [], []
        for output, anchors, stride in zip(outputs, self.level_anchors(outputs), self.strides):
            cells = nearest_cells(points, size=output[0].shape[2:], stride=stride, count=self.config.nearest)
            places = (cells.T[..., None] * self.anchors + torch.arange(self.anchors, device=cells.device)).flatten(1)
            logits, offsets = (part[image] for part in self.by_anchor(output))
            boxes.append(decode_boxes(offsets[places], anchors[places]))
            scores.append(logits[places, labels[:, None]].sigmoid())
        return clip_boxes(torch.cat(boxes, 1), width=float(size[0]), height=float(size[1])), torch.cat(scores, 1)

    def _check_points(self, images: Tensor, points: Sequence[PointTarget], mask: Tensor | None) -> Tensor:
        check_points(points, images=len(images), classes=self.num_classes)
        return image_sizes(images, mask)

    def _instances(
        self, levels: Sequence[Tensor], outputs: Sequence[LevelOutput], sizes: Tensor, points: Sequence[PointTarget]
    ) -> tuple[Groups, list[StageOutput]]:
        groups = self._groups(outputs, sizes, points)
        return groups, self.instances(self.project(levels), groups, sizes, self.strides)

    @torch.no_grad()
    def _groups(self, outputs: Sequence[LevelOutput], sizes: Tensor, points: Sequence[PointTarget]) -> Groups:
        config, parts = self.config, []
        for image, (size, entry) in enumerate(zip(sizes, points)):
            pixels = entry.points * size
            boxes, scores = self.proposals(outputs, image, size, pixels, entry.labels)
            grouped, real = group_proposals(
                boxes, scores, entry.labels, size=config.group, threshold=config.proposal_overlap, limit=config.limit
            )
            parts.append(Groups(grouped, real, torch.full_like(entry.labels, image), entry.labels, pixels))
        return Groups(*(torch.cat(columns) for columns in zip(*parts)))

    def _stage_losses(self, stage: int, output: StageOutput, groups: Groups, truth: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of all real proposals and smooth L1 of the positive ones, over the number of positive ones."""
        config = self.config
        wanted, positive = assign_instances(
            output.rois, truth, groups.labels, threshold=config.stage_iou[stage], background=config.num_classes
        )
        positive &= groups.real
        count, weight = max(int(positive.sum()), 1), config.stage_weights[stage]
        own = truth[:, None].expand_as(output.rois)[positive]
        offsets = encode_boxes(own, output.rois[positive], deviations=config.stage_deviations[stage])
        classes = F.cross_entropy(output.logits[groups.real], wanted[groups.real], reduction="sum")
        boxes = F.smooth_l1_loss(output.offsets[positive], offsets, reduction="sum")
        return {f"class_{stage}": weight * classes / count, f"box_{stage}": weight * boxes / count}

    def _choose(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Which proposal stands for each instance: (N, G, 4), (N, G) and (N,) -> int64 (N,)."""
        count, each = scores.shape
        repeated = labels.repeat_interleave(each)
        kept = nms(boxes.flatten(0, 1), scores.flatten(), threshold=self.config.result_overlap, labels=repeated)
        best = scores.argmax(1) if count else labels.new_zeros(0)
        survived = torch.full_like(scores.flatten(), -2)
        survived[kept] = scores.flatten()[kept]
        top, place = survived.view(count, each).max(1) if count else (scores.new_zeros(0), best)
        return torch.where(top >= 0, place, best)


def assign_instances(
    rois: Tensor, truth: Tensor, labels: Tensor, *, threshold: float, background: int
) -> tuple[Tensor, Tensor]:
    """Instance-level assignment: a proposal is positive if its IoU with its own instance's box is above ``threshold``.

    Parameters
    ----------
    rois, truth, labels
        (I, G, 4), (I, 4) and int64 (I,).
    background
        Label of the others.

    Returns
    -------
    tuple
        Labels int64 (I, G), and which are positive, bool (I, G).
    """
    positive = paired_iou(rois, truth[:, None]) > threshold
    return torch.where(positive, labels[:, None], background), positive


register_vision_models(GroupRCNN, CONFIGS, {
    "group_rcnn_r50": "Group R-CNN, ResNet-50, 80 classes, 131.8 M parameters.",
    "group_rcnn_small": "Group R-CNN on a quarter-width ResNet-18, one class: for training in minutes.",
})  # fmt: skip


class ImagePart(nn.Module):
    """What a Group R-CNN computes of images (B, 3, H, W) alone, before points come in: outputs of the dense head, and the maps
    that boxes are pooled from.

    It can be exported and pruned where the whole cannot (how many proposals there are depends on values): give it to
    `algo.fisher.FisherPruner` and train the detector itself, whose modules these are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        detector = cast(GroupRCNN, self.model)
        levels = detector.extract(images)
        return detector.head(levels), detector.project(levels)


_BEFORE = "MACs and activations of the part before the points, which decide the rest"
describe_models(
    ("group_rcnn_r50",),
    ModelInfo(family="Group R-CNN", paper="2205.05920", inputs=image_input(3, 800, 1066), counted=ImagePart, note=_BEFORE),
    {
        "group_rcnn_r50": Published(
            source="sum over the parts of jshilong/GroupRCNN at 5e9fe03", parameters=131_782_451, note="the paper gives none"
        ),
    },
)
describe_models(
    ("group_rcnn_small",),
    ModelInfo(
        family="Group R-CNN", paper="2205.05920", inputs=image_input(3, 128), counted=ImagePart,
        note=f"ours, for tests; {_BEFORE}",
    ),
)  # fmt: skip
