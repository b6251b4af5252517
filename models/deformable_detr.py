"""Deformable-DETR with box refinement and two stages, and H-Deformable-DETR with hybrid matching.

Ref: X. Zhu et al., Deformable DETR, arXiv 2010.04159; D. Jia et al., DETRs with Hybrid Matching, arXiv 2207.13080, section 3.2;
H. Zhang et al., DINO, arXiv 2203.03605, sections 3.4 and 3.5 (mixed query selection, look forward twice). Float outputs equal
``transformers.DeformableDetrForObjectDetection`` with the same weights; Hugging Face key names load.

Where the authors' code and the published count differ the default follows the count: with ``refine`` alone all layers share a
class head (40.73 M parameters, as transformers has it); the authors' code gives each its own (``share_class_head=False``).

Shapes: B images, Q queries, S cells of all L maps one after the other, C hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from models.deformable_attention import DeformableAttention
from models.detection import DetectionCriterion, Detector, DetectorOutput, Level, Prediction, resize_mask
from models.detr import Attention, DetrConfig, FeedForward, Mlp, build_detector, check_detector, detector_backbone
from models.info import ModelInfo, Published, image
from models.matcher import BoxMatcher
from models.position import encode_coordinates, inverse_sigmoid, sine_position
from models.registry import describe_models
from models.vision import register_vision_models

__all__ = ["CONFIGS", "DeformableDetr", "DeformableDetrConfig"]


@dataclass(frozen=True, kw_only=True)
class DeformableDetrConfig(DetrConfig):
    """Sizes and variants of a Deformable-DETR; see `CONFIGS` for the published ones.

    ``refine``: every decoder layer corrects the boxes of the one before. ``two_stage``: the queries are the encoder's best
    proposals. ``mixed_selection``: only their positions are, contents are learned. ``look_twice``: the gradient of a layer's
    boxes reaches the layer before. ``many_queries`` more queries, in training, are matched one-to-many.
    ``share_class_head``: None is True without two stages. ``norm_groups`` is of the projections of the feature maps.
    """

    queries: int = 300
    many_queries: int = 0
    ffn: int = 1024
    levels: int = 4
    points: int = 4
    norm_groups: int = 32
    refine: bool = False
    two_stage: bool = False
    mixed_selection: bool = False
    look_twice: bool = False
    share_class_head: bool | None = None

    def __post_init__(self) -> None:
        check_detector(self)
        if self.hidden % self.norm_groups:
            raise ValueError(f"hidden must be a multiple of norm_groups, not {self.hidden} with {self.norm_groups} groups")
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine=True: proposals are boxes that the layers refine")
        if self.mixed_selection and not self.two_stage:
            raise ValueError("mixed_selection chooses among proposals: give two_stage=True")
        if self.look_twice and not self.refine:
            raise ValueError("look_twice is about refined boxes: give refine=True")
        if self.two_stage and self.share_class_head:
            raise ValueError("with two_stage each layer and the encoder have their own class head")


_TWO_STAGE = DeformableDetrConfig(refine=True, two_stage=True)
_TRICKS = replace(_TWO_STAGE, ffn=2048, dropout=0.0, mixed_selection=True, look_twice=True)
_TINY = DeformableDetrConfig(
    backbone="resnet18", width=16, frozen_norm=False, num_classes=1, queries=60, hidden=64, heads=4, ffn=128, encoder_layers=2,
    decoder_layers=3, levels=3, norm_groups=8, dropout=0.0, refine=True, look_twice=True,
)  # fmt: skip

CONFIGS = {
    "deformable_detr_r50": DeformableDetrConfig(),
    "deformable_detr_r50_refine": DeformableDetrConfig(refine=True),
    "deformable_detr_r50_two_stage": _TWO_STAGE,
    "deformable_detr_r50_tricks": _TRICKS,
    "h_deformable_detr_r50": replace(_TRICKS, many_queries=1500),
    "deformable_detr_tiny": _TINY,
    "h_deformable_detr_tiny": replace(_TINY, two_stage=True, mixed_selection=True, many_queries=120),
}


class DeformableEncoderLayer(nn.Module):
    """Each cell looks around its own place in every map: (B, S, C) -> (B, S, C)."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        self.attention = _attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.mlp = FeedForward(config.hidden, config.ffn, dropout=config.dropout)
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, sizes: Sequence[tuple[int, int]], inside: Tensor) -> Tensor:
        seen = self.attention(x + position, reference, x, sizes, inside)
        x = self.attention_norm(x + self.dropout(seen))
        return self.norm(x + self.dropout(self.mlp(x)))


