"""RegNetX, a family whose widths follow one line, quantised.

Ref: I. Radosavovic et al., Designing Network Design Spaces, arXiv 2003.13678, section 3.3 and eq. 2-4; the
constants of each size are those of table 7's networks as released by the authors (pycls). State dicts have
torchvision's key names; timm's load too.

Shapes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.checks import check_images, check_positive
from models.info import ModelInfo, Published, image
from models.registry import describe_models
from models.timm_names import on_load, regnet_names
from models.vision import initialise_convolutions, register_vision_models

__all__ = ["CONFIGS", "RegNet", "RegNetConfig", "stage_shapes"]


@dataclass(frozen=True, kw_only=True)
class RegNetConfig:
    """The line of a RegNet: block j is ``initial + slope * j`` wide, rounded to ``initial * ratio ** k``.

    ``half_up`` says where a width half-way between two multiples of the group width goes: to the even multiple
    as in the paper, or up as in torchvision. Only the 400MF network has such a width (392: 384 or 400).
    """

    depth: int
    initial: int
    slope: float
    ratio: float
    group_width: int
    stem: int = 32
    half_up: bool = False
    num_classes: int = 1000

    def __post_init__(self) -> None:
        check_positive(self)
        if self.initial % 8 or not self.slope >= 0 or not self.ratio > 1:
            raise ValueError(
                "initial must be a multiple of 8, slope >= 0 and ratio > 1, not "
                f"{self.initial!r}, {self.slope!r} and {self.ratio!r}"
            )


CONFIGS = {
    "regnet_x_200mf": RegNetConfig(depth=13, initial=24, slope=36.44, ratio=2.49, group_width=8),
    "regnet_x_400mf": RegNetConfig(depth=22, initial=24, slope=24.48, ratio=2.54, group_width=16),
    "regnet_x_400mf_tv": RegNetConfig(
        depth=22, initial=24, slope=24.48, ratio=2.54, group_width=16, half_up=True
    ),
    "regnet_x_600mf": RegNetConfig(depth=16, initial=48, slope=36.97, ratio=2.24, group_width=24),
    "regnet_x_800mf": RegNetConfig(depth=16, initial=56, slope=35.73, ratio=2.28, group_width=16),
    "regnet_x_1_6gf": RegNetConfig(depth=18, initial=80, slope=34.01, ratio=2.25, group_width=24),
    "regnet_x_3_2gf": RegNetConfig(depth=25, initial=88, slope=26.31, ratio=2.25, group_width=48),
}


def stage_shapes(config: RegNetConfig) -> list[tuple[int, int, int]]:
    """Rows (width, blocks, group width) of the stages, equations 2 to 4; widths are multiples of the
    group width."""
    line = config.initial + config.slope * np.arange(config.depth)
    powers = np.round(np.log(line / config.initial) / np.log(config.ratio))
    quantised = np.round(config.initial * config.ratio**powers / 8).astype(int) * 8
    stages = []
    for width, blocks in zip(*np.unique(quantised, return_counts=True)):
        group = min(config.group_width, int(width))
        multiples = int(width) / group
        whole = int(multiples + 0.5) if config.half_up else round(multiples)
        stages.append((whole * group, int(blocks), group))
    return stages


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, unless told otherwise, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), *[nn.ReLU(inplace=True)] * relu)


class Block(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolution and the residual: (B, inputs, H, W) -> (B, width, H / stride, W /
    stride)."""

    def __init__(self, inputs: int, width: int, *, stride: int, group_width: int) -> None:
        super().__init__()
        same = stride == 1 and inputs == width
        self.proj = None if same else ConvNorm(inputs, width, 1, stride=stride, relu=False)
        self.f = nn.Sequential(
            OrderedDict(
                a=ConvNorm(inputs, width, 1),
                b=ConvNorm(width, width, 3, stride=stride, groups=width // group_width),
                c=ConvNorm(width, width, 1, relu=False),
            )
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.proj is None else self.proj(x)
        return self.activation(residual + self.f(x))


class RegNet(nn.Module):
    """Stem, stages, mean over the pixels, one linear layer: (B, 3, H, W) -> (B, num_classes)."""

    def __init__(self, config: RegNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvNorm(3, config.stem, 3, stride=2)
        channels, stages = config.stem, OrderedDict[str, nn.Module]()
        for number, (width, blocks, group_width) in enumerate(stage_shapes(config), 1):
            stage = OrderedDict[str, nn.Module]()
            for block in range(blocks):
                stride = 2 if block == 0 else 1
                stage[f"block{number}-{block}"] = Block(
                    channels, width, stride=stride, group_width=group_width
                )
                channels = width
            stages[f"block{number}"] = nn.Sequential(stage)
        self.trunk_output = nn.Sequential(stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, config.num_classes)
        initialise_convolutions(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        self.register_load_state_dict_pre_hook(on_load(regnet_names()))

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, 3)
        x = self.avgpool(self.trunk_output(self.stem(x)))
        return self.fc(torch.flatten(x, 1))


register_vision_models(RegNet, CONFIGS, {
    "regnet_x_200mf": "RegNetX of 0.2 G MACs, 2.7 M parameters.",
    "regnet_x_400mf": "RegNetX of 0.4 G MACs, 5.2 M parameters.",
    "regnet_x_400mf_tv": "RegNetX of 0.4 G MACs as torchvision has it: the last stage 400 wide, not 384; 5.5 M parameters.",
    "regnet_x_600mf": "RegNetX of 0.6 G MACs, 6.2 M parameters.",
    "regnet_x_800mf": "RegNetX of 0.8 G MACs, 7.3 M parameters.",
    "regnet_x_1_6gf": "RegNetX of 1.6 G MACs, 9.2 M parameters.",
    "regnet_x_3_2gf": "RegNetX of 3.2 G MACs, 15.3 M parameters.",
})  # fmt: skip


_TORCHVISION = "torchvision's model page"
_TIMM = "timm's results table"


def _zoo(macs: float, activations: float) -> Published:
    """The authors' table: G MACs and M activations to one decimal."""
    return Published(source="pycls, MODEL_ZOO.md", macs=round(macs * 1e9), activations=round(activations * 1e6), within=0.02)


describe_models(
    tuple(CONFIGS),
    ModelInfo(family="RegNetX", paper="2003.13678", inputs=image(3, 224)),
    {
        "regnet_x_200mf": (Published(source=_TIMM, parameters=2_680_000, within=2e-3), _zoo(0.2, 2.2)),
        "regnet_x_400mf": (Published(source=_TIMM, parameters=5_160_000, within=1e-3), _zoo(0.4, 3.1)),
        "regnet_x_400mf_tv": Published(source=_TORCHVISION, parameters=5_495_976),
        "regnet_x_600mf": (Published(source=_TIMM, parameters=6_200_000, within=1e-3), _zoo(0.6, 4.0)),
        "regnet_x_800mf": (Published(source=_TORCHVISION, parameters=7_259_656), _zoo(0.8, 5.1)),
        "regnet_x_1_6gf": (Published(source=_TORCHVISION, parameters=9_190_136), _zoo(1.6, 7.9)),
        "regnet_x_3_2gf": (Published(source=_TORCHVISION, parameters=15_296_552), _zoo(3.2, 11.4)),
    },
)
