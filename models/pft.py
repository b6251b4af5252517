"""Pyramid Fusion Transformer, a reconstruction: decoders on several maps of a pyramid, whose queries exchange what they saw.

The paper's code is not public. From its abstract: queries attend to the maps of each scale in parallel, then cross-scale
inter-query attention exchanges what they found; classes and masks as in MaskFormer. What the abstract leaves open is our choice:

* Scales, from coarse to fine: the backbone's last map, projected as in MaskFormer (stride 32), then the pixel decoder's maps of
  strides 16 and 8. One scale alone is MaskFormer, parameter for parameter.
* A query of each scale starts from zero; its position is the query's embedding, which the scales share, plus the scale's.
* Each scale has its own weights in each layer: self-attention among its queries, attention to its map, feed-forward. The
  cross-scale attention stands before the feed-forward; ``exchange="index"`` lets only the S queries of one index see each other,
  ``"all"`` all S Q of them.
* One norm, one class head and one mask head serve all scales. Class logits are the mean over the scales. Each scale gives masks;
  what is matched and shown is the mean of their logits, while each scale's are trained.
* Attention to the maps is plain; ``masked=True`` confines a query to the inside of its mask of the layer before, as Mask2Former
  does (B. Cheng et al., arXiv 2112.01527, section 3.2.1).

Ref: Z. Qin et al., Pyramid Fusion Transformer for Semantic Segmentation, arXiv 2201.04019 (abstract).

Shapes: B images, S scales, Q queries, C channels, H x W cells of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from models.checks import check_images
from models.detr import Attention, DecoderLayer, DetrConfig
from models.info import ModelInfo, image
from models.maskformer import MaskFormerConfig, MaskOutput, MaskPrediction, Segmenter, place
from models.masks import resize_masks
from models.registry import describe_models
from models.vision import register_vision_models

__all__ = ["CONFIGS", "PFT", "CrossScaleAttention", "PFTConfig", "PyramidLayer"]

Exchange = Literal["index", "all"]


@dataclass(frozen=True, kw_only=True)
class PFTConfig(MaskFormerConfig):
    """Sizes of a Pyramid Fusion Transformer; see `CONFIGS`.

    ``scales`` is how many maps have a decoder, 1 to 3 (strides 32, 16, 8); ``exchange`` and ``masked``: see the module.
    """

    scales: int = 3
    exchange: Exchange = "index"
    masked: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scales > 3:
            raise ValueError(f"scales must be 1 to 3, for strides 32, 16 and 8, not {self.scales}")
        if self.exchange not in get_args(Exchange):
            raise ValueError(f"exchange must be one of {', '.join(get_args(Exchange))}, not {self.exchange!r}")


CONFIGS = {
    "pft_r50": PFTConfig(),
    "pft_swin_tiny": PFTConfig(backbone="swin_tiny"),
    "pft_swin_base": PFTConfig(backbone="swin_base_384"),
    "pft_swin_large": PFTConfig(backbone="swin_large_384"),
    "pft_small": PFTConfig(
        backbone="resnet18", width=16, num_classes=3, queries=24, hidden=64, heads=4, ffn=128, decoder_layers=3, dropout=0.0
    ),
}


class CrossScaleAttention(nn.Module):
    """Attention among the queries of all scales, with residual and norm: (B, S, Q, C) -> (B, S, Q, C).

    Changing the order of scales, or of queries, changes the order of the results and nothing else.
    """

    def __init__(self, hidden: int, heads: int, *, dropout: float = 0.0, exchange: Exchange = "index") -> None:
        super().__init__()
        self.exchange = exchange
        self.attention = Attention(hidden, heads, dropout=dropout)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """``position`` (B, S, Q, C) is added to queries and keys."""
        shape = x.shape
        if self.exchange == "index":  # a sequence of S for each query
            x, position = (value.transpose(1, 2).flatten(0, 1) for value in (x, position))
        else:
            x, position = (value.flatten(1, 2) for value in (x, position))
        placed = x + position
        x = self.norm(x + self.dropout(self.attention(placed, placed, x)))
        return x.view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2) if self.exchange == "index" else x.view(shape)


class ScaleLayer(DecoderLayer):
    """DETR's decoder layer in two halves, so that scales can speak between them; both in turn are `DecoderLayer.forward`."""

    def attend(self, x: Tensor, query: Tensor, memory: Tensor, position: Tensor, allowed: Tensor | None) -> Tensor:
        """Attention among the queries and to the map: (B, Q, C) -> (B, Q, C)."""
        placed = x + query
        x = self.self_norm(x + self.dropout(self.self_attention(placed, placed, x)))
        return self.cross_norm(x + self.dropout(self.cross_attention(x + query, memory + position, memory, allowed)))

    def feed(self, x: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, C)."""
        return self.norm(x + self.dropout(self.mlp(x)))


class PyramidLayer(nn.Module):
    """One decoder layer of every scale: attention to the own map in parallel, across scales, feed-forward."""

    def __init__(self, config: PFTConfig) -> None:
        super().__init__()
        self.scales = nn.ModuleList(ScaleLayer(cast(DetrConfig, config)) for _ in range(config.scales))
        self.across = (
            CrossScaleAttention(config.hidden, config.heads, dropout=config.dropout, exchange=config.exchange)
            if config.scales > 1
            else None
        )

    def forward(
        self, x: Tensor, query: Tensor, maps: Sequence[tuple[Tensor, Tensor]], allowed: Sequence[Tensor | None]
    ) -> Tensor:
        """Queries and their positions (B, S, Q, C), of each scale cells and their positions, and where queries may look."""
        scales = [cast(ScaleLayer, layer) for layer in self.scales]
        seen = [layer.attend(x[:, scale], query[:, scale], *maps[scale], allowed[scale]) for scale, layer in enumerate(scales)]
        x = torch.stack(seen, 1)
        if self.across is not None:
            x = self.across(x, query)
        return torch.stack([layer.feed(x[:, scale]) for scale, layer in enumerate(scales)], 1)


class PFT(Segmenter):
    """The network; see the module for what it is, and `Segmenter` for its use."""

    def __init__(self, config: PFTConfig) -> None:
        super().__init__(config)
        self.masked = config.masked
        self.scale = nn.Embedding(config.scales, config.hidden) if config.scales > 1 else None
        self.decoder = nn.ModuleList(PyramidLayer(config) for _ in range(config.decoder_layers))
        for weight in self.decoder.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)

    def forward(self, images: Tensor) -> MaskOutput:
        check_images(images, 3)
        maps = self.backbone(images)
        pyramid, features = self.pixel_decoder(maps)
        scales = 1 if self.scale is None else self.scale.num_embeddings
        levels = [self.project(maps[-1]), *pyramid[1:scales]]
        placed = [place(level) for level in levels]
        query = self.queries.weight if self.scale is None else self.scale.weight[:, None] + self.queries.weight
        query = query.expand(len(images), scales, *self.queries.weight.shape)
        x, layers = torch.zeros_like(query), [] if not self.masked else [self._predict(torch.zeros_like(query), features)]
        for layer in self.decoder:
            allowed = [_inside(layers[-1], scale, level) if self.masked else None for scale, level in enumerate(levels)]
            x = layer(x, query, placed, allowed)
            layers.append(self._predict(x, features))
        return MaskOutput(tuple(layers[1:] if self.masked else layers))

    def _predict(self, x: Tensor, features: Tensor) -> MaskPrediction:
        """Queries (B, S, Q, C) -> their answers, those of one index taken together."""
        answer = self.decoder_norm(x)
        masks = torch.einsum("bsqc,bchw->bsqhw", self.mask_head(answer), features)
        return MaskPrediction(self.class_head(answer).mean(1), masks.mean(1), masks)


def _inside(prediction: MaskPrediction, scale: int, level: Tensor) -> Tensor:
    """Where each query may look: bool (B, 1, Q, H W), the cells of its mask, or everywhere if that is empty."""
    assert prediction.scales is not None
    inside = resize_masks(prediction.scales[:, scale].detach(), level.shape[-2:]).flatten(2) > 0
    return (inside | ~inside.any(-1, keepdim=True))[:, None]


register_vision_models(PFT, CONFIGS, {
    "pft_r50": "PFT with ResNet-50 and three scales, a reconstruction.",
    "pft_swin_tiny": "PFT with Swin-T and three scales, a reconstruction.",
    "pft_swin_base": "PFT with Swin-B of window 12 and three scales, a reconstruction.",
    "pft_swin_large": "PFT with Swin-L of window 12 and three scales, a reconstruction.",
    "pft_small": "PFT on a ResNet-18 of a quarter of the width, 24 queries, 3 classes: trains in minutes on a CPU.",
})  # fmt: skip


_NOTE = "no figures were published"
describe_models(
    ("pft_r50", "pft_swin_tiny"),
    ModelInfo(family="PFT", paper="2201.04019", inputs=image(3, 512), reconstruction=True, note=_NOTE),
)
describe_models(
    ("pft_swin_base", "pft_swin_large"),
    ModelInfo(family="PFT", paper="2201.04019", inputs=image(3, 640), reconstruction=True, note=_NOTE),
)
describe_models(
    ("pft_small",),
    ModelInfo(family="PFT", paper="2201.04019", inputs=image(3, 64), reconstruction=True, note="ours, for small images"),
)