class DeformableDecoderLayer(nn.Module):
    """Attention among the queries, then around their references: (B, Q, C) -> (B, Q, C)."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        self.self_attention = Attention(config.hidden, config.heads, dropout=config.dropout)
        self.self_norm = nn.LayerNorm(config.hidden)
        self.cross_attention = _attention(config)
        self.cross_norm = nn.LayerNorm(config.hidden)
        self.mlp = FeedForward(config.hidden, config.ffn, dropout=config.dropout)
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        sizes: Sequence[tuple[int, int]],
        inside: Tensor,
        allowed: Tensor | None,
    ) -> Tensor:
        placed = x + query
        x = self.self_norm(x + self.dropout(self.self_attention(placed, placed, x, allowed)))
        seen = self.cross_attention(x + query, reference, memory, sizes, inside)
        x = self.cross_norm(x + self.dropout(seen))
        return self.norm(x + self.dropout(self.mlp(x)))


class DeformableDetr(Detector):
    """Backbone, projections, deformable encoder and decoder, heads of every layer; see `Detector` for its use."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        self.config, self.num_classes = config, config.num_classes
        self.criterion = DetectionCriterion(matcher=BoxMatcher(focal=True, class_weight=2.0), class_weight=2.0)
        hidden = config.hidden
        stages = tuple(range(4 - min(config.levels, 3) + 1, 5))
        self.backbone, channels = detector_backbone(config, stages)
        self.project = _projections(config, channels)
        self.level_embed = nn.Parameter(torch.empty(config.levels, hidden))
        self.encoder = nn.ModuleList(DeformableEncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DeformableDecoderLayer(config) for _ in range(config.decoder_layers))
        total = config.queries + config.many_queries
        if not config.two_stage:
            self.queries = nn.Embedding(total, 2 * hidden)  # position and content
            self.reference_points = nn.Linear(hidden, 2)
        else:
            if config.mixed_selection:
                self.queries = nn.Embedding(total, hidden)  # content
            self.proposal, self.proposal_norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
            # with mixed selection half of its outputs are never read; the published count has them
            self.proposal_position, self.proposal_position_norm = nn.Linear(2 * hidden, 2 * hidden), nn.LayerNorm(2 * hidden)
        heads = config.decoder_layers + config.two_stage
        shared = not config.two_stage if config.share_class_head is None else config.share_class_head
        self.class_head = nn.ModuleList(_class_head(config) for _ in range(1 if shared else heads))
        self.box_head = nn.ModuleList(_box_head(config, number) for number in range(heads if config.refine else 1))
        self._initialise()

    def _initialise(self) -> None:
        """As the authors; heads and projections have their values already."""
        for part in (self.encoder, self.decoder):
            for name, weight in part.named_parameters():
                if weight.ndim > 1 and "sampling_offsets" not in name and "attention_weights" not in name:
                    nn.init.xavier_uniform_(weight)
        nn.init.normal_(self.level_embed)
        if not self.config.two_stage:
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def extract(self, images: Tensor, mask: Tensor) -> list[Level]:
        maps = self.backbone(images)
        features = [project(part) for project, part in zip(self.project, maps)]
        last = maps[-1]
        for project in self.project[len(maps) :]:
            last = project(last)
            features.append(last)
        return [Level(part, resize_mask(mask, part.shape[-2:])) for part in features]

    def detect(self, levels: Sequence[Level]) -> DetectorOutput:
        sizes = [(level.mask.shape[1], level.mask.shape[2]) for level in levels]
        inside = torch.cat([level.mask.flatten(1) for level in levels], 1)
        valid = torch.stack([_valid_ratio(level.mask) for level in levels], 1).to(levels[0].features.dtype)  # (B, L, 2)
        memory = self._encode(levels, sizes, inside, valid)
        count = self.config.queries + (self.config.many_queries if self.training else 0)
        content, query, reference, proposals = self._queries(memory, inside, levels, count)
        allowed = _groups(count, self.config.queries, memory.device) if count > self.config.queries else None
        layers = self._decode(content, query, reference, memory, sizes, inside, valid, allowed)
        one = self.config.queries
        cut = lambda start, stop: tuple(Prediction(logits[:, start:stop], boxes[:, start:stop]) for logits, boxes in layers)
        return DetectorOutput(cut(0, one), proposals, cut(one, count) if count > one else ())

    def _encode(self, levels: Sequence[Level], sizes: list[tuple[int, int]], inside: Tensor, valid: Tensor) -> Tensor:
        """Cells of all maps after the encoder (B, S, C)."""
        memory = torch.cat([level.features.flatten(2).transpose(1, 2) for level in levels], 1)
        positions = [
            sine_position(level.mask, self.config.hidden, offset=-0.5).to(memory.dtype).flatten(2).transpose(1, 2) + embed
            for level, embed in zip(levels, self.level_embed)
        ]
        centres = [_centres(size, ratio) for size, ratio in zip(sizes, valid.unbind(1))]
        reference = torch.cat(centres, 1)[:, :, None] * valid[:, None]  # (B, S, L, 2)
        position = torch.cat(positions, 1)
        for layer in self.encoder:
            memory = layer(memory, position, reference, sizes, inside)
        return memory

    def _queries(
        self, memory: Tensor, inside: Tensor, levels: Sequence[Level], count: int
    ) -> tuple[Tensor, Tensor, Tensor, Prediction | None]:
        """Content and position (B, Q, C) of the queries, logits of their references (B, Q, 2 or 4), and all proposals."""
        batch = len(memory)
        if not self.config.two_stage:
            query, content = (part.expand(batch, -1, -1) for part in self.queries.weight[:count].chunk(2, 1))
            return content, query, self.reference_points(query), None
        logits, boxes = self._propose(memory, inside, levels)
        if logits.shape[1] < count:
            raise ValueError(
                f"{logits.shape[1]} cells of the feature maps cannot give {count} proposals: use larger images or fewer queries"
            )
        best = logits[..., 0].topk(count, 1).indices[..., None].expand(-1, -1, 4)
        reference = boxes.gather(1, best).detach()
        encoded = encode_coordinates(reference.sigmoid(), self.config.hidden // 2)
        query, content = self.proposal_position_norm(self.proposal_position(encoded)).chunk(2, -1)
        if self.config.mixed_selection:
            content = self.queries.weight[:count].expand(batch, -1, -1)
        return content, query, reference, Prediction(logits, boxes.sigmoid())

    def _propose(self, memory: Tensor, inside: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
        """A class and a box for each cell: logits (B, S, classes) and (B, S, 4); padding and the rim have infinite boxes."""
        start = torch.cat([_cell_boxes(level.mask, number) for number, level in enumerate(levels)], 1).to(memory.dtype)
        usable = inside & ((start > 0.01) & (start < 0.99)).all(-1)
        start = torch.log(start / (1 - start)).masked_fill(~usable[..., None], math.inf)
        cells = self.proposal_norm(self.proposal(memory.masked_fill(~usable[..., None], 0.0)))
        return self.class_head[-1](cells), self.box_head[-1](cells) + start

    def _decode(
        self,
        x: Tensor,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        sizes: list[tuple[int, int]],
        inside: Tensor,
        valid: Tensor,
        allowed: Tensor | None,
    ) -> list[Prediction]:
        """Predictions after each layer; ``reference`` holds logits."""
        reference = before = reference.sigmoid()
        predictions = []
        for number, layer in enumerate(self.decoder):
            scale = valid if reference.shape[-1] == 2 else valid.repeat(1, 1, 2)
            x = layer(x, query, reference[:, :, None] * scale[:, None], memory, sizes, inside, allowed)
            change = self._head(self.box_head, number)(x)
            boxes = _moved(change, before).sigmoid()
            predictions.append(Prediction(self._head(self.class_head, number)(x), boxes))
            if self.config.refine:
                # no gradient enters the reference through the attention; through the next box it may
                before = _moved(change, reference).sigmoid() if self.config.look_twice else boxes.detach()
                reference = before.detach()
        return predictions

    @staticmethod
    def _head(heads: nn.ModuleList, number: int) -> nn.Module:
        return heads[number if len(heads) > 1 else 0]


def _attention(config: DeformableDetrConfig) -> DeformableAttention:
    return DeformableAttention(config.hidden, heads=config.heads, levels=config.levels, points=config.points)


def _projections(config: DeformableDetrConfig, channels: Sequence[int]) -> nn.ModuleList:
    """1x1 convolutions of the backbone's maps, then 3x3 ones of stride 2 that add coarser maps."""
    projections = nn.ModuleList()
    for number in range(config.levels):
        if number < len(channels):
            convolution = nn.Conv2d(channels[number], config.hidden, 1)
        else:
            inputs = channels[-1] if number == len(channels) else config.hidden
            convolution = nn.Conv2d(inputs, config.hidden, 3, 2, padding=1)
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(cast(Tensor, convolution.bias))
        projections.append(nn.Sequential(convolution, nn.GroupNorm(config.norm_groups, config.hidden)))
    return projections


def _class_head(config: DeformableDetrConfig) -> nn.Linear:
    """Objects are rare at first: 1 %."""
    head = nn.Linear(config.hidden, config.num_classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


def _box_head(config: DeformableDetrConfig, number: int) -> Mlp:
    """Boxes stay where they are at first; those that start from points have sides of 12 % of the image."""
    head = Mlp(config.hidden, config.hidden, 4, 3)
    nn.init.zeros_(head.last.weight)
    nn.init.zeros_(head.last.bias)
    if number == 0 and not config.two_stage:
        nn.init.constant_(head.last.bias[2:], -2.0)
    return head


def _valid_ratio(mask: Tensor) -> Tensor:
    """Width and height of the image in its map: (B, H, W) -> fractions (B, 2)."""
    return torch.stack([mask[:, 0].float().mean(1), mask[:, :, 0].float().mean(1)], -1)


def _grid(size: tuple[int, int], device: torch.device) -> Tensor:
    """Centres of the cells, in cells: (H, W, 2), x first."""
    y, x = (torch.arange(total, dtype=torch.float32, device=device) + 0.5 for total in size)
    return torch.stack([x.expand(size), y[:, None].expand(size)], -1)


def _centres(size: tuple[int, int], valid: Tensor) -> Tensor:
    """Centres of the cells as fractions of the image: (B, H W, 2)."""
    extent = valid * valid.new_tensor([size[1], size[0]])
    return _grid(size, valid.device).to(valid.dtype).flatten(0, 1) / extent[:, None]


def _cell_boxes(mask: Tensor, number: int) -> Tensor:
    """A box around each cell's centre, of one twentieth of the image in the finest map, doubled in each next: (B, H W, 4)."""
    extent = torch.stack([mask[:, 0].sum(1), mask[:, :, 0].sum(1)], -1)
    centres = _grid((mask.shape[1], mask.shape[2]), mask.device).flatten(0, 1) / extent[:, None]
    return torch.cat([centres, torch.full_like(centres, 0.05 * 2.0**number)], -1)


def _moved(change: Tensor, reference: Tensor) -> Tensor:
    """Logits of boxes: a head's output (B, Q, 4), added to a reference point (B, Q, 2) or box (B, Q, 4) in [0, 1]."""
    start = inverse_sigmoid(reference)
    return change + nn.functional.pad(start, (0, 4 - start.shape[-1]))


def _groups(count: int, first: int, device: torch.device) -> Tensor:
    """Which queries may look at which: the first ones and the others keep to themselves; bool (count, count)."""
    group = torch.arange(count, device=device) >= first
    return group[:, None] == group


register_vision_models(DeformableDetr, CONFIGS, {
    "deformable_detr_r50": "Deformable-DETR with ResNet-50, 40.1 M parameters.",
    "deformable_detr_r50_refine": "The same with box refinement, 40.7 M parameters.",
    "deformable_detr_r50_two_stage": "The same in two stages, 41.2 M parameters.",
    "deformable_detr_r50_tricks": "Two stages, mixed query selection, look forward twice, wide: 47.6 M parameters.",
    "h_deformable_detr_r50": "H-Deformable-DETR with ResNet-50, 47.9 M parameters.",
    "deformable_detr_tiny": "Three maps of a ResNet-18 of a quarter of the width, 60 queries: trains in minutes on a CPU.",
    "h_deformable_detr_tiny": "The same in two stages, with 120 more queries matched one-to-many.",
}, build=build_detector)  # fmt: skip


_COUNTED = "transformers 5.23.0, DeformableDetrForObjectDetection"
describe_models(
    ("deformable_detr_r50", "deformable_detr_r50_refine", "deformable_detr_r50_two_stage", "deformable_detr_r50_tricks"),
    ModelInfo(family="Deformable-DETR", paper="2010.04159", inputs=image(3, 800, 1066)),
    {
        "deformable_detr_r50": (
            Published(source=_COUNTED, parameters=40_069_665),
            Published(
                source="the authors' README", parameters=40_000_000, macs=173_000_000_000, within=0.08,
                note="mean of COCO images, here one of 4:3",
            ),
        ),
        "deformable_detr_r50_refine": Published(source=_COUNTED, parameters=40_732_725),
        "deformable_detr_r50_two_stage": Published(source=_COUNTED, parameters=41_181_529),
        "deformable_detr_r50_tricks": Published(
            source=_COUNTED, parameters=47_562_073, note="two stages, ffn 2048: 47,485,273 there; and 300 queries of 256"
        ),
    },
)  # fmt: skip
describe_models(
    ("h_deformable_detr_r50",),
    ModelInfo(family="H-Deformable-DETR", paper="2207.13080", inputs=image(3, 800, 1066)),
    {
        "h_deformable_detr_r50": Published(
            source=_COUNTED, parameters=47_946_073, note="two stages, ffn 2048: 47,485,273 there; and 1,800 queries of 256"
        ),
    },
)
describe_models(
    ("deformable_detr_tiny",),
    ModelInfo(family="Deformable-DETR", paper="2010.04159", inputs=image(3, 128), note="ours, for tests"),
)
describe_models(
    ("h_deformable_detr_tiny",),
    ModelInfo(family="H-Deformable-DETR", paper="2207.13080", inputs=image(3, 128), note="ours, for tests"),
)
