"""DETR: a transformer that turns learned queries into a set of objects.

Ref: N. Carion et al., End-to-End Object Detection with Transformers, arXiv 2005.12872, figure 10 and section A.4. Float
outputs equal ``transformers.DetrForObjectDetection`` with the same weights; Hugging Face key names load. Losses are taken after
every decoder layer, through one norm and one pair of heads, without changing what the next layer reads.

Shapes: B images, Q queries, S cells of the feature map, C hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone, build_backbone
from models.checks import check_positive
from models.detection import DetectionCriterion, Detector, DetectorOutput, Level, Prediction, resize_mask
from models.feataug import Copies
from models.huggingface import rename_detector
from models.info import ModelInfo, Published, image
from models.position import sine_position
from models.registry import describe_models
from models.vision import build_vision_model, register_vision_models

__all__ = ["CONFIGS", "Attention", "Detr", "DetrConfig", "FeedForward", "Mlp", "build_detector", "check_detector"]


def check_detector(config: Any) -> None:
    """Refuse sizes that no detector of the family has; the message names the field."""
    check_positive(config, zero=("frozen_stages", "many_queries"))
    if config.hidden % config.heads or config.hidden % 4:
        raise ValueError(f"hidden must be a multiple of 4 and of heads, not {config.hidden} with {config.heads} heads")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {config.dropout!r}")


@dataclass(frozen=True, kw_only=True)
class DetrConfig:
    """Sizes of a DETR; see `CONFIGS` for the published ones.

    ``backbone`` is a name of `models.backbone.build_backbone`; ``width``, ``frozen_norm`` and ``frozen_stages`` are its options.
    ``num_classes`` does not count "no object".
    """

    backbone: str = "resnet50"
    width: int | None = None
    frozen_norm: bool = True
    frozen_stages: int = 0
    num_classes: int = 91
    queries: int = 100
    hidden: int = 256
    heads: int = 8
    ffn: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_detector(self)


CONFIGS = {
    "detr_r50": DetrConfig(),
    "detr_tiny": DetrConfig(
        backbone="resnet18", width=16, frozen_norm=False, num_classes=1, queries=40, hidden=64, heads=4, ffn=128,
        encoder_layers=2, decoder_layers=3, dropout=0.0,
    ),
}


class Attention(nn.Module):
    """Multi-head attention: queries (B, Q, C), keys and values (B, S, C) -> (B, Q, C).

    ``allowed`` is bool, broadcast to (B, heads, Q, S): False where a query may not look.
    """

    def __init__(self, hidden: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = split(self.query(query)), split(self.key(key)), split(self.value(value))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with an activation between, ReLU unless another is given: (B, S, C) -> (B, S, C)."""

    def __init__(self, hidden: int, inner: int, *, dropout: float = 0.0, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, inner)
        self.activation = nn.ReLU() if activation is None else activation
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.activation(self.up(x))))


class Mlp(nn.Module):
    """Linear layers with ReLU between: (..., inputs) -> (..., outputs)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int) -> None:
        super().__init__()
        sizes = [inputs] + [hidden] * (depth - 1) + [outputs]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in zip(sizes, sizes[1:]))

    @property
    def last(self) -> nn.Linear:
        """The last layer."""
        return cast(nn.Linear, self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.last(x)


class EncoderLayer(nn.Module):
    """Self-attention over the cells, normalised after each residual: (B, S, C) -> (B, S, C)."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.attention = Attention(config.hidden, config.heads, dropout=config.dropout)
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.mlp = FeedForward(config.hidden, config.ffn, dropout=config.dropout)
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position: Tensor, allowed: Tensor) -> Tensor:
        placed = x + position
        x = self.attention_norm(x + self.dropout(self.attention(placed, placed, x, allowed)))
        return self.norm(x + self.dropout(self.mlp(x)))


