"""Swin Transformer: attention within windows that move from block to block, as classifier and as backbone of four scales.

Ref: Z. Liu et al., Swin Transformer, arXiv 2103.14030. State dicts have the key names of microsoft/Swin-Transformer; its files,
timm's and Hugging Face's load by `official_names`.

Maps have their channels last here. Any image size runs: maps are padded with zeros to whole windows, as the authors' detection
and segmentation code does; padded positions take part in the attention.

Shapes: B images, H x W positions of a map, C channels, N = window^2 positions of a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import register_backbone
from models.checks import check_images, check_positive
from models.huggingface import renamed, stack_qkv
from models.info import ModelInfo, Published, image
from models.registry import describe_models
from models.vision import DropPath, register_vision_models

__all__ = ["CONFIGS", "Swin", "SwinBackbone", "SwinConfig", "official_names"]


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Sizes of a Swin Transformer; see `CONFIGS` for the published ones.

    ``width`` is the channels of the first stage, each later one has twice as many; ``window`` the side of a window in positions,
    ``mlp`` the ratio of hidden to outer channels, ``drop_path`` the stochastic depth of the last block (0 in the first).
    """

    width: int = 96
    blocks: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp: int = 4
    patch: int = 4
    channels: int = 3
    drop_path: float = 0.0
    num_classes: int = 1000

    def __post_init__(self) -> None:
        check_positive(self)
        if len(self.heads) != len(self.blocks):
            raise ValueError(f"heads and blocks must have one entry a stage, not {self.heads} and {self.blocks}")
        for width, heads in zip(self.widths, self.heads):
            if width % heads:
                raise ValueError(f"width must be a multiple of heads in each stage, not {width} channels with {heads} heads")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), not {self.drop_path!r}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.width << stage for stage in range(len(self.blocks)))


