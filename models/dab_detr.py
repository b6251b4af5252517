"""DAB-DETR: queries are anchor boxes, whose size modulates where the decoder looks.

Ref: S. Liu et al., DAB-DETR: Dynamic Anchor Boxes, arXiv 2201.12329, sections 4.2 to 4.4 and figure 6.
Float outputs equal ``transformers.DabDetrForObjectDetection`` with the same weights; Hugging Face key names load.

Shapes: B images, Q queries, S cells of the feature map, C hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.detection import DetectionCriterion, Detector, DetectorOutput, Level, Prediction, resize_mask
from models.detr import Attention, DetrConfig, FeedForward, Mlp, build_detector, check_detector, detector_backbone
from models.info import ModelInfo, Published, image
from models.matcher import BoxMatcher
from models.position import encode_coordinates, inverse_sigmoid, sine_position
from models.registry import describe_models
from models.vision import register_vision_models

__all__ = ["CONFIGS", "DabDetr", "DabDetrConfig"]


@dataclass(frozen=True, kw_only=True)
class DabDetrConfig(DetrConfig):
    """Sizes of a DAB-DETR; see `CONFIGS` for the published ones. ``temperature`` is of the encoding of the cells' places."""

    queries: int = 300
    temperature: float = 20.0

    def __post_init__(self) -> None:
        check_detector(self)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, not {self.temperature!r}")


CONFIGS = {
    "dab_detr_r50": DabDetrConfig(),
    "dab_detr_tiny": DabDetrConfig(
        backbone="resnet18", width=16, frozen_norm=False, num_classes=1, queries=60, hidden=64, heads=4, ffn=128,
        encoder_layers=2, decoder_layers=3, dropout=0.0,
    ),
}  # fmt: skip


class DabEncoderLayer(nn.Module):
    """Self-attention over the cells, normalised after each residual: (B, S, C) -> (B, S, C)."""

    def __init__(self, config: DabDetrConfig) -> None:
        super().__init__()
        self.attention = Attention(config.hidden, config.heads)
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.mlp = FeedForward(config.hidden, config.ffn, dropout=config.dropout, activation=nn.PReLU())
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position: Tensor, allowed: Tensor) -> Tensor:
        placed = x + position
        x = self.attention_norm(x + self.dropout(self.attention(placed, placed, x, allowed)))
        return self.norm(x + self.dropout(self.mlp(x)))


class AnchorSelfAttention(nn.Module):
    """Attention among the queries, content and position projected apart: (B, Q, C) -> (B, Q, C)."""

    def __init__(self, config: DabDetrConfig) -> None:
        super().__init__()
        self.heads = config.heads
        hidden = config.hidden
        self.query_content, self.query_pos = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.key_content, self.key_pos = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.value, self.output = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        query = self.query_content(x) + self.query_pos(position)
        key = self.key_content(x) + self.key_pos(position)
        parts = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, self.value(x)))
        return self.output(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class AnchorCrossAttention(nn.Module):
    """Attention to the cells, content and place side by side in each head: (B, Q, C) and (B, S, C) -> (B, Q, C).

    Only the first layer adds the projected position of the query to its content.
    """

    def __init__(self, config: DabDetrConfig, *, first: bool) -> None:
        super().__init__()
        self.heads = config.heads
        hidden = config.hidden
        self.query_content, self.query_pos_sine = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.query_pos = nn.Linear(hidden, hidden) if first else None
        self.key_content, self.key_pos = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.value, self.output = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, position: Tensor, sine: Tensor, memory: Tensor, place: Tensor, allowed: Tensor) -> Tensor:
        query, key, where = self.query_content(x), self.key_content(memory), self.key_pos(place)
        if self.query_pos is not None:
            query, key = query + self.query_pos(position), key + where
        split = lambda part: part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query = torch.cat([split(query), split(self.query_pos_sine(sine))], -1)
        key = torch.cat([split(key), split(where)], -1)
        mixed = F.scaled_dot_product_attention(query, key, split(self.value(memory)), attn_mask=allowed)
        return self.output(mixed.transpose(1, 2).flatten(2))


class DabDecoderLayer(nn.Module):
    """Attention among the queries, then to the cells, normalised after each residual: (B, Q, C) -> (B, Q, C)."""

    def __init__(self, config: DabDetrConfig, *, first: bool) -> None:
        super().__init__()
        self.self_attention = AnchorSelfAttention(config)
        self.self_norm = nn.LayerNorm(config.hidden)
        self.cross_attention = AnchorCrossAttention(config, first=first)
        self.cross_norm = nn.LayerNorm(config.hidden)
        self.mlp = FeedForward(config.hidden, config.ffn, dropout=config.dropout, activation=nn.PReLU())
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position: Tensor, sine: Tensor, memory: Tensor, place: Tensor, allowed: Tensor) -> Tensor:
        x = self.self_norm(x + self.dropout(self.self_attention(x, position)))
        x = self.cross_norm(x + self.dropout(self.cross_attention(x, position, sine, memory, place, allowed)))
        return self.norm(x + self.dropout(self.mlp(x)))


