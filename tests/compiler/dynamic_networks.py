"""Networks whose parameters or operators depend on the shapes of their inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Branching", "Causal", "Masked", "Pixels", "Rotary", "Scores"]


class Causal(nn.Module):
    """Token numbers, a class token, a slice of the positions, a causal mask of the length, a mean over tokens."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.position = nn.Parameter(torch.randn(40, width) * 0.5)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.first.expand(len(tokens), -1, -1), self.embedding(tokens)], 1)
        length = x.shape[1]
        mask = torch.triu(torch.full((length, length), -torch.inf), 1)
        x = self.layer(x + self.position[:length], src_mask=mask, is_causal=True)
        return self.head(x.mean(1)), x


class Rotary(nn.Module):
    """RMSNorm, attention with angles that are computed for the length, a gated unit."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.last = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1]).float(), 0.3 ** torch.arange(4).float()).repeat(1, 2)
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (t * angles.cos() + torch.cat([-t[..., 4:], t[..., :4]], -1) * angles.sin() for t in (q, k))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.last(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Masked(nn.Module):
    """Embedded tokens and their mask."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        x = self.norm(x + self.o(mixed.transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(x)))


class Pixels(nn.Module):
    """Convolutions of images of any size, a residual, pooling, a mean over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.norm(self.stem(image))), 3, 2, 1)
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(x.mean((2, 3))), x


class Scores(nn.Module):
    """As many channels as tokens: a softmax over the length that is a result."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)


class Branching(nn.Module):
    """Another network for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.short, self.long = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.short(x) if x.shape[1] < 6 else F.relu(self.long(x))
