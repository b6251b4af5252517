"""Modules and inputs that the tests of the front end, the passes and the quantiser share."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.frontend import trace
from compiler.graph import Graph
from compiler.passes import run_passes

__all__ = [
    "CASES",
    "Apply",
    "attention_layers",
    "bert_attention",
    "keep_mask",
    "make",
    "split_heads",
    "stages",
    "timm_attention",
]

Call = Callable[..., Any]


class Apply(nn.Module):
    """A module from a function of itself and its inputs, and the layers it uses."""

    def __init__(self, function: Call, **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def keep_mask() -> Tensor:
    """int64 (2, 7): the second sequence has 4 tokens."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return mask


def split_heads(x: Tensor) -> Tensor:
    """(2, 7, 24) -> (2, 3, 7, 8)."""
    return x.view(2, 7, 3, 8).transpose(1, 2)


def bert_attention(m: Any, x: Tensor, mask: Tensor, masked: Call) -> Tensor:
    """Attention written out; `masked` changes the scores."""
    scores = split_heads(m.q(x)) @ split_heads(m.k(x)).transpose(-1, -2) / 8**0.5
    mixed = torch.softmax(masked(scores, mask), -1) @ split_heads(m.v(x))
    return m.o(mixed.transpose(1, 2).reshape(2, 7, 24))