class DabDetr(Detector):
    """Backbone, 1x1 convolution, encoder, decoder over anchor boxes, two heads; see `Detector` for its use."""

    def __init__(self, config: DabDetrConfig) -> None:
        super().__init__()
        self.config, self.num_classes = config, config.num_classes
        self.criterion = DetectionCriterion(matcher=BoxMatcher(focal=True, class_weight=2.0), class_weight=2.0)
        hidden = config.hidden
        self.backbone, channels = detector_backbone(config, (4,))
        self.project = nn.Conv2d(channels[-1], hidden, 1)
        self.encoder = nn.ModuleList(DabEncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder_scale = Mlp(hidden, hidden, hidden, 2)
        self.decoder = nn.ModuleList(DabDecoderLayer(config, first=number == 0) for number in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(hidden)
        self.query_scale = Mlp(hidden, hidden, hidden, 2)
        self.query_position = Mlp(2 * hidden, hidden, hidden, 2)
        self.anchor_size = Mlp(hidden, hidden, 2, 2)
        self.queries = nn.Embedding(config.queries, 4)  # logits of cxcywh
        self.class_head = nn.Linear(hidden, config.num_classes)
        self.box_head = Mlp(hidden, hidden, 4, 3)
        for part in (self.encoder, self.decoder):
            for weight in part.parameters():
                if weight.ndim > 1:
                    nn.init.xavier_uniform_(weight)
        nn.init.constant_(self.class_head.bias, -math.log(99))  # objects are rare: 1 %
        nn.init.zeros_(self.box_head.last.weight)
        nn.init.zeros_(self.box_head.last.bias)

    def extract(self, images: Tensor, mask: Tensor) -> list[Level]:
        features = self.project(self.backbone(images)[-1])
        return [Level(features, resize_mask(mask, features.shape[-2:]))]

    def detect(self, levels: Sequence[Level]) -> DetectorOutput:
        ((features, mask),) = levels
        place = sine_position(mask, self.config.hidden, temperature=self.config.temperature).to(features.dtype)
        place, memory = place.flatten(2).transpose(1, 2), features.flatten(2).transpose(1, 2)
        allowed = mask.flatten(1)[:, None, None]
        for layer in self.encoder:
            memory = layer(memory, place * self.encoder_scale(memory), allowed)
        return DetectorOutput(tuple(self._decode(memory, place, allowed)))

    def _decode(self, memory: Tensor, place: Tensor, allowed: Tensor) -> list[Prediction]:
        anchor = before = self.queries.weight.sigmoid().expand(len(memory), -1, -1)
        x, predictions = memory.new_zeros(*anchor.shape[:2], self.config.hidden), []
        for number, layer in enumerate(self.decoder):
            encoded = encode_coordinates(anchor[..., [1, 0, 2, 3]], self.config.hidden // 2)
            sine = self._modulated(encoded[..., : self.config.hidden], x, anchor, first=number == 0)
            x = layer(x, self.query_position(encoded), sine, memory, place, allowed)
            answer = self.decoder_norm(x)
            boxes = (self.box_head(answer) + inverse_sigmoid(before)).sigmoid()
            predictions.append(Prediction(self.class_head(answer), boxes))
            # the anchors move by the layer's raw output, the predictions come from the normed one, as the authors have it
            before = (self.box_head(x) + inverse_sigmoid(anchor)).sigmoid()
            anchor = before.detach()
        return predictions

    def _modulated(self, sine: Tensor, x: Tensor, anchor: Tensor, *, first: bool) -> Tensor:
        """Encodings of the centre, y then x, scaled by the content, and by its wanted size over the anchor's (eq. 6)."""
        if not first:
            sine = sine * self.query_scale(x)
        width, height = (self.anchor_size(x).sigmoid() / anchor[..., 2:]).unbind(-1)
        return sine * torch.stack([height, width], -1).repeat_interleave(self.config.hidden // 2, -1)


register_vision_models(DabDetr, CONFIGS, {
    "dab_detr_r50": "DAB-DETR with ResNet-50, 43.7 M parameters.",
    "dab_detr_tiny": "DAB-DETR on a ResNet-18 of a quarter of the width, 60 queries, one class.",
}, build=build_detector)  # fmt: skip


describe_models(
    ("dab_detr_r50",),
    ModelInfo(family="DAB-DETR", paper="2201.12329", inputs=image(3, 800, 1066)),
    {"dab_detr_r50": Published(source="transformers 5.23.0, DabDetrForObjectDetection", parameters=43_671_517)},
)
describe_models(
    ("dab_detr_tiny",), ModelInfo(family="DAB-DETR", paper="2201.12329", inputs=image(3, 128), note="ours, for tests")
)
