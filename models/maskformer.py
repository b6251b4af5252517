"""MaskFormer: a set of masks, each with a class, in place of a class for each pixel.

A backbone and a pixel decoder (a feature pyramid) give features of every fourth pixel; queries that attend to the backbone's last
map give masks, by a product with these features, and their classes.

Ref: B. Cheng et al., Per-Pixel Classification is Not All You Need for Semantic Segmentation, arXiv 2107.06278; the authors'
code, facebookresearch/MaskFormer. Outputs and losses equal ``transformers.MaskFormerForInstanceSegmentation`` with the same
weights, but for the auxiliary predictions: as in the authors' code they go through the decoder's norm, there they do not. Hugging
Face key names load.

Shapes: B images, Q queries, K classes, N masks of an image, C hidden channels, H x W pixels, h x w = H/4 x W/4 (rounded up).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import swin
from models.backbone import Backbone, build_backbone
from models.checks import check_entries, check_images, check_labels, check_pixels, check_positive
from models.detection import object_count
from models.detr import DecoderLayer, DetrConfig, Mlp
from models.huggingface import rename_backbone, rename_detector, renamed
from models.info import ModelInfo, Published, image
from models.losses import check_finite, class_loss, dice_loss, sigmoid_focal_loss
from models.masks import Instances, best_instances, check_masks, instance_masks, resize_masks, semantic_map, semantic_masks
from models.matcher import MaskMatcher
from models.position import sine_position
from models.registry import describe_models
from models.vision import register_vision_models

__all__ = [
    "CONFIGS",
    "MaskCriterion",
    "MaskFormer",
    "MaskFormerConfig",
    "MaskOutput",
    "MaskPrediction",
    "MaskTarget",
    "PixelDecoder",
    "Segmenter",
    "check_mask_targets",
    "place",
]

_GROUPS = 32
"""Groups of the pixel decoder's norms."""


@dataclass(frozen=True, kw_only=True)
class MaskFormerConfig:
    """Sizes of a MaskFormer; see `CONFIGS` for the published ones.

    ``backbone`` is a name of `models.backbone.build_backbone`; ``width``, ``frozen_norm`` and ``frozen_stages`` are its options.
    ``num_classes`` does not count "no object"; 150 is ADE20K's.
    """

    backbone: str = "resnet50"
    width: int | None = None
    frozen_norm: bool = False
    frozen_stages: int = 0
    num_classes: int = 150
    queries: int = 100
    hidden: int = 256
    heads: int = 8
    ffn: int = 2048
    decoder_layers: int = 6
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, zero=("frozen_stages",))
        if self.hidden % self.heads or self.hidden % _GROUPS:
            raise ValueError(f"hidden must be a multiple of {_GROUPS} and of heads, not {self.hidden} with {self.heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout!r}")


CONFIGS = {
    "maskformer_r50": MaskFormerConfig(),
    "maskformer_swin_tiny": MaskFormerConfig(backbone="swin_tiny"),
    "maskformer_swin_base": MaskFormerConfig(backbone="swin_base_384"),
    "maskformer_small": MaskFormerConfig(
        backbone="resnet18", width=16, num_classes=3, queries=24, hidden=64, heads=4, ffn=128, decoder_layers=3, dropout=0.0
    ),
}


@dataclass(frozen=True)
class MaskTarget:
    """The objects of one image: ``labels`` int64 (N,), ``masks`` bool (N, H, W); N may be 0.

    For semantic segmentation an object is all that an image has of a class (`from_semantic`).
    """

    labels: Tensor
    masks: Tensor

    @classmethod
    def from_semantic(cls, labels: Tensor, *, ignore: int = -1) -> MaskTarget:
        """From a semantic map (H, W): one mask for each class that is there, pixels of ``ignore`` in none."""
        return cls(*semantic_masks(labels, ignore=ignore))

    @classmethod
    def from_instances(cls, numbers: Tensor, *, label: int = 0) -> MaskTarget:
        """From a map of instance numbers (H, W), 0 being none, all of one class."""
        masks = instance_masks(numbers)
        return cls(torch.full((len(masks),), label, device=masks.device), masks)


