"""LLaMA, a pre-norm causal transformer with rotary positions, gated feed-forward layers and grouped-query attention as an option.

Ref: H. Touvron et al., LLaMA, arXiv 2302.13971, section 2 and table 2; rotary positions: J. Su et al., arXiv 2104.09864, eq. 34;
gated layers: N. Shazeer, arXiv 2002.05202; grouped queries: J. Ainslie et al., arXiv 2305.13245. Key names are those of Meta's
checkpoints; Hugging Face's load too. Float outputs equal ``transformers.LlamaForCausalLM`` with the same weights.

Shapes: B sequences, S tokens, C hidden channels, H heads of d = C / H channels, G key and value heads, P places of a cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.checks import check_multiple, check_numbers, check_options, check_positive, check_tokens
from models.huggingface import renamed
from models.info import Input, ModelInfo, Published
from models.registry import describe_models, register_model
from models.weights import stream_weights

__all__ = ["CONFIGS", "Cache", "Llama", "LlamaConfig", "Prompt", "build_llama", "generate", "llama_key"]


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a LLaMA; see `CONFIGS` for the published ones.

    ``kv_heads`` heads of keys and values serve all heads in groups (None: as many as heads); ``intermediate`` is the width of a
    feed-forward layer (None: 8 C / 3, rounded up to a multiple of 256).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int | None = None
    intermediate: int | None = None
    vocabulary: int = 32000
    positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(self)
        check_multiple(self, "hidden", "heads")
        if self.kv_heads is not None:
            check_multiple(self, "heads", "kv_heads")
        if self.head_dim % 2:
            raise ValueError(f"hidden / heads must be even for rotary positions, not {self.hidden} / {self.heads}")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def groups(self) -> int:
        """Heads that share keys and values."""
        return self.heads // (self.kv_heads or self.heads)

    @property
    def feed_forward(self) -> int:
        """Width of a feed-forward layer."""
        return self.intermediate or 256 * -(-(8 * self.hidden // 3) // 256)


CONFIGS = {
    "llama_7b": LlamaConfig(layers=32, hidden=4096, heads=32),
    "llama_13b": LlamaConfig(layers=40, hidden=5120, heads=40),
    "llama_30b": LlamaConfig(layers=60, hidden=6656, heads=52),
    "llama_65b": LlamaConfig(layers=80, hidden=8192, heads=64, norm_eps=1e-5),
    "llama_tiny": LlamaConfig(layers=4, hidden=64, heads=4, intermediate=160, vocabulary=512, positions=128),
    "llama_tiny_gqa": LlamaConfig(layers=4, hidden=64, heads=4, kv_heads=2, intermediate=160, vocabulary=512, positions=128),
    "llama_small": LlamaConfig(layers=6, hidden=128, heads=4, intermediate=352, vocabulary=1024, positions=256),
}

Cache: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Keys and values (B, G, P, d) of each layer; places that no token has taken yet hold anything finite."""


class Prompt(NamedTuple):
    """What `models.llama_adapter` lets a layer attend to besides the tokens: ``tokens`` (1 or B, K, C), ``gate`` (1, H, 1, 1)."""

    tokens: Tensor
    gate: Tensor


