"""Ordinary token networks as users write them, small: name -> (module, example inputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.swin import Swin, SwinConfig
from tests.compiler.modules import Apply

__all__ = ["NETWORKS", "token_network"]

C = 16
HEADS = 2


def _linear(inputs: int = C, outputs: int = C) -> nn.Linear:
    return nn.Linear(inputs, outputs)


class Attention(nn.Module):
    """Self-attention by hand, in one of the ways people write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv, self.out = _linear(C, 3 * C), _linear()
        self.q, self.k, self.v = _linear(), _linear(), _linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(getattr(self, self.way)(x, *x.shape[:2], C // HEADS))

    def separate(self, x: Tensor, batch: int, rows: int, width: int) -> Tensor:
        q, k, v = (layer(x).view(batch, rows, HEADS, width).transpose(1, 2) for layer in (self.q, self.k, self.v))
        shares = (q @ k.transpose(-2, -1) * width**-0.5).softmax(-1)
        return (shares @ v).transpose(1, 2).reshape(batch, rows, C)

    def unbind(self, x: Tensor, batch: int, rows: int, width: int) -> Tensor:
        q, k, v = self.qkv(x).reshape(batch, rows, 3, HEADS, width).permute(2, 0, 3, 1, 4).unbind(0)
        return (((q * width**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(batch, rows, C)

    def chunk(self, x: Tensor, batch: int, rows: int, width: int) -> Tensor:
        q, k, v = (part.reshape(batch, rows, HEADS, width).permute(0, 2, 1, 3) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).flatten(2)

    def einsum(self, x: Tensor, batch: int, rows: int, width: int) -> Tensor:
        q, k, v = (layer(x).view(batch, rows, HEADS, width) for layer in (self.q, self.k, self.v))
        shares = (torch.einsum("bqhd,bkhd->bhqk", q, k) * width**-0.5).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", shares, v).reshape(batch, rows, C)

    def bmm(self, x: Tensor, batch: int, rows: int, width: int) -> Tensor:
        heads = (layer(x).view(batch, rows, HEADS, width).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k, v = (part.reshape(batch * HEADS, rows, width) for part in heads)
        mixed = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) / width**0.5, -1), v)
        return mixed.view(batch, HEADS, rows, width).transpose(1, 2).reshape(batch, rows, C)


class Mixer(nn.Module):
    """MLP-Mixer block (arXiv 2105.01601): one MLP over tokens, one over channels."""

    def __init__(self, tokens: int = 7) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.tokens = nn.Sequential(_linear(tokens, 12), nn.GELU(), _linear(12, tokens))
        self.channels = nn.Sequential(_linear(C, 24), nn.GELU(), _linear(24, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class ViT(nn.Module):
    """A class token, positions, one block, and the class token or the mean of the others to the head."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.patches = nn.Conv2d(3, C, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, C)), nn.Parameter(torch.randn(1, 5, C))
        self.block = nn.TransformerEncoderLayer(C, HEADS, 24, norm_first=True, batch_first=True, activation="gelu")
        self.norm, self.head = nn.LayerNorm(C), _linear(C, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = self.norm(self.block(x))
        return self.head(x[:, 0] if self.pool == "token" else x[:, 1:].mean(1))


class ConvNeXt(nn.Module):
    """A ConvNeXt block (arXiv 2201.03545) on a map of tokens, with its layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, C, 4, 4), nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.norm, self.scale = nn.LayerNorm(C), nn.Parameter(torch.rand(C))
        self.up, self.down = _linear(C, 24), _linear(24, C)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        y = self.scale * self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


def _encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(C, HEADS, 24, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _swin() -> nn.Module:
    """Windows, shifted windows with padding, merged patches."""
    model = Swin(SwinConfig(width=8, blocks=(2, 1), heads=(2, 2), window=3, num_classes=5))
    for name, value in model.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(value, std=0.5)
    return model


def _small(function: Callable[..., Tensor], **layers: Any) -> Callable[[], nn.Module]:
    return lambda: Apply(function, **{name: make() for name, make in layers.items()})


def _rows() -> Tensor:
    return torch.randn(2, 7, C)


def _image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "encoder": (lambda: _encoder(batch_first=True), _rows),
    "encoder, norm first": (lambda: _encoder(batch_first=True, norm_first=True), _rows),
    "encoder, sequence first": (_encoder, _rows),
    "encoder, sequence and norm first": (lambda: _encoder(norm_first=True), _rows),
    **{
        f"attention, {way}": (lambda way=way: Attention(way), _rows)
        for way in ("separate", "unbind", "chunk", "einsum", "bmm")
    },
    "mixer": (lambda: nn.Sequential(Mixer(), Mixer()), _rows),
    "vit, token": (lambda: ViT("token"), _image),
    "vit, mean": (lambda: ViT("mean"), _image),
    "convnext": (ConvNeXt, _image),
    "swin": (_swin, lambda: torch.randn(1, 3, 32, 32)),
    "softmax": (_small(lambda m, x: m.a(x).softmax(-1), a=_linear), _rows),
    "softmax of tokens": (_small(lambda m, x: m.b(m.a(x).softmax(1)), a=_linear, b=_linear), _rows),
    "product": (_small(lambda m, x: m.a(x) @ m.b(x).transpose(1, 2), a=_linear, b=_linear), _rows),
    "product of columns": (_small(lambda m, x: m.b(m.a(x).transpose(1, 2) @ m.b(x)), a=_linear, b=_linear), _rows),
    "rank 5": (
        _small(lambda m, x: m.b(m.n(m.a(x)) + x), a=_linear, b=_linear, n=lambda: nn.LayerNorm(C)),
        lambda: torch.randn(2, 2, 1, 3, C),
    ),
    "rank 1": (_small(lambda m, x: m.a(x).relu(), a=_linear), lambda: torch.randn(C)),
    "joined channels": (_small(lambda m, x: m.b(torch.cat([m.a(x), x], -1)), a=_linear, b=lambda: _linear(2 * C)), _rows),
    "joined tokens": (_small(lambda m, x: m.b(torch.cat([m.a(x), x], 1)), a=_linear, b=_linear), _rows),
    "slices": (_small(lambda m, x: m.b(m.a(x)[:, 1:6:2, 3:9]), a=_linear, b=lambda: _linear(6)), _rows),
    "rolled": (_small(lambda m, x: m.b(m.a(x).roll(3, 1)), a=_linear, b=_linear), _rows),
    "reversed": (_small(lambda m, x: m.b(m.a(x).flip(1)), a=_linear, b=_linear), _rows),
    "gathered": (_small(lambda m, x: m.b(m.a(x)[:, [3, 0, 0, 6]]), a=_linear, b=_linear), _rows),
    "padded": (_small(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 2, 1))), a=_linear, b=_linear), _rows),
    "linear attention": (
        _small(
            lambda m, x: F.scaled_dot_product_attention(
                m.a(x), m.k(x.transpose(1, 2)).transpose(1, 2), m.k(m.a(x).transpose(1, 2)).transpose(1, 2)
            ),
            a=_linear, k=lambda: _linear(7, 3),
        ),
        _rows,
    ),
}  # fmt: skip


def token_network(name: str) -> tuple[nn.Module, Tensor]:
    """The module, in eval mode, and its input; the same at every call."""
    torch.manual_seed(sum(map(ord, name)))
    make, inputs = NETWORKS[name]
    return make().eval(), inputs()