def check_mask_targets(targets: Sequence[MaskTarget], *, images: Tensor, classes: int) -> None:
    """Refuse targets that do not belong to these images (B, 3, H, W) and so many classes.

    Raises
    ------
    TypeError
        Entries that are no `MaskTarget`, labels that are not int64, masks that are not bool.
    ValueError
        Another number of targets than images, labels or masks of a wrong shape or range, or an empty mask; the message has the
        number of the image.
    """
    check_entries(targets, MaskTarget, images=len(images), name="targets")
    for number, target in enumerate(targets):
        check_masks(target.masks, height=images.shape[2], width=images.shape[3], name=f"masks of image {number}")
        check_labels(target.labels, target.masks, classes=classes, image=number, name="masks")


class MaskPrediction(NamedTuple):
    """Answers of the queries.

    Members
    -------
    logits
        Of the classes (B, Q, K + 1), the last being "no object".
    masks
        Logits (B, Q, h, w).
    scales
        Of a pyramid of decoders: the masks of each (B, S, Q, h, w), whose mean ``masks`` is; else None.
    """

    logits: Tensor
    masks: Tensor
    scales: Tensor | None = None


class MaskOutput(NamedTuple):
    """Predictions after each decoder layer; the last are the result."""

    layers: tuple[MaskPrediction, ...]

    @property
    def logits(self) -> Tensor:
        """Class logits of the last layer (B, Q, K + 1)."""
        return self.layers[-1].logits

    @property
    def masks(self) -> Tensor:
        """Mask logits of the last layer (B, Q, h, w)."""
        return self.layers[-1].masks


@dataclass(frozen=True, kw_only=True)
class MaskCriterion:
    """Match every layer's predictions with the objects and sum the losses of classes and masks.

    Masks are matched at the size of the predictions and compared at the size of the image. Sums are divided by the number of
    objects in the batch (at least 1; the mean over the processes where several train together). Defaults are the authors'.
    """

    matcher: MaskMatcher = MaskMatcher()
    class_weight: float = 1.0
    focal_weight: float = 20.0
    dice_weight: float = 1.0
    no_object: float = 0.1

    def __call__(self, output: MaskOutput, targets: Sequence[MaskTarget]) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is what a training minimises.

        Names are ``class``, ``focal`` and ``dice`` for the last layer, with the number of the layer (``dice_0``) for the others.

        Raises
        ------
        ValueError
            Predictions or losses that are not finite.
        """
        losses = self._layer(output.layers[-1], targets)
        for number, layer in enumerate(output.layers[:-1]):
            losses |= {f"{name}_{number}": value for name, value in self._layer(layer, targets).items()}
        check_finite(losses)
        return losses

    def _layer(self, prediction: MaskPrediction, targets: Sequence[MaskTarget]) -> dict[str, Tensor]:
        size = prediction.masks.shape[-2:]
        pairs = [
            self.matcher(logits, masks, target.labels, resize_masks(target.masks, size))
            for logits, masks, target in zip(prediction.logits, prediction.masks, targets)
        ]
        image = torch.cat([torch.full_like(queries, number) for number, (queries, _) in enumerate(pairs)])
        query = torch.cat([queries for queries, _ in pairs])
        labels = torch.cat([target.labels[objects] for target, (_, objects) in zip(targets, pairs)])
        expected = torch.cat([target.masks[objects] for target, (_, objects) in zip(targets, pairs)])
        classes = torch.full(prediction.logits.shape[:2], prediction.logits.shape[-1] - 1, device=labels.device)
        classes[image, query] = labels
        scales = prediction.masks[:, None] if prediction.scales is None else prediction.scales
        focal, dice = self._masks(scales[image, :, query], expected)
        count = object_count(targets, labels.device)
        return {
            "class": self.class_weight * class_loss(prediction.logits, classes, no_object=self.no_object),
            "focal": self.focal_weight * focal / count,
            "dice": self.dice_weight * dice / count,
        }

    @staticmethod
    def _masks(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the matched masks, means over the scales: (M, S, h, w) and (M, H, W) -> two scalars."""
        scales = found.shape[1]
        found = resize_masks(found, expected.shape[-2:])
        expected = expected[:, None].expand_as(found)
        focal = sigmoid_focal_loss(found, expected).mean((2, 3)).sum()
        return focal / scales, dice_loss(found.flatten(0, 1), expected.flatten(0, 1)).sum() / scales


