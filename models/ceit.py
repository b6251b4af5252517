"""CeiT: a vision transformer with a convolutional stem, convolutions in its feed-forward parts, and attention over layers.

Ref: K. Yuan et al., Incorporating Convolution Designs into Visual Transformers, arXiv 2103.11816: Image-to-Tokens (section 3.2),
Locally-enhanced Feed-Forward (3.3, eq. 3-9), Layer-wise Class token Attention (3.4). Key names are those of the authors'
released code (github.com/coeusguo/ceit), so that its weights load; where it and the paper differ, the code is followed:

* the stem is 64 channels wide (with 64 the parameters are the published 6.4, 24.2 and 94.4 M, with 32 they would not be);
* the feed-forward part hands on the *normalised* class token, so that each block adds LayerNorm(class) to the class token;
* one attention and MLP over the class tokens of all blocks, without stochastic depth.

Shapes: B images, S x S grid of patches, T = S * S + 1 tokens, C channels, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.checks import check_images
from models.info import ModelInfo, Published, image
from models.registry import describe_models
from models.vision import DropPath, register_vision_models
from models.vit import Attention, Mlp, ViTConfig

__all__ = ["CONFIGS", "CeiT", "CeiTConfig", "resize_positions"]

STEM_STRIDE = 4
"""Convolution and pooling of the stem halve the image each."""


@dataclass(frozen=True, kw_only=True)
class CeiTConfig(ViTConfig):
    """Sizes of a CeiT; see `CONFIGS` for the published ones.

    ``patch`` is counted on the stem's map, which is a fourth of the image; ``stem`` and ``stem_kernel`` are its channels and
    kernel, ``kernel`` that of the depth-wise convolutions. ``drop_path`` is the stochastic depth of the last block, [0, 1);
    it grows linearly from 0 at the first.
    """

    patch: int = 4
    stem: int = 64
    stem_kernel: int = 7
    kernel: int = 3
    drop_path: float = 0.0
    num_classes: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image % (STEM_STRIDE * self.patch):
            raise ValueError(
                f"image must be a multiple of {STEM_STRIDE} * patch, not {self.image} with patches of {self.patch}"
            )
        if self.kernel % 2 == 0 or self.stem_kernel % 2 == 0:
            raise ValueError(f"kernel and stem_kernel must be odd, not {self.kernel} and {self.stem_kernel}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), not {self.drop_path!r}")

    @property
    def side(self) -> int:
        """Patches along a side of the image."""
        return self.image // (STEM_STRIDE * self.patch)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.side**2


CONFIGS = {
    "ceit_tiny": CeiTConfig(),
    "ceit_small": CeiTConfig(hidden=384, heads=6),
    "ceit_base": CeiTConfig(hidden=768, heads=12),
    "ceit_tiny_384": CeiTConfig(image=384),
    "ceit_small_384": CeiTConfig(hidden=384, heads=6, image=384),
    "ceit_base_384": CeiTConfig(hidden=768, heads=12, image=384),
    "ceit_mnist": CeiTConfig(
        layers=4, hidden=96, heads=4, mlp=2, image=28, patch=1, channels=1, stem=32, stem_kernel=3, num_classes=10
    ),
}


class Stem(nn.Module):
    """Convolution, batch norm and pooling, no activation: (B, channels, H, W) -> (B, stem, H / 4, W / 4)."""

    def __init__(self, config: CeiTConfig) -> None:
        super().__init__()
        kernel = config.stem_kernel
        self.conv = nn.Conv2d(config.channels, config.stem, kernel, 2, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(config.stem)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.bn(self.conv(x)))


class ImageToTokens(nn.Module):
    """Tokens of a low-level feature map: (B, channels, H, W) -> (B, S * S, C)."""

    def __init__(self, config: CeiTConfig) -> None:
        super().__init__()
        self.backbone = Stem(config)
        self.proj = nn.Conv2d(config.stem, config.hidden, config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.backbone(x)).flatten(2).transpose(1, 2)


class LocallyEnhancedFeedForward(nn.Module):
    """Patches as an image through 1x1, depth-wise and 1x1 convolution; the class token passes: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: CeiTConfig) -> None:
        super().__init__()
        self.side = config.side
        inner = config.mlp * config.hidden
        self.conv1 = nn.Conv2d(config.hidden, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, config.kernel, padding=config.kernel // 2, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, config.hidden, 1)
        self.bn3 = nn.BatchNorm2d(config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        cls, patches = x[:, :1], x[:, 1:]
        grid = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        grid = F.gelu(self.bn1(self.conv1(grid)))
        grid = F.gelu(self.bn2(self.conv2(grid)))
        grid = self.bn3(self.conv3(grid))
        return torch.cat([cls, grid.flatten(2).transpose(1, 2)], 1)


class Block(nn.Module):
    """Attention and locally enhanced feed-forward, each after a norm: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: CeiTConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.leff = LocallyEnhancedFeedForward(config)
        self.drop = nn.Sequential(nn.Dropout(config.dropout), DropPath(drop_path))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.leff(self.norm2(x)))


class LastTokenAttention(Attention):
    """Attention whose only query is the last token: (B, L, C) -> (B, 1, C)."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.shape[2]
        query_weight, rest_weight = self.qkv.weight.split([hidden, 2 * hidden])
        query_bias, rest_bias = self.qkv.bias.split([hidden, 2 * hidden])
        query = self._heads(F.linear(x[:, -1:], query_weight, query_bias))
        key, value = (self._heads(part) for part in F.linear(x, rest_weight, rest_bias).chunk(2, -1))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, tokens, C) -> (B, heads, tokens, C / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class LayerClassAttention(nn.Module):
    """Class tokens of all blocks -> one: (B, L, C) -> (B, 1, C)."""

    def __init__(self, config: CeiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.attn = LastTokenAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.feedforward = Mlp(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, -1:] + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.feedforward(self.norm2(x)))


class CeiT(nn.Module):
    """Image-to-tokens, blocks, attention over their class tokens, one linear layer: (B, channels, H, W) -> (B, num_classes).

    Weights of another image size load: position embeddings are resized to this one's grid (`resize_positions`).

    Raises
    ------
    ValueError
        Images of another size or another number of channels than the configuration's.
    """

    def __init__(self, config: CeiTConfig) -> None:
        super().__init__()
        self.config = config
        self.i2t = ImageToTokens(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, config.hidden))
        last = max(1, config.layers - 1)
        self.blocks = nn.ModuleList(Block(config, drop_path=config.drop_path * i / last) for i in range(config.layers))
        self.lca = LayerClassAttention(config)
        self.pos_layer_embed = nn.Parameter(torch.zeros(1, config.layers, config.hidden))
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden, config.num_classes)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        self.apply(_initialise)
        self.register_load_state_dict_pre_hook(_fit_positions)

    def embed(self, x: Tensor) -> Tensor:
        """Image (B, channels, H, W) -> tokens (B, T, C) before the first block."""
        config = self.config
        check_images(x, config.channels, config.image)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), self.i2t(x)], 1) + self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        classes = []
        for block in self.blocks:
            x = block(x)
            classes.append(x[:, 0])
        x = self.lca(torch.stack(classes, 1) + self.pos_layer_embed)
        return self.head(self.norm(x)[:, 0])


