"""Vision transformers, pre-LayerNorm, as DeiT and ViT are built.

Ref: A. Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929; H. Touvron et al., DeiT, arXiv 2012.12877. Key names
are timm's; Hugging Face's load too. Float outputs equal ``transformers.ViTForImageClassification`` with the same weights.

Shapes: B images, P patches, S = P + 1 tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.checks import check_images, check_multiple, check_options, check_positive, check_share
from models.huggingface import renamed, stack_qkv
from models.info import ModelInfo, Published, image
from models.registry import describe_models, register_model
from models.weights import load_weights, read_weights

__all__ = ["CONFIGS", "ViT", "ViTConfig", "from_huggingface"]


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a vision transformer; see `CONFIGS` for the published ones. ``dropout`` is of both residual branches."""

    layers: int = 12
    hidden: int = 192
    heads: int = 3
    mlp: int = 4
    image: int = 224
    patch: int = 16
    channels: int = 3
    dropout: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(self)
        check_multiple(self, "hidden", "heads")
        check_multiple(self, "image", "patch")
        check_share(self, "dropout")

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2


CONFIGS = {
    "deit_tiny": ViTConfig(),
    "deit_small": ViTConfig(hidden=384, heads=6),
    "deit_base": ViTConfig(hidden=768, heads=12),
    "vit_tiny": ViTConfig(),
    "vit_small": ViTConfig(hidden=384, heads=6),
    "vit_base": ViTConfig(hidden=768, heads=12),
    "vit_mnist": ViTConfig(layers=4, hidden=96, heads=4, mlp=2, image=28, patch=4, channels=1),
}


class PatchEmbed(nn.Module):
    """(B, channels, H, W) -> (B, P, C)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.hidden, config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: (B, S, C) -> (B, S, C)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with GELU between: (B, S, C) -> (B, S, C)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.mlp * config.hidden)
        self.fc2 = nn.Linear(config.mlp * config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One layer, normalised before attention and MLP: (B, S, C) -> (B, S, C)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Patches, a class token, positions, blocks, and a linear head on the class token: (B, channels, H, W) -> logits.

    Members
    -------
    blocks
        The stack of layers, the part that an accelerator runs; `embed` gives its input.
    """

    def __init__(self, config: ViTConfig, *, num_classes: int = 1000) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, not {num_classes!r}")
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, config.hidden))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden, num_classes)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        self.apply(_initialise)

    def embed(self, x: Tensor) -> Tensor:
        """Image (B, channels, H, W) -> tokens (B, S, C) before the first block."""
        config = self.config
        check_images(x, config.channels, config.image)
        patches = self.patch_embed(x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1) + self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def _initialise(module: nn.Module) -> None:
    """As DeiT's authors: truncated normal with deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


_RENAMES = (
    (r"^(vit|deit)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(attention\.(query|key|value)|[qkv]_proj)\.", lambda found: f".attn.{found[1].split('.')[-1][0]}."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.(output\.dense|mlp\.fc2)\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Hugging Face state dict of ViT or DeiT to `ViT`'s names; query, key and value are stacked, the pooler left out."""
    found = {renamed(key, _RENAMES): value for key, value in state.items()}
    return stack_qkv({key: value for key, value in found.items() if not key.startswith("pooler.")})


def _build(name: str, pretrained: bool | str | Path, num_classes: int | None, overrides: dict[str, Any]) -> nn.Module:
    check_options(name, overrides, ("num_classes", *sorted(field.name for field in fields(ViTConfig))))
    classes = num_classes if num_classes is not None else 10 if name == "vit_mnist" else 1000
    model = ViT(replace(CONFIGS[name], **overrides), num_classes=classes)
    if pretrained is True:
        raise ValueError(f"no installable package carries weights of {name}: give pretrained= a path")
    if pretrained is not False:  # a head for other classes is left as it is
        state = from_huggingface(read_weights(pretrained))
        load_weights(model, state, name=name, where=pretrained, keep=("head.weight", "head.bias"))
    return model


def _register(name: str, summary: str) -> Callable[..., nn.Module]:
    def builder(*, pretrained: bool | str | Path = False, num_classes: int | None = None, **overrides: Any) -> nn.Module:
        return _build(name, pretrained, num_classes, overrides)

    builder.__name__, builder.__doc__ = name, summary
    return register_model(builder)


deit_tiny = _register("deit_tiny", "DeiT-T/16, 5.7 M parameters.")
deit_small = _register("deit_small", "DeiT-S/16, 22.1 M parameters.")
deit_base = _register("deit_base", "DeiT-B/16, 86.6 M parameters.")
vit_tiny = _register("vit_tiny", "ViT-Ti/16, the shape of deit_tiny.")
vit_small = _register("vit_small", "ViT-S/16, the shape of deit_small.")
vit_base = _register("vit_base", "ViT-B/16, the shape of deit_base.")
vit_mnist = _register("vit_mnist", "4 layers of 96 channels for 28 x 28 digits, 0.3 M parameters.")


_SIZES = {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656}


def _timm(name: str, size: str) -> Published:
    return Published(source=f"timm, {name}_{size}_patch16_224", parameters=_SIZES[size])


describe_models(
    ("deit_tiny", "deit_small", "deit_base"),
    ModelInfo(family="DeiT", paper="2012.12877", inputs=image(3, 224)),
    {f"deit_{size}": _timm("deit", size) for size in _SIZES},
)
describe_models(
    ("vit_tiny", "vit_small", "vit_base"),
    ModelInfo(family="ViT", paper="2010.11929", inputs=image(3, 224)),
    {f"vit_{size}": _timm("vit", size) for size in _SIZES},
)
describe_models(("vit_mnist",), ModelInfo(family="ViT", paper="2010.11929", inputs=image(1, 28), note="ours, for digits"))
