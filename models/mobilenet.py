"""MobileNetV2 of any width.

Ref: M. Sandler et al., MobileNetV2, arXiv 1801.04381, table 2. State dicts have torchvision's key names;
timm's load too.

Shapes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.checks import check_images
from models.info import ModelInfo, Published, image
from models.registry import describe_models
from models.timm_names import mobilenet_names, on_load
from models.vision import initialise_convolutions, register_vision_models

__all__ = ["CONFIGS", "InvertedResidual", "MobileNetConfig", "MobileNetV2"]


@dataclass(frozen=True, kw_only=True)
class MobileNetConfig:
    """Sizes of a MobileNetV2: ``width`` multiplies all channels; ``stages`` has one row (expansion, channels,
    blocks, stride) a stage."""

    width: float = 1.0
    stages: tuple[tuple[int, int, int, int], ...] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    stem: int = 32
    head: int = 1280
    dropout: float = 0.2
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise ValueError(f"width must be > 0, not {self.width!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout!r}")
        _check_stages(self.stages)


def _check_stages(stages: tuple[tuple[int, int, int, int], ...]) -> None:
    """Refuse rows that are not four whole numbers from 1 on."""
    for row in stages:
        if len(row) != 4 or any(not isinstance(item, int) or item < 1 for item in row):
            raise ValueError(
                f"a stage must be (expansion, channels, blocks, stride), integers >= 1, not {row!r}"
            )


CONFIGS = {
    "mobilenet_v2": MobileNetConfig(),
    "mobilenet_v2_050": MobileNetConfig(width=0.5),
    "mobilenet_v2_075": MobileNetConfig(width=0.75),
    "mobilenet_v2_200": MobileNetConfig(width=2.0),
}


def _round8(channels: float) -> int:
    """The nearest multiple of 8, at least 8, that is not below 90 %."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class ConvNormReLU6(nn.Sequential):
    """Convolution, batch norm, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """Expand, depth-wise 3x3, project: (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        expand = [] if expansion == 1 else [ConvNormReLU6(inputs, inner, 1)]
        self.conv = nn.Sequential(
            *expand,
            ConvNormReLU6(inner, inner, 3, stride=stride, groups=inner),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, 1x1 head, mean over the pixels, one linear layer: (B, 3, H, W) -> (B,
    num_classes)."""

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = _round8(config.stem * config.width)
        parts: list[nn.Module] = [ConvNormReLU6(3, channels, 3, stride=2)]
        for expansion, base, blocks, stride in config.stages:
            outputs = _round8(base * config.width)
            for block in range(blocks):
                step = stride if block == 0 else 1
                parts.append(InvertedResidual(channels, outputs, stride=step, expansion=expansion))
                channels = outputs
        head = _round8(config.head * max(1.0, config.width))
        self.features = nn.Sequential(*parts, ConvNormReLU6(channels, head, 1))
        linear = nn.Linear(head, config.num_classes)
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), linear)
        initialise_convolutions(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.register_load_state_dict_pre_hook(on_load(mobilenet_names(config.stages)))

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, 3)
        x = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(x, 1))


register_vision_models(MobileNetV2, CONFIGS, {
    "mobilenet_v2": "MobileNetV2, 3.5 M parameters; ``width=`` for any other width.",
    "mobilenet_v2_050": "MobileNetV2 of half the width, 2.0 M parameters.",
    "mobilenet_v2_075": "MobileNetV2 of three quarters of the width, 2.6 M parameters.",
    "mobilenet_v2_200": "MobileNetV2 of twice the width, 11.3 M parameters.",
})  # fmt: skip


describe_models(
    ("mobilenet_v2", "mobilenet_v2_050", "mobilenet_v2_075", "mobilenet_v2_200"),
    ModelInfo(family="MobileNetV2", paper="1801.04381", inputs=image(3, 224)),
    {
        "mobilenet_v2": (
            Published(source="torchvision's model page", parameters=3_504_872),
            Published(source="OSVAI/ODConv, README", macs=300_800_000, within=5e-4),
        ),
        "mobilenet_v2_075": Published(source="OSVAI/ODConv, README", parameters=2_640_000, macs=209_100_000, within=2e-3),
        "mobilenet_v2_050": Published(source="OSVAI/ODConv, README", parameters=1_970_000, macs=97_100_000, within=2e-3),
        "mobilenet_v2_200": Published(
            source="arXiv 2108.00708, table 1", parameters=11_258_000, macs=1_137_000_000, activations=13_350_000, within=1e-3,
        ),
    },
)