def _normed(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(_GROUPS, outputs)
    )


class PixelDecoder(nn.Module):
    """A feature pyramid: a backbone's maps, finest first -> maps of C channels, coarsest first, and features for the masks.

    Ref: T. Lin et al., Feature Pyramid Networks, arXiv 1612.03144; here with group norms and ReLU.
    """

    def __init__(self, channels: Sequence[int], hidden: int) -> None:
        super().__init__()
        *finer, coarsest = channels
        self.stem = nn.Sequential(*_normed(coarsest, hidden, 3), nn.ReLU())
        self.lateral = nn.ModuleList(_normed(inputs, hidden, 1) for inputs in reversed(finer))
        self.merge = nn.ModuleList(nn.Sequential(*_normed(hidden, hidden, 3), nn.ReLU()) for _ in finer)
        self.mask_features = nn.Conv2d(hidden, hidden, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        x = self.stem(maps[-1])
        pyramid = [x]
        for lateral, merge, finer in zip(self.lateral, self.merge, reversed(maps[:-1])):
            x = merge(F.interpolate(x, size=finer.shape[-2:]) + lateral(finer))
            pyramid.append(x)
        return pyramid, self.mask_features(x)


def place(features: Tensor) -> tuple[Tensor, Tensor]:
    """A map (B, C, H, W) as cells (B, H W, C) and the encoding of their positions (1, H W, C)."""
    inside = torch.ones(1, *features.shape[-2:], dtype=torch.bool, device=features.device)
    position = sine_position(inside, features.shape[1]).to(features.dtype)
    return features.flatten(2).transpose(1, 2), position.flatten(2).transpose(1, 2)


class Segmenter(nn.Module):
    """What networks with a mask for each query share: all but the decoder, which `forward` of a subclass runs.

    Members
    -------
    num_classes
        Classes of objects, "no object" not counted.
    criterion
        What `losses` computes.
    """

    criterion: MaskCriterion

    def __init__(self, config: MaskFormerConfig) -> None:
        super().__init__()
        self.config, self.num_classes = config, config.num_classes
        self.criterion = MaskCriterion()
        self.backbone = build_backbone(
            config.backbone, stages=(1, 2, 3, 4), width=config.width,
            frozen_norm=config.frozen_norm, frozen_stages=config.frozen_stages,
        )  # fmt: skip
        *_, coarsest = channels = cast(Backbone, self.backbone).channels
        self.pixel_decoder = PixelDecoder(channels, config.hidden)
        self.project = nn.Identity() if coarsest == config.hidden else nn.Conv2d(coarsest, config.hidden, 1)
        self.queries = nn.Embedding(config.queries, config.hidden)
        self.decoder_norm = nn.LayerNorm(config.hidden)
        self.class_head = nn.Linear(config.hidden, config.num_classes + 1)
        self.mask_head = Mlp(config.hidden, config.hidden, config.hidden, 3)
        for module in (self.project, *self.pixel_decoder.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> MaskOutput:
        """Images float (B, 3, H, W), normalised as the backbone expects -> predictions of every decoder layer."""
        raise NotImplementedError

    def losses(self, images: Tensor, targets: Sequence[MaskTarget]) -> dict[str, Tensor]:
        """Weighted losses by name of images with known objects; see `MaskCriterion` and `check_mask_targets`.

        A pixel that is not finite is refused, as in `semantic` and `instances`: ValueError with the number of the image.
        """
        check_images(images, 3)
        check_pixels(images)
        check_mask_targets(targets, images=images, classes=self.num_classes)
        return self.criterion(self(images), targets)

    @torch.no_grad()
    def semantic(self, images: Tensor) -> Tensor:
        """The class of each pixel: int64 (B, H, W)."""
        check_images(images, 3)
        check_pixels(images)
        output = self(images)
        return semantic_map(output.logits, output.masks, images.shape[-2:])

    @torch.no_grad()
    def instances(self, images: Tensor, *, threshold: float = 0.5) -> list[Instances]:
        """The objects in each image with a score of at least ``threshold``; see `best_instances`."""
        check_images(images, 3)
        check_pixels(images)
        output = self(images)
        return best_instances(output.logits, output.masks, images.shape[-2:], threshold=threshold)


class MaskFormer(Segmenter):
    """DETR's decoder on the backbone's last map; see `Segmenter` for its use."""

    def __init__(self, config: MaskFormerConfig) -> None:
        super().__init__(config)
        self.decoder = nn.ModuleList(DecoderLayer(cast(DetrConfig, config)) for _ in range(config.decoder_layers))
        for weight in self.decoder.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)

    def forward(self, images: Tensor) -> MaskOutput:
        check_images(images, 3)
        maps = self.backbone(images)
        _, features = self.pixel_decoder(maps)
        memory, position = place(self.project(maps[-1]))
        query = self.queries.weight.expand(len(images), -1, -1)
        x, layers = torch.zeros_like(query), []
        for layer in self.decoder:
            x = layer(x, query, memory, position, None)
            answer = self.decoder_norm(x)
            masks = torch.einsum("bqc,bchw->bqhw", self.mask_head(answer), features)
            layers.append(MaskPrediction(self.class_head(answer), masks))
        return MaskOutput(tuple(layers))


_HUGGINGFACE = (
    (r"^model\.transformer_module\.queries_embedder\.", "queries."),
    (r"^model\.transformer_module\.input_projection\.", "project."),
    (r"^model\.transformer_module\.decoder\.", "decoder."),
    (r"^model\.pixel_level_module\.decoder\.fpn\.stem\.", "pixel_decoder.stem."),
    (r"^model\.pixel_level_module\.decoder\.fpn\.layers\.(\d+)\.proj\.", r"pixel_decoder.lateral.\1."),
    (r"^model\.pixel_level_module\.decoder\.fpn\.layers\.(\d+)\.block\.", r"pixel_decoder.merge.\1."),
    (r"^model\.pixel_level_module\.decoder\.mask_projection\.", "pixel_decoder.mask_features."),
    (r"^mask_embedder\.(\d+)\.0\.", r"mask_head.layers.\1."),
    (r"^class_predictor\.", "class_head."),
)
_ENCODER = "model.pixel_level_module.encoder."
_AUTHORS = (
    (r"^backbone\.stem\.", "backbone."),
    (r"^backbone\.res(\d)\.", lambda found: f"backbone.layer{int(found[1]) - 1}."),
    (r"^(backbone\..*)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"^(backbone\..*)\.shortcut\.", r"\1.downsample.0."),
    (r"^(backbone\..*)conv(\d)\.norm\.", r"\1bn\2."),
    (r"^sem_seg_head\.pixel_decoder\.adapter_(\d)\.norm\.", lambda found: f"pixel_decoder.lateral.{3 - int(found[1])}.1."),
    (r"^sem_seg_head\.pixel_decoder\.adapter_(\d)\.", lambda found: f"pixel_decoder.lateral.{3 - int(found[1])}.0."),
    (r"^sem_seg_head\.pixel_decoder\.layer_4\.norm\.", "pixel_decoder.stem.1."),
    (r"^sem_seg_head\.pixel_decoder\.layer_4\.", "pixel_decoder.stem.0."),
    (r"^sem_seg_head\.pixel_decoder\.layer_(\d)\.norm\.", lambda found: f"pixel_decoder.merge.{3 - int(found[1])}.1."),
    (r"^sem_seg_head\.pixel_decoder\.layer_(\d)\.", lambda found: f"pixel_decoder.merge.{3 - int(found[1])}.0."),
    (r"^sem_seg_head\.pixel_decoder\.mask_features\.", "pixel_decoder.mask_features."),
    (r"^sem_seg_head\.predictor\.transformer\.decoder\.norm\.", "decoder_norm."),
    (r"^sem_seg_head\.predictor\.transformer\.decoder\.layers\.", "decoder."),
    (r"^sem_seg_head\.predictor\.query_embed\.", "queries."),
    (r"^sem_seg_head\.predictor\.input_proj\.", "project."),
    (r"^sem_seg_head\.predictor\.class_embed\.", "class_head."),
    (r"^sem_seg_head\.predictor\.mask_embed\.", "mask_head."),
    (r"^(decoder\.\d+)\.self_attn\.", r"\1.self_attention."),
    (r"^(decoder\.\d+)\.multihead_attn\.", r"\1.cross_attention."),
    (r"_attention\.out_proj\.", "_attention.output."),
    (r"^(decoder\.\d+)\.linear1\.", r"\1.mlp.up."),
    (r"^(decoder\.\d+)\.linear2\.", r"\1.mlp.down."),
    (r"^(decoder\.\d+)\.norm1\.", r"\1.self_norm."),
    (r"^(decoder\.\d+)\.norm2\.", r"\1.cross_norm."),
    (r"^(decoder\.\d+)\.norm3\.", r"\1.norm."),
)


def authors_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the authors' code (facebookresearch/MaskFormer, on detectron2's ResNet or on Swin) to our keys.

    Queries, keys and values, one matrix there, become three; buffers that are no part of the network are left out.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        name = renamed(name, _AUTHORS)
        if re.match(r"criterion\.|pixel_mean$|pixel_std$|.*\.relative_position_index$", name):
            continue
        joint = re.fullmatch(r"(.*_attention)\.in_proj_(weight|bias)", name)
        parts = {name: value}
        if joint:
            parts = {f"{joint[1]}.{part}.{joint[2]}": rows for part, rows in zip(("query", "key", "value"), value.chunk(3))}
        found |= parts
    return found


def huggingface_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of Hugging Face's MaskFormer, or the authors', to the keys of ``own``; one of our own stays as it is.

    The norm of Swin's classifier and the weights of the loss, which are no part of the network, are left out.
    """
    if set(own) <= set(state):
        return dict(state)
    if any(name.startswith("sem_seg_head.") for name in state):
        return authors_names(state)
    backbone, rest = {}, {}
    for name, value in state.items():
        if name.startswith(_ENCODER):
            backbone[name.removeprefix(_ENCODER)] = value
            continue
        if name != "criterion.empty_weight":
            rest[renamed(name, _HUGGINGFACE)] = value
    backbone = {rename_backbone(name): value for name, value in swin.official_names(backbone).items()}
    kept = {f"backbone.{name}": value for name, value in backbone.items() if not name.startswith("norm.")}
    return kept | rename_detector(rest, own)


register_vision_models(MaskFormer, CONFIGS, {
    "maskformer_r50": "MaskFormer with ResNet-50, 41.3 M parameters.",
    "maskformer_swin_tiny": "MaskFormer with Swin-T, 41.8 M parameters.",
    "maskformer_swin_base": "MaskFormer with Swin-B of window 12, 101.8 M parameters.",
    "maskformer_small": "MaskFormer on a ResNet-18 of a quarter of the width, 24 queries, 3 classes: trains in minutes on a CPU.",
}, rename=huggingface_names)  # fmt: skip


def _paper(parameters: float, macs: float) -> Published:
    return Published(
        source="the paper, table 1, by another counter", parameters=round(parameters * 1e6), macs=round(macs * 1e9), within=0.05
    )


describe_models(
    ("maskformer_r50", "maskformer_swin_tiny"),
    ModelInfo(family="MaskFormer", paper="2107.06278", inputs=image(3, 512)),
    {
        "maskformer_r50": _paper(41, 53),
        "maskformer_swin_tiny": _paper(42, 55),
    },
)
describe_models(
    ("maskformer_swin_base",),
    ModelInfo(family="MaskFormer", paper="2107.06278", inputs=image(3, 640)),
    {
        "maskformer_swin_base": (
            Published(
                source="transformers 5.23.0, MaskFormerConfig()", parameters=101_793_403, within=4e-4,
                note="2 classes there, 150 here (+38,036), and a norm of 2,048 parameters that has no reader there",
            ),
            _paper(102, 195),
        ),
    },
)  # fmt: skip
describe_models(
    ("maskformer_small",), ModelInfo(family="MaskFormer", paper="2107.06278", inputs=image(3, 64), note="ours, for small images")
)