CONFIGS = {
    "swin_tiny": SwinConfig(),
    "swin_small": SwinConfig(blocks=(2, 2, 18, 2)),
    "swin_base": SwinConfig(width=128, blocks=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    "swin_large": SwinConfig(width=192, blocks=(2, 2, 18, 2), heads=(6, 12, 24, 48)),
    "swin_base_384": SwinConfig(width=128, blocks=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=12),
    "swin_large_384": SwinConfig(width=192, blocks=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12),
}


class PatchEmbed(nn.Module):
    """Image (B, channels, H, W) -> map (B, H / patch, W / patch, C); images are padded to whole patches."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.proj.kernel_size[0]
        x = F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each offset of query and key: (B, windows, N, C) -> the same."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _offsets(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``mask``: (windows, N, N), added to the scores, or None."""
        batch, windows, size, width = x.shape
        qkv = self.qkv(x).view(batch, windows, size, 3, self.heads, width // self.heads).permute(3, 0, 1, 4, 2, 5)
        query, key, value = qkv.unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            bias = bias + mask[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(mixed.transpose(2, 3).flatten(3))


def _offsets(window: int) -> Tensor:
    """Row of the bias table for each pair of positions in a window: int64 (N, N)."""
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    offset = places[:, None] - places[None] + window - 1
    return offset[..., 0] * (2 * window - 1) + offset[..., 1]


class Mlp(nn.Module):
    """Two layers with GELU between: (..., C) -> (..., C)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention in windows, shifted by ``shift`` positions, and an MLP, both after their norms: (B, H, W, C) -> the same."""

    def __init__(self, width: int, heads: int, config: SwinConfig, *, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift = config.window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, config.window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, config.mlp * width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` keeps apart what only the shift brought together (see `_shift_mask`); None: windows stay where they are."""
        x = x + self.drop_path(self._attend(self.norm1(x), 0 if mask is None else self.shift, mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, shift: int, mask: Tensor | None) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = _windows_to_map(self.attn(_map_to_windows(x, self.window), mask if shift else None), x.shape, self.window)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :height, :width]


def _map_to_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, windows, N, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(batch, -1, window * window, channels)


def _windows_to_map(x: Tensor, shape: torch.Size, window: int) -> Tensor:
    """(B, windows, N, C) -> ``shape``, (B, H, W, C)."""
    batch, height, width, channels = shape
    x = x.view(batch, height // window, width // window, window, window, channels)
    return x.transpose(2, 3).reshape(shape)


def _shift_mask(x: Tensor, window: int, shift: int) -> Tensor:
    """-100 between positions that the shift brought into one window from opposite edges, else 0: (windows, N, N)."""

    def strips(size: int) -> Tensor:
        """0 for whole windows, 1 and 2 for the two parts of the last one."""
        place = torch.arange(size + -size % window, device=x.device)
        return (place >= len(place) - window).long() + (place >= len(place) - shift)

    region = 3 * strips(x.shape[1])[:, None] + strips(x.shape[2])
    parts = _map_to_windows(region[None, :, :, None], window)[0, :, :, 0]
    return (parts[:, :, None] != parts[:, None]).to(x.dtype) * -100.0


class PatchMerging(nn.Module):
    """Four neighbours become one position of twice the channels: (B, H, W, C) -> (B, H / 2, W / 2, 2 C), sizes rounded up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks of one width; every second one has its windows shifted. ``downsample``, if any, makes the next stage's input."""

    def __init__(self, stage: int, config: SwinConfig) -> None:
        super().__init__()
        before, last = sum(config.blocks[:stage]), max(sum(config.blocks) - 1, 1)
        self.window = config.window
        self.blocks = nn.ModuleList(
            Block(config.widths[stage], config.heads[stage], config, shift=index % 2 * (config.window // 2),
                  drop_path=config.drop_path * (before + index) / last)
            for index in range(config.blocks[stage])
        )  # fmt: skip
        self.downsample = PatchMerging(config.widths[stage]) if stage + 1 < len(config.blocks) else None

    def forward(self, x: Tensor, *, always_shift: bool) -> Tensor:
        """Map (B, H, W, C) -> the same, before ``downsample``."""
        shift = self.window // 2
        if not always_shift and min(x.shape[1:3]) <= self.window:
            shift = 0  # one window holds the whole map
        mask = _shift_mask(x, self.window, shift) if shift else None
        for block in self.blocks:
            x = block(x, mask)
        return x

    def merged(self, x: Tensor) -> Tensor:
        """The next stage's input, or what is given if there is no next stage."""
        return x if self.downsample is None else self.downsample(x)


class _Trunk(nn.Module):
    """Patches and stages, what classifier and backbone share."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(Stage(stage, config) for stage in range(len(config.blocks)))

    def _maps(self, x: Tensor, *, always_shift: bool) -> list[Tensor]:
        """Output (B, H, W, C) of each stage."""
        check_images(x, self.config.channels)
        x, maps = self.patch_embed(x), []
        for layer in self.layers:
            x = layer(x, always_shift=always_shift)
            maps.append(x)
            x = cast(Stage, layer).merged(x)
        return maps


class Swin(_Trunk):
    """The classifier: mean over the last map, one linear layer: (B, channels, H, W) -> (B, num_classes).

    A map that one window covers is not shifted, as the authors' classifier has it.
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.widths[-1])
        self.head = nn.Linear(config.widths[-1], config.num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self._maps(x, always_shift=False)[-1]).mean((1, 2)))


class SwinBackbone(_Trunk):
    """The backbone: images (B, C, H, W) -> a map (B, channels[i], H / strides[i], W / strides[i]) of each stage asked for.

    Each has its own norm; sizes are rounded up. Every second block is shifted whatever the map's size, as the authors'
    segmentation code has it.

    Parameters
    ----------
    stages
        Which stages give a map, ascending, the first being 1; None: all.
    frozen_stages
        How many stages do not learn, the patches counted as the first.

    Members
    -------
    channels, strides
        Channels of each map, and pixels a position.
    """

    def __init__(self, config: SwinConfig, *, stages: Sequence[int] | None = None, frozen_stages: int = 0) -> None:
        super().__init__(config)
        last = len(config.blocks)
        stages = tuple(range(1, last + 1)) if stages is None else tuple(stages)
        if not stages or list(stages) != sorted(set(stages)) or not all(1 <= stage <= last for stage in stages):
            raise ValueError(f"stages must ascend within 1 to {last}, not {stages}")
        if not 0 <= frozen_stages <= last + 1:
            raise ValueError(f"frozen_stages must be in 0 to {last + 1}, not {frozen_stages!r}")
        self.stages = stages
        self.channels = tuple(config.widths[stage - 1] for stage in stages)
        self.strides = tuple(config.patch << stage - 1 for stage in stages)
        del self.layers[stages[-1] :]
        cast(Stage, self.layers[-1]).downsample = None
        for stage, width in zip(stages, self.channels):
            self.add_module(f"norm{stage - 1}", nn.LayerNorm(width))
        self.apply(_initialise)
        for part in [self.patch_embed, *self.layers][:frozen_stages]:
            part.requires_grad_(False)

    def of_classifier(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Names of the authors, timm and Hugging Face; the norms of the maps, which a classifier has not, stay as they are."""
        last = self.stages[-1] - 1
        left = ("head.", "norm.", f"layers.{last}.downsample.", *(f"layers.{stage}." for stage in range(last + 1, 4)))
        own = {name: value for name, value in self.state_dict().items() if name.startswith("norm")}
        return own | {name: value for name, value in official_names(state).items() if not name.startswith(left)}

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self._maps(x, always_shift=True)
        normed = [self.get_submodule(f"norm{stage - 1}")(maps[stage - 1]) for stage in self.stages]
        return [x.permute(0, 3, 1, 2).contiguous() for x in normed]


def _initialise(module: nn.Module) -> None:
    """As the authors: truncated normal with deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_HUGGINGFACE = (
    (r"^(model\.|swin\.)+", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:self|relative_position_bias)\.relative_position_bias_table$", ".attn.relative_position_bias_table"),
    (r"\.attention\.(?:self\.([qkv])(?:uery|ey|alue)|([qkv])_proj)\.", lambda found: f".attn.{found[1] or found[2]}."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    # MaskFormer's backbone counts its norms from 0, the general one its stages from 1
    (r"^hidden_states_norms\.(\d+)\.", r"norm\1."),
    (r"^hidden_states_norms\.stage(\d+)\.", lambda found: f"norm{int(found[1]) - 1}."),
)
# timm merges patches at the start of the next stage, and calls the linear layer ``head.fc``
_TIMM = (
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample."),
    (r"^head\.fc\.", "head."),
)


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Swin state dict of Hugging Face (classifier or backbone) or timm as the authors' code has it; other names stay.

    Queries, keys and values become one matrix; index and mask buffers, which the sizes imply, are left out.
    """
    state = {name: value for name, value in state.items() if not name.endswith(("relative_position_index", "attn_mask"))}
    if "head.fc.weight" in state or "layers.0.downsample.norm.weight" not in state:
        state = {renamed(name, _TIMM): value for name, value in state.items()}
    if not any("layernorm_before" in name for name in state):
        return state
    return stack_qkv({renamed(name, _HUGGINGFACE): value for name, value in state.items()})


@register_backbone(*CONFIGS)
def _backbone(
    name: str,
    *,
    stages: Sequence[int],
    width: int | None = None,
    frozen_norm: bool = False,
    frozen_stages: int = 0,
    drop_path: float = 0.3,
) -> nn.Module:
    """A backbone. 0.3 is MaskFormer's stochastic depth for all sizes; there is no batch norm for ``frozen_norm`` to freeze."""
    config = CONFIGS[name]
    config = replace(config, drop_path=drop_path, width=config.width if width is None else width)
    return SwinBackbone(config, stages=stages, frozen_stages=frozen_stages)


register_vision_models(Swin, CONFIGS, {
    "swin_tiny": "Swin-T, window 7, for 224 pixels, 28.3 M parameters.",
    "swin_small": "Swin-S, window 7, for 224 pixels, 49.6 M parameters.",
    "swin_base": "Swin-B, window 7, for 224 pixels, 87.8 M parameters.",
    "swin_large": "Swin-L, window 7, for 224 pixels, 196.5 M parameters.",
    "swin_base_384": "Swin-B, window 12, for 384 pixels, 87.9 M parameters.",
    "swin_large_384": "Swin-L, window 12, for 384 pixels, 196.7 M parameters.",
}, rename=lambda state, own: official_names(state))  # fmt: skip


_README = "the authors' README"
_HF = "transformers 5.23.0, SwinForImageClassification"
describe_models(
    ("swin_tiny", "swin_small", "swin_base", "swin_large"),
    ModelInfo(family="Swin", paper="2103.14030", inputs=image(3, 224)),
    {
        "swin_tiny": (Published(source=_HF, parameters=28_288_354), Published(source=_README, macs=4_500_000_000, within=5e-3)),
        "swin_small": (Published(source=_HF, parameters=49_606_258), Published(source=_README, macs=8_700_000_000, within=6e-3)),
        "swin_base": (Published(source=_HF, parameters=87_768_224), Published(source=_README, macs=15_400_000_000, within=4e-3)),
        "swin_large": (
            Published(source=_HF, parameters=196_532_476), Published(source=_README, macs=34_500_000_000, within=2e-3),
        ),
    },
)  # fmt: skip
describe_models(
    ("swin_base_384", "swin_large_384"),
    ModelInfo(family="Swin", paper="2103.14030", inputs=image(3, 384)),
    {
        "swin_base_384": (
            Published(source=_HF, parameters=87_903_584), Published(source=_README, macs=47_100_000_000, within=1e-3),
        ),
        "swin_large_384": (
            Published(source=_HF, parameters=196_735_516), Published(source=_README, macs=103_900_000_000, within=1e-3),
        ),
    },
)  # fmt: skip
