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


class DenseLayer(nn.Module):
    """Huang et al. 2017: what a layer makes is joined to what it reads."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))], 1)


class DenseNet(nn.Module):
    """Two layers, a transition, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), DenseLayer(8, 4), DenseLayer(12, 4), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 10, 1), nn.AvgPool2d(2), DenseLayer(10, 4), nn.BatchNorm2d(14), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 6),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class UNet(nn.Module):
    """Ronneberger et al. 2015: down, up in one of several manners, and across."""

    def __init__(self, up: str) -> None:
        super().__init__()
        self.left, self.bottom, self.right = block(3, 8), block(8, 12), block(16, 8)
        if up == "transposed":
            self.up: nn.Module = nn.ConvTranspose2d(12, 8, 3, 2, padding=1, output_padding=1)
        else:
            self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode=up), nn.Conv2d(12, 8, 1))
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        up = self.up(self.bottom(F.max_pool2d(left, 2)))
        return self.out(self.right(torch.cat([up, left], 1)))


class FPN(nn.Module):
    """Lin et al. 2017: coarse maps go down to fine ones; several results."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = block(3, 8, 3, 2), block(8, 12, 3, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 6, 1) for c in (8, 12))
        self.output = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x)
        coarse = self.lateral[1](self.coarse(fine))
        fine = self.lateral[0](fine) + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return self.output[0](fine), self.output[1](coarse)


class ShuffleUnit(nn.Module):
    """Ma et al. 2018: half of the channels pass by, and all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            block(half, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half),
            block(half, half, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        x = torch.cat([kept, self.branch(changed)], 1)
        batch, channels, high, wide = x.shape
        return x.view(batch, 2, channels // 2, high, wide).transpose(1, 2).reshape(batch, channels, high, wide)


class ShuffleNet(nn.Module):
    """Two units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(block(3, 12, 3, 2), ShuffleUnit(12), ShuffleUnit(12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean([2, 3]))


class Inception(nn.Module):
    """Szegedy et al. 2015: branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.head = block(3, 8), block(8, 4, 1), nn.Conv2d(18, 5, 1)
        self.three = nn.Sequential(block(8, 3, 1), block(3, 6))
        self.five, self.pool = block(8, 4, 5), nn.Sequential(nn.MaxPool2d(3, 1, 1), block(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)
        return self.head(F.avg_pool2d(x, 3, 1, 1)).mean((2, 3))


class Padding(nn.Module):
    """Zeros around an image by hand, on one side, and its own pixels mirrored."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 4, 3)
        self.zeros, self.mirror = nn.ZeroPad2d((0, 1, 0, 1)), nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(self.zeros(F.relu(self.a(F.pad(x, (1, 1, 1, 1)))))))
        return self.c(self.mirror(x))


class PixelShuffle(nn.Module):
    """Shi et al. 2016: channels become pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(block(1, 8), nn.Conv2d(8, 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Normalised(nn.Module):
    """Subtracts mean and divides by deviation of each colour."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))
        self.conv, self.head = block(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv((x - self.mean) / self.deviation).mean((2, 3)))


class Tokens(nn.Module):
    """Dosovitskiy et al. 2020: patches of an image become tokens, one more among them; then an image again, and convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 17, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.depthwise, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.layer(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position)
        image = x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        x = torch.cat([x[:, :1], F.gelu(self.depthwise(image)).flatten(2).transpose(1, 2)], 1)
        return self.head(x.mean(1))


class Attended(nn.Module):
    """Hu et al. 2018 with linear layers, then with convolutions and a residual; Woo et al. 2018: a map of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = block(3, 8), nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.map, self.head = nn.Conv2d(8, 1, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, channels, _, _ = x.shape
        scale = F.adaptive_avg_pool2d(x, 1).view(batch, channels)
        scale = torch.sigmoid(self.up(F.relu(self.down(scale)))).view(batch, channels, 1, 1)
        x = x * scale.expand_as(x)
        y = self.body(x)
        x = F.relu(x + y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))))
        return self.head((x * torch.sigmoid(self.map(x))).mean((2, 3)))


class Gated(nn.Module):
    """Cai et al. 2021: edges between blocks with weights that depend on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = block(3, 8), block(8, 8), block(8, 8)
        self.router, self.head = nn.Linear(8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        edges = torch.sigmoid(self.router(x.mean((2, 3))))
        edges = (edges * (edges > 0.1))[:, :, None, None, None]
        a = self.a(x)
        return self.head(self.b(edges[:, 0] * x + edges[:, 1] * a).mean((2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet": (LeNet, (1, 1, 12, 12)),
    "VGG": (VGG, (1, 3, 12, 12)),
    "perceptron": (Perceptron, (4, 1, 8, 8)),
    "ConvNeXt": (ConvNeXt, (1, 3, 16, 16)),
    "signal": (Signal, (2, 4, 48)),
    "odd": (Odd, (1, 3, 13, 13)),
    "negative pooling": (NegativePooling, (1, 3, 13, 11)),
    "one pixel": (OnePixel, (3, 5, 1, 1)),
    "DenseNet": (DenseNet, (1, 3, 8, 8)),
    "UNet, nearest": (lambda: UNet("nearest"), (1, 3, 8, 8)),
    "UNet, bilinear": (lambda: UNet("bilinear"), (1, 3, 8, 8)),
    "UNet, transposed": (lambda: UNet("transposed"), (1, 3, 8, 8)),
    "FPN": (FPN, (2, 3, 12, 12)),
    "ShuffleNet": (ShuffleNet, (1, 3, 12, 12)),
    "Inception": (Inception, (1, 3, 8, 8)),
    "padding": (Padding, (1, 3, 9, 9)),
    "pixel shuffle": (PixelShuffle, (1, 1, 6, 6)),
    "normalised": (Normalised, (2, 3, 7, 7)),
    "attended": (Attended, (2, 3, 7, 7)),
    "gated": (Gated, (1, 3, 6, 6)),
    "tokens": (Tokens, (2, 3, 16, 16)),
}
"""Class and input shape."""
