"""Random modules out of what networks are made of, so that passes meet combinations that nobody thought of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HostBlock", "RandomImages", "RandomTokens", "random_case"]

HEADS, CHANNELS = 2, 16
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.hardswish, lambda x: x * torch.sigmoid(1.702 * x),
    lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3))), lambda x: x.clamp(-1, 1).square() - 0.5,
)  # fmt: skip


class _Parts(nn.Module):
    """A block's layers, and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.function(self, x, mask)


def _split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
    return torch.softmax(scores, -1) @ v


class RandomTokens(nn.Module):
    """Blocks one after the other, as drawn; some earlier values are read again, and some are results, too.

    Sums, packed projections, norms and functions written out, gates, masks, constants, and views that cancel: a reason for
    every pass there is.
    """

    def __init__(self, seed: int, *, length: int, blocks: int = 5, host: bool = False) -> None:
        super().__init__()
        self.rng, self.length, self.masked = np.random.default_rng(seed), length, False
        torch.manual_seed(seed)
        made = [self._linear, self._function, self._norm, self._rms, self._attention, self._packed, self._gate, self._scaled,
                self._views, self._matrix, self._vector, self._place, self._product, self._moved]  # fmt: skip
        chosen = [made[0], *(made[int(i)] for i in self.rng.integers(0, len(made), blocks)), made[0]]
        self.blocks = nn.ModuleList(make() for make in chosen)
        self.again = [bool(draw < 0.4) for draw in self.rng.random(len(chosen))]
        self.shown = [int(i) for i in np.flatnonzero(self.rng.random(len(chosen) - 1) < 0.15)]
        self.host = HostBlock(int(self.rng.integers(HostBlock.COUNT))) if host else None
        self.place = int(self.rng.integers(1, len(chosen)))
        self.end = self._draw("all", "rows", "flat")
        self.head = nn.Linear(CHANNELS * (length if self.end == "flat" else 1), 8)
        for layer in self.modules():
            if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
                nn.init.uniform_(layer.weight, 0.5, 1.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        results = []
        for number, (block, again) in enumerate(zip(self.blocks, self.again)):
            made = block(x, mask)
            x = x + made if again else made
            if number == self.place and self.host is not None:
                x = self.host(x)
            if number in self.shown:
                results.append(x)
        ends = {"all": self.head, "rows": lambda x: self.head(x)[:, 1:], "flat": lambda x: self.head(x.flatten(1))}
        return (*results, ends[self.end](x))

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _draw(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def _linear(self) -> nn.Module:
        width = self._draw(8, 24, 40)
        first, second = nn.Linear(CHANNELS, width, bias=self._draw(True, False)), nn.Linear(width, CHANNELS)
        function = self._draw(*FUNCTIONS, None)
        return _Parts(lambda m, x, _: m.b(m.a(x) if function is None else function(m.a(x))), a=first, b=second)

    def _function(self) -> nn.Module:
        function = self._draw(*FUNCTIONS)
        return _Parts(lambda m, x, _: function(m.a(x)), a=nn.Linear(CHANNELS, CHANNELS))

    def _norm(self) -> nn.Module:
        return _Parts(lambda m, x, _: m.n(x), n=self._draw(nn.LayerNorm, nn.RMSNorm)(CHANNELS))

    def _rms(self) -> nn.Module:
        by_hand = lambda m, x, _: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        return _Parts(by_hand, w=nn.Parameter(torch.rand(CHANNELS) + 0.5))

    def _attention(self) -> nn.Module:
        kind, masked = self._draw("whole", "written", "causal", "bias"), self._draw(True, False)
        angle = torch.arange(self.length)[:, None] / 10.0 ** torch.arange(CHANNELS // HEADS // 2)
        cos, sin, turned = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2), self._draw(True, False)
        bias = torch.randn(HEADS, self.length, self.length)
        masked = masked and kind != "causal"
        self.masked |= masked

        def attend(m: Any, x: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = (_split(part(x)) for part in (m.q, m.k, m.v))
            if turned:  # rotary positions
                half = q.shape[-1] // 2
                q, k = (y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin for y in (q, k))
            keep = mask if masked else None
            if kind == "whole":
                mixed = F.scaled_dot_product_attention(q, k, v, None if keep is None else keep[:, None, None, :].bool())
            elif kind == "causal":
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                mixed = _written_out(q, k, v, bias if kind == "bias" else None, keep)
            return m.o(mixed.transpose(1, 2).flatten(2))

        return _Parts(attend, **{name: nn.Linear(CHANNELS, CHANNELS) for name in "qkvo"})

    def _packed(self) -> nn.Module:
        def attend(m: Any, x: Tensor, _: Tensor | None) -> Tensor:
            q, k, v = m.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return m.o(_written_out(q if factor is None else q * factor, k, v, None, None).transpose(1, 2).flatten(2))

        factor = self._draw(None, 0.5, 1.7)
        return _Parts(attend, qkv=nn.Linear(CHANNELS, 3 * CHANNELS), o=nn.Linear(CHANNELS, CHANNELS))

    def _gate(self) -> nn.Module:
        layers = {"g": nn.Linear(CHANNELS, 24), "u": nn.Linear(CHANNELS, 24), "d": nn.Linear(24, CHANNELS)}
        return _Parts(lambda m, x, _: m.d(F.silu(m.g(x)) * m.u(x)), **layers)

    def _scaled(self) -> nn.Module:
        factor = float(self.rng.uniform(0.1, 2))
        return _Parts(lambda m, x, _: m.a(x) * factor, a=nn.Linear(CHANNELS, CHANNELS))

    def _views(self) -> nn.Module:
        kind = self._draw("rows", "turned", "unsqueezed")

        def around(m: Any, x: Tensor, _: Tensor | None) -> Tensor:
            if kind == "rows":
                return m.a(x.flatten(0, 1)).view(x.shape)
            if kind == "turned":
                return m.a(x.transpose(0, 1)).transpose(0, 1)
            return m.a(x.unsqueeze(0)).squeeze(0)

        return _Parts(around, a=nn.Linear(CHANNELS, CHANNELS))

    def _vector(self) -> nn.Module:
        return _Parts(lambda m, x, _: m.a(x) * m.w, a=nn.Linear(CHANNELS, CHANNELS), w=nn.Parameter(torch.rand(CHANNELS) + 0.5))

    def _place(self) -> nn.Module:
        return _Parts(lambda m, x, _: m.a(x + m.p), a=nn.Linear(CHANNELS, CHANNELS),
                      p=nn.Parameter(torch.randn(self.length, CHANNELS)))  # fmt: skip

    def _product(self) -> nn.Module:
        """A product of activations that is no attention: channels against channels."""
        layers = {"a": nn.Linear(CHANNELS, CHANNELS), "b": nn.Linear(CHANNELS, CHANNELS)}
        return _Parts(lambda m, x, _: x + m.a(x) @ (m.b(x).transpose(1, 2) @ x) / self.length, **layers)

    def _moved(self) -> nn.Module:
        """Rows that are turned around, cut and joined."""
        kind, layer = self._draw("rolled", "rolled after", "joined"), nn.Linear(CHANNELS, CHANNELS)
        ways: dict[str, Callable[..., Tensor]] = {
            "rolled": lambda m, x, _: m.a(x.roll(1, 1)),
            "rolled after": lambda m, x, _: m.a(x).roll(1, 1),
            "joined": lambda m, x, _: m.a(torch.cat([x[:, 1:], x[:, :1]], 1)),
        }
        return _Parts(ways[kind], a=layer)

    def _matrix(self) -> nn.Module:
        weight, bias = nn.Parameter(torch.randn(CHANNELS, CHANNELS) / 4), nn.Parameter(torch.randn(CHANNELS))
        return _Parts(lambda m, x, _: x @ m.w + m.c, w=weight, c=bias)


class HostBlock(nn.Module):
    """Something that the accelerator does not do: (batch, rows, channels) -> the same shape."""

    FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x.cumsum(1) / 4,
        lambda x: x.flip(1),
        lambda x: torch.softmax(x, 1) * 3,
        lambda x: torch.cat([x[:, :1], x[:, 1:] * 0.5], 1),
        lambda x: x[:, :1].expand_as(x) + x,
        lambda x: torch.where(x > x.mean(), x, x * 0.1),
        lambda x: x.topk(x.shape[-1], -1).values,
        lambda x: x.transpose(1, 2).reshape(x.shape),
        lambda x: torch.log(torch.sigmoid(x).clamp(min=1e-4)),
    )
    COUNT = len(FUNCTIONS)

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return self.FUNCTIONS[self.number](x)


class RandomImages(nn.Module):
    """Convolutions with norms, sums, gates, padding and pooling: images (B, 3, H, W) -> logits (B, 5)."""

    def __init__(self, seed: int, size: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.layers, channels = nn.ModuleList(), 3
        for _ in range(int(rng.integers(2, 5))):
            kernel, out = int(rng.choice([1, 3, 5])), int(rng.choice([8, 16]))
            groups = int(rng.choice([1, 1, 4])) if channels % 4 == 0 else 1
            padded = kernel > 1 and bool(rng.random() < 0.4)
            self.layers.append(nn.Sequential(
                nn.ZeroPad2d(kernel // 2) if padded else nn.Identity(),
                nn.Conv2d(channels, out, kernel, int(rng.choice([1, 1, 2])), 0 if padded else kernel // 2, groups=groups),
                nn.BatchNorm2d(out), nn.ReLU() if rng.random() < 0.7 else nn.ReLU6(),
            ))  # fmt: skip
            after = (_Inner(out), nn.MaxPool2d(3, 2, 1), nn.Identity(), _Gate(out))
            self.layers.append(after[int(rng.choice(4, p=[0.4, 0.2, 0.2, 0.2]))])
            channels = out
        with torch.no_grad():
            shape = self.eval()._features(torch.zeros(1, 3, size, size)).shape
        self.flat = bool(rng.random() < 0.4)
        self.head = nn.Linear(shape[1:].numel() if self.flat else channels, 5)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 1.5)

    def _features(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self._features(x)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


class _Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.a(x.mean((2, 3), keepdim=True)))


class _Inner(nn.Module):
    """A residual block of images."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.a(x))))


def random_case(seed: int, *, host: bool = False) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A module in eval mode and its inputs: every fourth a network of images."""
    rng = np.random.default_rng(seed + 1000)
    if seed % 4 == 3 and not host:
        size = int(rng.integers(8, 13))
        return RandomImages(seed, size).eval(), (torch.randn(int(rng.integers(1, 3)), 3, size, size),)
    batch, length = int(rng.integers(1, 3)), int(rng.integers(3, 8))
    module = RandomTokens(seed, length=length, host=host).eval()
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - 1 :] = 0
    x = torch.randn(batch, length, CHANNELS)
    return module, (x, mask) if module.masked else (x,)