class DecoderLayer(nn.Module):
    """Attention among the queries, then to the cells, normalised after each residual: (B, Q, C) -> (B, Q, C)."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.self_attention = Attention(config.hidden, config.heads, dropout=config.dropout)
        self.self_norm = nn.LayerNorm(config.hidden)
        self.cross_attention = Attention(config.hidden, config.heads, dropout=config.dropout)
        self.cross_norm = nn.LayerNorm(config.hidden)
        self.mlp = FeedForward(config.hidden, config.ffn, dropout=config.dropout)
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, query: Tensor, memory: Tensor, position: Tensor, allowed: Tensor) -> Tensor:
        placed = x + query
        x = self.self_norm(x + self.dropout(self.self_attention(placed, placed, x)))
        seen = self.cross_attention(x + query, memory + position, memory, allowed)
        x = self.cross_norm(x + self.dropout(seen))
        return self.norm(x + self.dropout(self.mlp(x)))


class Detr(Detector):
    """Backbone, 1x1 convolution, encoder, decoder, two heads; see `Detector` for its use."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.config, self.num_classes = config, config.num_classes
        self.criterion = DetectionCriterion()
        self.backbone, channels = detector_backbone(config, (4,))
        self.project = nn.Conv2d(channels[-1], config.hidden, 1)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(config.hidden)
        self.queries = nn.Embedding(config.queries, config.hidden)
        self.class_head = nn.Linear(config.hidden, config.num_classes + 1)
        self.box_head = Mlp(config.hidden, config.hidden, 4, 3)
        for part in (self.encoder, self.decoder):
            for weight in part.parameters():
                if weight.ndim > 1:
                    nn.init.xavier_uniform_(weight)

    def extract(self, images: Tensor, mask: Tensor) -> list[Level]:
        features = self.project(self.backbone(images)[-1])
        return [Level(features, resize_mask(mask, features.shape[-2:]))]

    def detect(self, levels: Sequence[Level]) -> DetectorOutput:
        ((features, mask),) = levels
        position = sine_position(mask, self.config.hidden).to(features.dtype).flatten(2).transpose(1, 2)
        memory, allowed = features.flatten(2).transpose(1, 2), mask.flatten(1)[:, None, None]
        for layer in self.encoder:
            memory = layer(memory, position, allowed)
        query = self.queries.weight.expand(len(memory), -1, -1)
        x, predictions = query.new_zeros(query.shape), []
        for layer in self.decoder:
            x = layer(x, query, memory, position, allowed)
            answer = self.decoder_norm(x)
            predictions.append(Prediction(self.class_head(answer), self.box_head(answer).sigmoid()))
        return DetectorOutput(tuple(predictions))


def detector_backbone(config: Any, stages: Sequence[int]) -> tuple[nn.Module, tuple[int, ...]]:
    """The backbone that a configuration asks for, and the channels of its maps."""
    backbone = build_backbone(
        config.backbone, stages=stages, width=config.width, frozen_norm=config.frozen_norm, frozen_stages=config.frozen_stages
    )
    return backbone, cast(Backbone, backbone).channels


def build_detector(
    name: str,
    kind: Callable[[Any], Detector],
    config: Any,
    pretrained: bool | str | Path,
    overrides: dict[str, Any],
) -> Detector:
    """`build_vision_model` for detectors: ``overrides`` may hold ``feataug`` or ``dataaug``, names of the copies as
    `models.feataug.Copies` takes them.

    Raises
    ------
    ValueError
        As `build_vision_model`; or both are given.
    """
    augmentations = {key: overrides[key] for key in ("feataug", "dataaug") if overrides.get(key) is not None}
    if len(augmentations) > 1:
        raise ValueError("give feataug or dataaug, not both")
    rename = lambda state, own: dict(state) if set(own) <= set(state) else rename_detector(state, own)
    detector = build_vision_model(name, kind, config, pretrained, overrides, rename=rename, options=("feataug", "dataaug"))
    for where, copies in augmentations.items():
        detector.augmentation = Copies(copies=copies, features=where == "feataug")
    return detector


register_vision_models(Detr, CONFIGS, {
    "detr_r50": "DETR with ResNet-50, 41.5 M parameters.",
    "detr_tiny": "DETR on a ResNet-18 of a quarter of the width, 40 queries, one class: trains in minutes on a CPU.",
}, build=build_detector)  # fmt: skip


describe_models(
    ("detr_r50",),
    ModelInfo(family="DETR", paper="2005.12872", inputs=image(3, 800, 1066)),
    {
        "detr_r50": (
            Published(source="transformers 5.23.0, DetrForObjectDetection", parameters=41_524_768),
            Published(
                source="the paper, table 1", parameters=41_000_000, macs=86_000_000_000, within=0.08,
                note="mean of COCO images, here one of 4:3",
            ),
        ),
    },
)  # fmt: skip
describe_models(("detr_tiny",), ModelInfo(family="DETR", paper="2005.12872", inputs=image(3, 128), note="ours, for tests"))
