"""Small convolutional networks in the manners in which people write them, for tests of the compiler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETWORKS", "settled"]


def settled(module: nn.Module) -> nn.Module:
    """In eval mode, with statistics in its batch normalisations as training leaves them."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, 0, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return module.eval()


def block(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU
) -> nn.Module:
    """Convolution, batch normalisation, function."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


class LeNet(nn.Module):
    """LeCun et al. 1998, with the sigmoids of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.avg_pool2d(torch.tanh(self.conv2(x)), 2)
        return self.fc2(torch.tanh(self.fc1(torch.flatten(x, 1))))


class VGG(nn.Module):
    """Simonyan and Zisserman 2014: pooling after blocks, an adaptive pooling that does nothing, a wide classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(block(3, 8), nn.MaxPool2d(2), block(8, 12), block(12, 12), nn.MaxPool2d(2))
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(nn.Linear(108, 20), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(20, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Perceptron(nn.Module):
    """An image as one long row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvNeXtBlock(nn.Module):
    """Depth-wise convolution, norm and MLP with the channels last, a factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Liu et al. 2022."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 4, 4), ConvNeXtBlock(8)
        self.norm, self.down = nn.LayerNorm(8), nn.Conv2d(8, 12, 2, 2)
        self.last, self.head = nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = self.down(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.head(self.last(x.mean([-2, -1])))


class Signal(nn.Module):
    """A network on lines."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(4, 10, 7, stride=2, padding=3), nn.BatchNorm1d(10), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(10, 12, 5, padding="same"), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(12, 12, 3, dilation=2, groups=12),
            nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Odd(nn.Module):
    """Kernels, strides and paddings that are not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 7, (3, 5), (2, 1), (1, 2))
        self.b = nn.Conv2d(7, 11, (1, 4), padding="same")
        self.c = nn.Conv2d(11, 13, (4, 2), (1, 3), (0, 1), dilation=(2, 1))
        self.fc = nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.b(F.leaky_relu(self.a(x), 0.1)))
        return self.fc(F.elu(self.c(x)).mean((2, 3)))


class NegativePooling(nn.Module):
    """The largest of values on both sides of zero, windows over the edge."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3),
            nn.MaxPool2d(2, ceil_mode=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class OnePixel(nn.Module):
    """Images of one pixel, several of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(5, 9, 1), nn.ReLU(), nn.Conv2d(9, 9, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(9, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet": (LeNet, (1, 1, 12, 12)),
    "VGG": (VGG, (1, 3, 12, 12)),
    "perceptron": (Perceptron, (4, 1, 8, 8)),
    "ConvNeXt": (ConvNeXt, (1, 3, 16, 16)),
    "signal": (Signal, (2, 4, 48)),
    "odd": (Odd, (1, 3, 13, 13)),
    "negative pooling": (NegativePooling, (1, 3, 13, 11)),
    "one pixel": (OnePixel, (3, 5, 1, 1)),
}
"""Class and input shape."""
