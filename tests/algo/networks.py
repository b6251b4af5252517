"""Small networks whose channels are coupled in every way, for the tests of structured pruning."""

import random

import torch
from torch import nn
from torch.nn import functional as F

IMAGES = (3, 12, 12)


def conv(inputs, outputs, kernel=3, **options):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    def __init__(self, inputs, inner):
        super().__init__()
        self.first, self.second = conv(inputs, inner), conv(inner, inputs)
        self.channels = inputs

    def forward(self, x):
        return F.relu(x + self.second(self.first(x)))


class Dense(nn.Module):
    """Concatenation of the input and what is made of it."""

    def __init__(self, inputs, inner):
        super().__init__()
        self.more = conv(inputs, inner)
        self.channels = inputs + inner

    def forward(self, x):
        return torch.cat([x, self.more(x)], dim=1)


class Grouped(nn.Module):
    def __init__(self, inputs, inner, *, groups):
        super().__init__()
        self.first = conv(inputs, inner * groups, 1)
        self.grouped = conv(inner * groups, 2 * inner * groups, groups=groups)
        self.last = conv(2 * inner * groups, inputs, 1)
        self.channels = inputs

    def forward(self, x):
        return self.last(self.grouped(self.first(x)))


class DepthWise(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.depth_wise, self.point_wise = conv(inputs, inputs, groups=inputs), nn.Conv2d(inputs, inputs, 1)
        self.act = nn.PReLU(inputs)
        self.channels = inputs

    def forward(self, x):
        return self.act(self.point_wise(self.depth_wise(x)))


class Gated(nn.Module):
    """Squeeze and excite, and a scale a channel."""

    def __init__(self, inputs, inner):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(inputs, inner), nn.Linear(inner, inputs)
        self.scale = nn.Parameter(torch.rand(inputs, 1, 1) + 0.5)
        self.body = conv(inputs, inputs)
        self.channels = inputs

    def forward(self, x):
        x = self.body(x) * self.scale
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class Shared(nn.Module):
    """One head on two scales, as a detector has it."""

    def __init__(self, inputs, inner):
        super().__init__()
        self.head, self.merge = conv(inputs, inner), nn.Conv2d(2 * inner, inputs, 1)
        self.channels = inputs

    def forward(self, x):
        fine, coarse = self.head(x), self.head(F.avg_pool2d(x, 2))
        return self.merge(torch.cat([fine, F.interpolate(coarse, size=fine.shape[-2:])], dim=1))


class Halves(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.body, self.last = nn.Conv2d(inputs, 8, 3, padding=1), nn.Conv2d(4, inputs, 1)
        self.channels = inputs

    def forward(self, x):
        value, gate = self.body(x).chunk(2, dim=1)
        return self.last(value * gate.sigmoid())


class Network(nn.Module):
    """Stem, blocks, and a Linear after pooling or after flattening all pixels."""

    def __init__(self, blocks, *, stem, flatten):
        super().__init__()
        self.stem = conv(3, stem)
        self.blocks = nn.Sequential(*blocks)
        self.flatten = flatten
        last = blocks[-1].channels if blocks else stem
        self.norm = nn.BatchNorm2d(last)
        self.head = nn.Linear(last * (9 if flatten else 1), 5)

    def forward(self, x):
        x = self.norm(self.blocks(self.stem(x)))
        x = F.adaptive_avg_pool2d(x, 3 if self.flatten else 1)
        return self.head(x.flatten(1))


def random_network(seed):
    """Two to four blocks of random kinds and widths, with norms that are not the identity."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    channels = stem = choose.choice([4, 5, 8])
    blocks = []
    for _ in range(choose.randint(2, 4)):
        inner = choose.choice([2, 3, 6])
        block = choose.choice([
            lambda c, i: Residual(c, i), lambda c, i: Dense(c, i), lambda c, i: Grouped(c, i, groups=3),
            lambda c, i: DepthWise(c), lambda c, i: Gated(c, i), lambda c, i: Shared(c, i), lambda c, i: Halves(c),
        ])(channels, inner)  # fmt: skip
        blocks.append(block)
        channels = block.channels
    return settle(Network(blocks, stem=stem, flatten=choose.random() < 0.5))


NARROW = {
    "resnet18": {"width": 8, "blocks": (1, 2, 1)},
    "resnext50_32x4d": {"width": 32, "blocks": (1, 2)},
    "mobilenet_v2": {"width": 0.25, "stages": ((1, 16, 1, 1), (6, 24, 2, 2), (6, 96, 1, 2)), "head": 64, "dropout": 0.0},
    "regnet_x_200mf": {"depth": 6},
}
"""Options that make named networks small and keep every kind of block."""


def settle(model):
    """Norms as after some training, so that no channel is like another; eval mode."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value, low in ((part.weight, 0.5), (part.bias, -0.1), (part.running_mean, -0.5), (part.running_var, 0.5)):
                nn.init.uniform_(value, low, low + 1)
    return model.eval()


def images(batch=3, seed=0):
    return torch.randn(batch, *IMAGES, generator=torch.Generator().manual_seed(seed))