class Memory(NamedTuple):
    """A layer's cache before a step: keys and values (B, G, P, d), places (S,) of the new tokens, and what they see (S, P)."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    keep: Tensor


class Rotation(NamedTuple):
    """Cosine and sine (S, d / 2) by which each pair of channels is turned."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, config: LlamaConfig) -> Rotation:
    """Angles of positions (S,): pair i turns by position * theta ** (-2 i / d)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None].float() * (config.rope_theta**-exponents)[None, :]
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of the channels of (B, H, S, d), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * by.cos - odd * by.sin, even * by.sin + odd * by.cos], -1)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal attention, and gated attention to a prompt: (B, S, C) -> (B, S, C).

    ``keep`` (S, P) is True where a token sees a place of the cache; without a cache each token sees those before it and itself.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim, self.groups = config.head_dim, config.groups
        width = config.hidden // config.groups
        self.wq = nn.Linear(config.hidden, config.hidden, bias=False)
        self.wk = nn.Linear(config.hidden, width, bias=False)
        self.wv = nn.Linear(config.hidden, width, bias=False)
        self.wo = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(
        self, x: Tensor, turn: Rotation, memory: Memory | None = None, prompt: Prompt | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query = rotate(self._split(self.wq(x)), turn)
        key, value = rotate(self._split(self.wk(x)), turn), self._split(self.wv(x))
        if memory is not None:
            key = memory.keys.index_copy(2, memory.positions, key)
            value = memory.values.index_copy(2, memory.positions, value)
        keep = None if memory is None else memory.keep
        mixed = F.scaled_dot_product_attention(
            query, self._share(key), self._share(value), attn_mask=keep, is_causal=memory is None
        )
        if prompt is not None:
            mixed = mixed + self._attend(query, prompt)
        return self.wo(mixed.transpose(1, 2).flatten(2)), (key, value)

    def _attend(self, query: Tensor, prompt: Prompt) -> Tensor:
        """The prompt's share, (B, H, S, d): a softmax of its own, times tanh of the gate. Its keys have no position."""
        key = self._share(self._split(self.wk(prompt.tokens)))
        value = self._share(self._split(self.wv(prompt.tokens)))
        scores = query @ key.transpose(-1, -2) / self.head_dim**0.5
        weight = prompt.gate.tanh() * scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return weight.to(query.dtype) @ value

    def _split(self, x: Tensor) -> Tensor:
        """(B, S, heads * d) -> (B, heads, S, d)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _share(self, x: Tensor) -> Tensor:
        """(B, G, S, d) -> (B, H, S, d): each key head serves a group of heads."""
        return x if self.groups == 1 else x.repeat_interleave(self.groups, 1)


class FeedForward(nn.Module):
    """SwiGLU, w2(silu(w1(x)) * w3(x)): (B, S, C) -> (B, S, C)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.w2 = nn.Linear(config.feed_forward, config.hidden, bias=False)
        self.w3 = nn.Linear(config.hidden, config.feed_forward, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer, normalised before attention and feed-forward: (B, S, C) -> (B, S, C) and the layer's keys and values."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def forward(
        self, x: Tensor, turn: Rotation, memory: Memory | None = None, prompt: Prompt | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, kept = self.attention(self.attention_norm(x), turn, memory, prompt)
        x = x + mixed
        return x + self.feed_forward(self.ffn_norm(x)), kept


class Llama(nn.Module):
    """Embedding, blocks, norm and a linear head: (B, S) token numbers -> (B, S, vocabulary) logits.

    With ``cache`` (see `new_cache`) the tokens are those at ``positions`` (S,), and logits and the new cache come back: shapes
    do not change from step to step, nothing is written in place, so that ``torch.export`` takes either form.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.output = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.apply(_initialise)

    @overload
    def forward(
        self, tokens: Tensor, positions: Tensor | None = ..., cache: None = ..., prompts: Sequence[Prompt | None] | None = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, tokens: Tensor, positions: Tensor | None, cache: Cache, prompts: Sequence[Prompt | None] | None = ...
    ) -> tuple[Tensor, Cache]: ...

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        prompts: Sequence[Prompt | None] | None = None,
    ) -> Tensor | tuple[Tensor, Cache]:
        """Logits, and the new cache if one is given.

        Parameters
        ----------
        tokens
            Integers (B, S).
        positions
            Integers (S,), rising; None: 0, 1, ..., S - 1. With a cache each must be < P.
        cache
            Keys and values of earlier tokens.
        prompts
            One a layer, for the adapter.

        Raises
        ------
        ValueError
            Tokens are not (B, S), more than the model has positions, or out of range; a cache, positions or their number that do
            not fit.
        """
        check_tokens(tokens, self.config.positions, self.config.vocabulary)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        _check_places(tokens, positions, cache, len(self.layers))
        turn, kept = rotation(positions, self.config), []
        x = self.tok_embeddings(tokens)
        for number, layer in enumerate(self.layers):
            memory = None if cache is None else _memory(cache[number], positions)
            x, pair = layer(x, turn, memory, None if prompts is None else prompts[number])
            kept.append(pair)
        logits = self.output(self.norm(x))
        return logits if cache is None else (logits, tuple(kept))

    def new_cache(self, batch: int, places: int | None = None) -> Cache:
        """An empty cache for ``batch`` sequences of up to ``places`` tokens (None: all positions), in the model's dtype.

        Raises
        ------
        ValueError
            More places than positions.
        """
        config = self.config
        places = config.positions if places is None else places
        if not 1 <= places <= config.positions:
            raise ValueError(f"places must be in [1, {config.positions}], the positions of the model, not {places!r}")
        shape = (batch, config.heads // config.groups, places, config.head_dim)
        weight = self.output.weight
        return tuple((weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(config.layers))


def _check_places(tokens: Tensor, positions: Tensor, cache: Cache | None, layers: int) -> None:
    """Refuse positions that are not one a token, and a cache of other layers or sequences, or too small for them."""
    if positions.is_floating_point() or positions.shape != tokens.shape[1:]:
        kind = f"{positions.dtype} {tuple(positions.shape)}"
        raise ValueError(f"positions must be integers ({tokens.shape[1]},), one a token, not {kind}")
    if cache is None:
        return
    sequences = len(cache[0][0]) if cache else 0
    if len(cache) != layers or sequences != len(tokens):
        found = f"{len(cache)} and {sequences}"
        raise ValueError(f"the cache must have {layers} layers and {len(tokens)} sequences, not {found}: new_cache gives one")
    check_numbers(positions[None], cache[0][0].shape[2], "positions in this cache")


def _memory(pair: tuple[Tensor, Tensor], positions: Tensor) -> Memory:
    places = torch.arange(pair[0].shape[2], device=positions.device)
    return Memory(*pair, positions, places[None, :] <= positions[:, None])


def _initialise(module: nn.Module) -> None:
    """Normal weights with deviation 0.02; the paper does not say."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


# -- generation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: int | None = None,
    generator: torch.Generator | None = None,
    **inputs: Any,
) -> list[list[int]]:
    """Continue token sequences, one token a step, with a cache.

    Parameters
    ----------
    model
        A `Llama`, or a `models.llama_adapter.LlamaAdapter`.
    prompts
        Token numbers, at least one each; lengths may differ: a shorter prompt goes on while longer ones are still read.
    new_tokens
        Most tokens that a prompt is continued by.
    temperature
        0: the likeliest token. Else logits are divided by it and a token is drawn.
    top_p
        Draw from the likeliest tokens whose probabilities just reach this sum, in (0, 1].
    stop
        A token that ends a sequence; it is left out.
    inputs
        Passed on to the model, such as ``images=``.

    Returns
    -------
    list[list[int]]
        The new tokens of each prompt.

    Raises
    ------
    ValueError
        An empty prompt, or more tokens than the model has positions.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1 or new_tokens < 1:
        raise ValueError("give at least one prompt, at least one token in each, and new_tokens >= 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], not {temperature!r} and {top_p!r}")
    total = max(lengths) + new_tokens
    cache = model.new_cache(len(prompts), total)  # type: ignore[operator]
    device = cache[0][0].device
    tokens = torch.zeros(len(prompts), total, dtype=torch.int64, device=device)
    given = torch.zeros(len(prompts), total, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.as_tensor(prompt, device=device)
        given[row, : len(prompt)] = True
    seen = 0
    for place in range(min(lengths), total):
        positions = torch.arange(seen, place, device=device)
        logits, cache = model(tokens[:, seen:place], positions, cache, **inputs)
        chosen = _choose(logits[:, -1].float(), temperature, top_p, generator)
        tokens[:, place] = torch.where(given[:, place], tokens[:, place], chosen)
        seen = place
    rows = [tokens[row, length : length + new_tokens].tolist() for row, length in enumerate(lengths)]
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """A token a row of (B, vocabulary)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    nucleus = probabilities.masked_fill(before >= top_p, 0)  # the likeliest token always stays: nothing is before it
    drawn = torch.multinomial(nucleus, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]