def resize_positions(positions: Tensor, patches: int) -> Tensor:
    """Position embeddings of a square grid for another: (1, 1 + P, C) -> (1, 1 + patches, C), the class token's unchanged.

    Bicubic interpolation, as DeiT's authors fine-tune at another resolution (H. Touvron et al., arXiv 2012.12877).

    Raises
    ------
    ValueError
        P or ``patches`` is no square number.
    """
    old, new = (round(count**0.5) for count in (positions.shape[1] - 1, patches))
    if old * old != positions.shape[1] - 1 or new * new != patches:
        raise ValueError(f"positions must be of square grids, not of {positions.shape[1] - 1} and {patches} patches")
    if old == new:
        return positions
    grid = positions[:, 1:].transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def _fit_positions(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded, resize their position embeddings to the module's image."""
    name, own = f"{prefix}pos_embed", module.pos_embed
    assert isinstance(own, Tensor)
    given = state.get(name)
    if given is not None and given.ndim == 3 and given.shape[2] == own.shape[2] and given.shape != own.shape:
        state[name] = resize_positions(given, own.shape[1] - 1)


def _initialise(module: nn.Module) -> None:
    """As the authors: linear layers truncated normal with deviation 0.02; convolutions keep torch's own."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


register_vision_models(CeiT, CONFIGS, {
    "ceit_tiny": "CeiT-T for 224 x 224, 6.4 M parameters.",
    "ceit_small": "CeiT-S for 224 x 224, 24.2 M parameters.",
    "ceit_base": "CeiT-B for 224 x 224, 94.4 M parameters.",
    "ceit_tiny_384": "CeiT-T for 384 x 384.",
    "ceit_small_384": "CeiT-S for 384 x 384.",
    "ceit_base_384": "CeiT-B for 384 x 384.",
    "ceit_mnist": "4 layers of 96 channels for 28 x 28 digits, 0.4 M parameters.",
})  # fmt: skip


def _code(parameters: int, macs: float) -> Published:
    """The authors' file, counted; G MACs to three decimals. The stem has 64 channels as there, which gives the README's sizes."""
    return Published(source="coeusguo/ceit at 44c16d3, counted", parameters=parameters, macs=round(macs * 1e9), within=5e-4)


describe_models(
    ("ceit_tiny", "ceit_small", "ceit_base"),
    ModelInfo(family="CeiT", paper="2103.11816", inputs=image(3, 224)),
    {
        "ceit_tiny": _code(6_356_904, 1.395),
        "ceit_small": _code(24_204_840, 4.760),
        "ceit_base": _code(94_405_416, 17.749),
    },
)
describe_models(
    ("ceit_tiny_384", "ceit_small_384", "ceit_base_384"), ModelInfo(family="CeiT", paper="2103.11816", inputs=image(3, 384))
)
describe_models(("ceit_mnist",), ModelInfo(family="CeiT", paper="2103.11816", inputs=image(1, 28), note="ours, for digits"))
