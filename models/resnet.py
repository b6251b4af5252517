"""ResNet and ResNeXt for images, with the stride of a bottleneck in its 3x3 convolution ("v1.5").

Ref: K. He et al., Deep Residual Learning, arXiv 1512.03385; S. Xie et al., ResNeXt, arXiv 1611.05431.
State dicts have torchvision's key names.

Shapes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.checks import check_images, check_positive
from models.info import ModelInfo, Published, image
from models.registry import describe_models
from models.vision import initialise_convolutions, register_vision_models

__all__ = ["CONFIGS", "BasicBlock", "Bottleneck", "ResNet", "ResNetConfig"]


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes of a ResNet; see `CONFIGS` for the published ones.

    ``channels`` are those of the image, ``width`` those of the stem; ``groups`` and ``group_width`` (channels of a
    group in the first stage, None: ``width``) shape a bottleneck's 3x3 convolution. ``small_stem`` is for images of
    some 32 pixels: a 3x3 convolution of stride 1 and no pooling (section 4.2). ``dropout`` is before the linear layer.
    """

    bottleneck: bool
    blocks: tuple[int, ...]
    width: int = 64
    groups: int = 1
    group_width: int | None = None
    channels: int = 3
    small_stem: bool = False
    dropout: float = 0.0
    num_classes: int = 1000

    def __post_init__(self) -> None:
        check_positive(self)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout!r}")
        if not self.bottleneck and (self.groups != 1 or self.group_width is not None):
            raise ValueError("only a bottleneck has groups: give bottleneck=True")


CONFIGS = {
    "resnet18": ResNetConfig(bottleneck=False, blocks=(2, 2, 2, 2)),
    "resnet34": ResNetConfig(bottleneck=False, blocks=(3, 4, 6, 3)),
    "resnet50": ResNetConfig(bottleneck=True, blocks=(3, 4, 6, 3)),
    "resnet101": ResNetConfig(bottleneck=True, blocks=(3, 4, 23, 3)),
    "resnext50_32x4d": ResNetConfig(bottleneck=True, blocks=(3, 4, 6, 3), groups=32, group_width=4),
}


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """What the residual passes through: nothing, or a 1x1 convolution where the shape changes."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the residual: (B, inputs, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, inputs: int, width: int, stride: int, config: ResNetConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + residual)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and the residual: (B, inputs, H, W) -> (B, 4 width, H / stride, W /
    stride)."""

    def __init__(self, inputs: int, width: int, stride: int, config: ResNetConfig) -> None:
        super().__init__()
        inner = width * (config.group_width or config.width) // config.width * config.groups
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=config.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + residual)


class ResNet(nn.Module):
    """Stem, four stages, mean over the pixels, one linear layer: (B, channels, H, W) -> (B, num_classes)."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        kernel, stride = (3, 1) if config.small_stem else (7, 2)
        self.conv1 = nn.Conv2d(config.channels, config.width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if config.small_stem else nn.MaxPool2d(3, 2, padding=1)
        channels = config.width
        for stage, count in enumerate(config.blocks):
            width, stride = config.width << stage, 1 if stage == 0 else 2
            self.add_module(f"layer{stage + 1}", _stage(channels, width, stride, count, config))
            channels = width * (4 if config.bottleneck else 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(config.dropout)
        self.fc = nn.Linear(channels, config.num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.config.channels)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(len(self.config.blocks)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(self.drop(torch.flatten(self.avgpool(x), 1)))


def _stage(inputs: int, width: int, stride: int, count: int, config: ResNetConfig) -> nn.Sequential:
    """Blocks of one width, the first of which changes the shape."""
    kind = Bottleneck if config.bottleneck else BasicBlock
    outputs = width * (4 if config.bottleneck else 1)
    first = kind(inputs, width, stride, config)
    return nn.Sequential(first, *(kind(outputs, width, 1, config) for _ in range(count - 1)))


register_vision_models(ResNet, CONFIGS, {
    "resnet18": "ResNet-18, 11.7 M parameters.",
    "resnet34": "ResNet-34, 21.8 M parameters.",
    "resnet50": "ResNet-50, 25.6 M parameters.",
    "resnet101": "ResNet-101, 44.5 M parameters.",
    "resnext50_32x4d": "ResNeXt-50 with 32 groups of 4 channels, 25.0 M parameters.",
})  # fmt: skip


_TORCHVISION = "torchvision's model page"
_FISHER = "arXiv 2108.00708, table 1"
describe_models(
    ("resnet18", "resnet34", "resnet50", "resnet101"),
    ModelInfo(family="ResNet", paper="1512.03385", inputs=image(3, 224), note="v1.5: the stride is in the 3x3 convolution"),
    {
        "resnet18": Published(source=_TORCHVISION, parameters=11_689_512, macs=1_814_000_000, within=5e-4),
        "resnet34": Published(source=_TORCHVISION, parameters=21_797_672, macs=3_664_000_000, within=5e-4),
        "resnet50": (
            Published(source=_TORCHVISION, parameters=25_557_032),
            Published(source=_FISHER, macs=4_089_000_000, activations=11_110_000, within=5e-4),
        ),
        "resnet101": (
            Published(source=_TORCHVISION, parameters=44_549_160),
            Published(source=_FISHER, macs=7_801_000_000, activations=16_230_000, within=5e-4),
        ),
    },
)
describe_models(
    ("resnext50_32x4d",),
    ModelInfo(family="ResNeXt", paper="1611.05431", inputs=image(3, 224)),
    {
        "resnext50_32x4d": (
            Published(source=_TORCHVISION, parameters=25_028_904),
            Published(source=_FISHER, macs=4_230_000_000, activations=14_400_000, within=5e-4),
        ),
    },
)