# -- weights and names ------------------------------------------------------------------------------------------------

_HUGGING_FACE = (
    (r"^model\.embed_tokens\.", "tok_embeddings."),
    (r"^model\.norm\.", "norm."),
    (r"^lm_head\.", "output."),
    (r"^model\.layers\.", "layers."),
    (r"\.self_attn\.([qkvo])_proj\.", r".attention.w\1."),
    (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
    (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
    (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
)


def llama_key(key: str, value: Tensor, head_dim: int) -> tuple[str, Tensor] | None:
    """Meta's name and tensor of a key in a checkpoint of Meta or of Hugging Face; None for tables of angles.

    Hugging Face turns channels (i, i + d / 2) together where Meta turns (2 i, 2 i + 1), so the rows of its query and key weights
    are in another order: they are put back.
    """
    if key == "rope.freqs" or key.endswith(".rotary_emb.inv_freq"):
        return None
    if re.search(r"\.self_attn\.[qk]_proj\.weight$", key) and value.shape[0] % head_dim == 0:
        value = value.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return renamed(key, _HUGGING_FACE), value


_SLICED = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0, "tok_embeddings": 1}
"""Layers of which each of Meta's files has a part, and whether of the rows or of the columns of their weights."""


def _slice_dimension(key: str) -> int | None:
    return _SLICED.get(key.removesuffix(".weight").rpartition(".")[2])


def build_llama(
    name: str, pretrained: bool | str | Path, dtype: torch.dtype | None, overrides: dict[str, Any]
) -> Llama:
    """A named model; with a path its weights come tensor by tensor into a model that has none yet.

    Raises
    ------
    ValueError
        Unknown option, weights that do not fit, or ``pretrained=True``: no package carries weights.
    """
    check_options(name, overrides, ("dtype", *(field.name for field in fields(LlamaConfig))))
    config = replace(CONFIGS[name], **overrides)
    if pretrained is True:
        raise ValueError(f"no installable package carries weights of {name}: give pretrained= a path")
    if pretrained is False:
        return Llama(config) if dtype is None else Llama(config).to(dtype)
    with torch.device("meta"):
        model = Llama(config)
    translate = lambda key, value: llama_key(key, value, config.head_dim)
    stream_weights(model, pretrained, name=name, translate=translate, dtype=dtype, join=_slice_dimension)
    return model


def _register(name: str, summary: str) -> Callable[..., nn.Module]:
    def builder(
        *, pretrained: bool | str | Path = False, dtype: torch.dtype | None = None, **overrides: Any
    ) -> nn.Module:
        return build_llama(name, pretrained, dtype, overrides)

    builder.__name__, builder.__doc__ = name, summary
    return register_model(builder)


llama_7b = _register("llama_7b", "LLaMA-7B, 6.7 G parameters.")
llama_13b = _register("llama_13b", "LLaMA-13B, 13.0 G parameters.")
llama_30b = _register("llama_30b", "LLaMA-30B (33B in the paper), 32.5 G parameters.")
llama_65b = _register("llama_65b", "LLaMA-65B, 65.3 G parameters.")
llama_tiny = _register("llama_tiny", "4 layers of 64 channels, for tests.")
llama_tiny_gqa = _register("llama_tiny_gqa", "4 layers of 64 channels, two heads sharing keys and values, for tests.")
llama_small = _register("llama_small", "6 layers of 128 channels, trained in minutes by benchmarks/train_llama.py.")

_TABLE = "arXiv 2302.13971, table 2"
describe_models(
    ("llama_7b", "llama_13b", "llama_30b", "llama_65b"),
    ModelInfo(family="LLaMA", paper="2302.13971", inputs=(Input("tokens", (1, 128), torch.int64),)),
    {
        "llama_7b": (
            Published(source="transformers LlamaForCausalLM of these sizes", parameters=6_738_415_616),
            Published(source=_TABLE, parameters=6_700_000_000, within=1e-2),
        ),
        "llama_13b": Published(source=_TABLE, parameters=13_000_000_000, within=2e-3),
        "llama_30b": Published(source=_TABLE, parameters=32_500_000_000, within=2e-3),
        "llama_65b": Published(source=_TABLE, parameters=65_200_000_000, within=2e-3),
    },
)
describe_models(
    ("llama_tiny", "llama_tiny_gqa", "llama_small"),
    ModelInfo(family="LLaMA", paper="2302.13971", inputs=(Input("tokens", (1, 128), torch.int64),), note="ours"),
)