def timm_attention(m: Any, x: Tensor) -> Tensor:
    """Packed q, k, v in the manner of timm, scale on q."""
    q, k, v = m.qkv(x).reshape(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o((((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 24))


def _chunked(m: Any, x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in m.qkv(x).chunk(3, -1))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attention_layers() -> dict[str, nn.Module]:
    return {name: nn.Linear(24, 24) for name in "qkvo"}


def _itself(x: Tensor) -> Tensor:
    """Attention of a tensor to itself, without layers."""
    return F.scaled_dot_product_attention(*[split_heads(x)] * 3).transpose(1, 2).flatten(2)


def _encoder(layers: int, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True, **options)
    norm = nn.LayerNorm(24) if options.get("norm_first") else None
    return nn.TransformerEncoder(layer, layers, norm=norm, enable_nested_tensor=False)


def _gelu_by_hand(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(0.5 * y * (1 + torch.tanh(0.79788456 * (y + 0.044715 * y**3))))


def _mlp(m: Any, x: Tensor) -> Tensor:
    return m.b(F.gelu(m.a(x)))


def _causal_and_padding(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return bert_attention(
        m, x, mask,
        lambda s, m: s.masked_fill(torch.ones(7, 7).triu(1).bool(), -1e9).masked_fill(m[:, None, None, :] == 0, -1e9),
    )  # fmt: skip


def _grouped(m: Any, x: Tensor, *, repeat: bool) -> Tensor:
    """Four heads of queries, two of keys and values, causal."""
    q, k, v = (part.unflatten(-1, (-1, 6)).transpose(1, 2) for part in (m.q(x), m.k(x), m.v(x)))
    if repeat:
        k, v = (part[:, :, None].expand(2, 2, 2, 7, 6).reshape(2, 4, 7, 6) for part in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat)
    return m.o(mixed.transpose(1, 2).flatten(2))


def _grouped_layers() -> dict[str, nn.Module]:
    return {"q": nn.Linear(24, 24), "k": nn.Linear(24, 12), "v": nn.Linear(24, 12), "o": nn.Linear(24, 24)}


def _rms_by_hand(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(m.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)))


def _two() -> dict[str, nn.Module]:
    return {"a": nn.Linear(24, 48), "b": nn.Linear(48, 24)}


X, ROWS = (2, 7, 24), (9, 24)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "causal and padding mask": (
        lambda: Apply(_causal_and_padding, **attention_layers()),
        lambda: (torch.randn(X), keep_mask()),
    ),
    "position bias": (
        lambda: Apply(
            lambda m, x: bert_attention(m, x, x, lambda s, _: s + torch.arange(147.0).sin().view(3, 7, 7)), **attention_layers()
        ),
        lambda: torch.randn(X),
    ),
    "grouped queries": (
        lambda: Apply(lambda m, x: _grouped(m, x, repeat=False), **_grouped_layers()),
        lambda: torch.randn(X),
    ),
    "grouped queries, repeated keys": (
        lambda: Apply(lambda m, x: _grouped(m, x, repeat=True), **_grouped_layers()),
        lambda: torch.randn(X),
    ),
    "cross-attention": (
        lambda: Apply(lambda m, x, y: m.a(x, y, y, need_weights=False)[0], a=nn.MultiheadAttention(24, 3, batch_first=True)),
        lambda: (torch.randn(X), torch.randn(2, 5, 24)),
    ),
    "RMSNorm written out": (
        lambda: Apply(_rms_by_hand, a=nn.Linear(24, 48), b=nn.Linear(48, 24), weight=nn.Parameter(torch.rand(48) + 0.5)),
        lambda: torch.randn(X),
    ),
    "linear": (lambda: nn.Linear(24, 5), lambda: torch.randn(ROWS)),
    "mlp with dropout": (
        lambda: nn.Sequential(
            nn.Linear(24, 48), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(48, 24), nn.LayerNorm(24)
        ),
        lambda: torch.randn(ROWS),
    ),
    "norms": (
        lambda: nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24, bias=False), nn.RMSNorm(24), nn.Tanh()),
        lambda: torch.randn(X),
    ),
    "residual": (lambda: Apply(lambda m, x: x + _mlp(m, x), **_two()), lambda: torch.randn(X)),
    "residual and norm": (
        lambda: Apply(lambda m, x: m.n(x + _mlp(m, x)), n=nn.LayerNorm(24), **_two()),
        lambda: torch.randn(X),
    ),
    "activation after residual": (
        lambda: Apply(lambda m, x: F.relu(_mlp(m, x) + x), **_two()),
        lambda: torch.randn(X),
    ),
    "stream read twice": (
        lambda: Apply(
            lambda m, x: m.c(m.b(y := x + m.a(x)) + y),
            a=nn.Linear(24, 24),
            b=nn.Linear(24, 24),
            c=nn.Linear(24, 8),
        ),
        lambda: torch.randn(X),
    ),
    "x + x": (lambda: Apply(lambda m, x: m.a(x + x), a=nn.Linear(24, 24)), lambda: torch.randn(X)),
    "scaled residual": (
        lambda: Apply(lambda m, x: x + 0.5 * m.a(x), a=nn.Linear(24, 24)),
        lambda: torch.randn(X),
    ),
    "weight and bias by hand": (
        lambda: Apply(
            lambda m, x: x @ m.w + m.b, w=nn.Parameter(torch.randn(24, 8) / 5), b=nn.Parameter(torch.randn(8))
        ),
        lambda: torch.randn(X),
    ),
    "rows flattened and back": (
        lambda: Apply(lambda m, x: m.a(x.view(-1, 24)).view(2, 7, 12), a=nn.Linear(24, 12)),
        lambda: torch.randn(X),
    ),
    "gelu by hand": (
        lambda: Apply(_gelu_by_hand, a=nn.Linear(24, 24), b=nn.Linear(24, 24)),
        lambda: torch.randn(X),
    ),
    "two outputs": (
        lambda: Apply(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(24, 24), b=nn.Linear(24, 3)),
        lambda: torch.randn(X),
    ),
    "timm attention": (
        lambda: Apply(timm_attention, qkv=nn.Linear(24, 72), o=nn.Linear(24, 24)),
        lambda: torch.randn(X),
    ),
    "chunked attention": (
        lambda: Apply(_chunked, qkv=nn.Linear(24, 72), o=nn.Linear(24, 24)),
        lambda: torch.randn(X),
    ),
    "attention with weights": (
        lambda: Apply(
            lambda m, x, k: m.a(x, x, x, key_padding_mask=k == 0)[0],
            a=nn.MultiheadAttention(24, 3, batch_first=True),
        ),
        lambda: (torch.randn(X), keep_mask()),
    ),
    "unbatched attention": (
        lambda: Apply(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(24, 3)),
        lambda: torch.randn(ROWS),
    ),
    "cross attention": (
        lambda: Apply(
            lambda m, x, y: m.a(x, y, y, need_weights=False)[0],
            a=nn.MultiheadAttention(24, 3, batch_first=True),
        ),
        lambda: (torch.randn(X), torch.randn(2, 5, 24)),
    ),
    "attention of attention": (
        lambda: Apply(lambda m, x: m.a(_itself(_itself(m.b(x)))), a=nn.Linear(24, 24), b=nn.Linear(24, 24)),
        lambda: torch.randn(X),
    ),
    "post-LN encoder": (lambda: _encoder(2), lambda: torch.randn(X)),
    "post-LN encoder, gelu, mask": (
        lambda: _encoder(1, activation="gelu"),
        lambda: {"src": torch.randn(X), "src_key_padding_mask": keep_mask() == 0},
    ),
    "pre-LN encoder, mask": (
        lambda: _encoder(2, norm_first=True),
        lambda: {"src": torch.randn(X), "src_key_padding_mask": keep_mask() == 0},
    ),
    "pre-LN encoder, gelu": (lambda: _encoder(1, norm_first=True, activation="gelu"), lambda: torch.randn(X)),
    "one head, one row": (
        lambda: nn.TransformerEncoderLayer(24, 1, 48, batch_first=True),
        lambda: torch.randn(3, 1, 24),
    ),
    "heads of one channel": (
        lambda: nn.TransformerEncoderLayer(24, 24, 32, batch_first=True),
        lambda: torch.randn(1, 5, 24),
    ),
}


def make(name: str) -> tuple[nn.Module, Any]:
    """A seeded module in eval mode and its inputs; norms are not trivial."""
    torch.manual_seed(len(name))
    build, inputs = CASES[name]
    module = build().eval()
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            if getattr(layer, "bias", None) is not None:
                nn.init.normal_(layer.bias)
        if isinstance(layer, nn.MultiheadAttention):
            nn.init.normal_(layer.in_proj_bias)
    return module, inputs()


@cache
def stages(name: str) -> tuple[Graph, ...]:
    """The graph of a case as traced and after each pass."""
    module, inputs = make(name)
    graph = trace(module, inputs)
    return (graph, *run_passes(graph))
