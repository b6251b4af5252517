"""The demo's task: is a movie sentence positive or negative? MiniLM-L6, fine-tuned and pruned on real
sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from algo.batches import walk
from algo.checkpoint import load_model
from algo.data import Sentence, movie_sentences
from algo.finetune import PipelineConfig, PipelineResult, prune_pipeline
from algo.idp import IDPConfig
from algo.nm import NM
from algo.sparsify import Pattern
from algo.train import Batches, LossFn, TrainConfig
from models.bert import BertClassifier
from models.registry import create_model
from models.tokenizer import load_tokenizer

__all__ = [
    "Batch",
    "SentimentConfig",
    "SentimentData",
    "accuracy",
    "build_model",
    "collate",
    "load_classifier",
    "logits_of",
    "prepare",
    "train",
]


class Batch(NamedTuple):
    """``ids`` and ``mask`` int64 (B, S), ``labels`` int64 (B,), ``numbers`` int64 (B,): places in the data
    set."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class Encoded:
    """A tokenised sentence: its token numbers, label and text."""

    ids: tuple[int, ...]
    label: int
    text: str


@dataclass(frozen=True)
class SentimentData:
    """Tokenised training and held-out sentences, split by ``seed``."""

    train: Sequence[Encoded]
    test: Sequence[Encoded]
    seed: int


@dataclass(frozen=True, kw_only=True)
class SentimentConfig:
    """The demo's training, sized for two cores.

    ``sentences`` per epoch are drawn without replacement; epochs walk on through all training sentences.
    ``distill`` in [0, 1] is the share of the dense model's opinion in the loss of the pruning levels.
    """

    model: str = "minilm_l6"
    sentences: int = 5000
    batch_size: int = 32
    max_length: int = 64
    distill: float = 0.5
    dropout: float = 0.1
    train_embeddings: bool = True
    dense: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=2))
    idp: IDPConfig = field(default_factory=lambda: IDPConfig(train=TrainConfig(lr=1e-4)))

    def __post_init__(self) -> None:
        for name in ("sentences", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, not {getattr(self, name)!r}")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill must be in [0, 1], not {self.distill!r}")


def prepare(
    seed: int = 0, *, test_size: int = 2000, max_length: int = 64, model: str = "minilm_l6"
) -> SentimentData:
    """Load, split and tokenise the movie sentences; longer ones are cut to ``max_length`` tokens."""
    train_set, test_set = movie_sentences(seed=seed, test_size=test_size)
    tokenizer = load_tokenizer(model)
    tokenizer.enable_truncation(max_length)

    def encode(sentences: list[Sentence]) -> list[Encoded]:
        codes = tokenizer.encode_batch([text for text, _ in sentences])
        return [
            Encoded(tuple(code.ids), label, text)
            for code, (text, label) in zip(codes, sentences, strict=True)
        ]

    return SentimentData(encode(train_set), encode(test_set), seed)


def collate(sentences: Sequence[Encoded], numbers: Sequence[int]) -> Batch:
    """Pad the numbered sentences to the longest of them."""
    length = max(len(sentences[number].ids) for number in numbers)
    ids = torch.zeros(len(numbers), length, dtype=torch.int64)
    for row, number in enumerate(numbers):
        code = sentences[number].ids
        ids[row, : len(code)] = torch.tensor(code)
    labels = torch.tensor([sentences[number].label for number in numbers])
    return Batch(ids, (ids != 0).long(), labels, torch.tensor(numbers))


def build_model(config: SentimentConfig, *, seed: int = 0) -> BertClassifier:
    """The pretrained encoder with a new linear head for two classes, initialised by ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(
            config.model,
            pretrained=True,
            num_classes=2,
            dropout=config.dropout,
            attention_dropout=0.0,
        )
    if not isinstance(model, BertClassifier):
        raise ValueError(f"{config.model} is no sentence classifier")
    model.bert.embeddings.requires_grad_(config.train_embeddings)
    return model


def train(
    pattern: Pattern,
    out_dir: Path,
    *,
    data: SentimentData | None = None,
    model: BertClassifier | None = None,
    fresh: bool = False,
    config: SentimentConfig | None = None,
    progress: Progress | None = None,
) -> PipelineResult:
    """Fine-tune dense, prune the encoder to ``pattern`` by IDP, evaluate on the held-out sentences.

    Parameters
    ----------
    pattern
        A pattern for every layer of the encoder, or globs of full layer names
        (``"bert.encoder.layers.0.*"``).
    out_dir
        Checkpoints: see `algo.finetune`.
    data, model
        By default ``prepare(0)`` and the pretrained model; others for tests and experiments.
    """
    config = config or SentimentConfig()
    data = data or prepare(max_length=config.max_length, model=config.model)
    model = model or build_model(config, seed=data.seed)
    torch.set_flush_denormal(True)  # pruned weights decay towards zero, and denormals are slow
    globs: Pattern = {"bert.encoder.*": pattern} if isinstance(pattern, str | NM) else pattern
    facts = {
        "data_seed": data.seed,
        "train": len(data.train),
        "sentences": config.sentences,
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "distill": config.distill,
        "dropout": config.dropout,
        "train_embeddings": config.train_embeddings,
    }
    return prune_pipeline(
        model,
        _batches(data, config),
        _cross_entropy,
        lambda trained: accuracy(trained, data.test),
        PipelineConfig(pattern=globs, dense=config.dense, idp=config.idp),
        out_dir,
        level_loss=(lambda dense: _distillation(dense, data, config)) if config.distill else None,
        facts=facts,
        fresh=fresh,
        progress=progress,
    )


def load_classifier(folder: Path, *, model: str = "minilm_l6") -> BertClassifier:
    """Load a model that `train` left in ``dense/`` or ``.../sparse/``, in eval mode, with its
    ``nm_pattern``s."""
    classifier = create_model(model, num_classes=2)
    load_model(classifier, folder)
    return classifier  # type: ignore[return-value]


@torch.no_grad()
def logits_of(model: nn.Module, sentences: Sequence[Encoded], *, batch_size: int = 64) -> Tensor:
    """Logits (len(sentences), 2) in the order given; sentences are batched by length to save padding."""
    order = sorted(range(len(sentences)), key=lambda number: len(sentences[number].ids))
    result = torch.empty(len(sentences), 2)
    model.eval()
    with parametrize.cached():
        for start in range(0, len(order), batch_size):
            batch = collate(sentences, order[start : start + batch_size])
            result[batch.numbers] = model(batch.ids, batch.mask)
    return result


def accuracy(model: nn.Module, sentences: Sequence[Encoded]) -> float:
    """Share of sentences whose label the model gives the larger logit."""
    labels = torch.tensor([sentence.label for sentence in sentences])
    return float((logits_of(model, sentences).argmax(1) == labels).double().mean())


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.ids, batch.mask), batch.labels)


def _distillation(dense: nn.Module, data: SentimentData, config: SentimentConfig) -> LossFn:
    """Loss with the dense model as teacher; its opinions are computed once, when first asked for."""
    opinions: list[Tensor] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if not opinions:
            opinions.append(logits_of(dense, data.train).softmax(1))
        soft = opinions[0][batch.numbers]
        hard = F.one_hot(batch.labels, 2).to(soft.dtype)
        return F.cross_entropy(
            model(batch.ids, batch.mask), config.distill * soft + (1 - config.distill) * hard
        )

    return loss


def _batches(data: SentimentData, config: SentimentConfig) -> Batches:
    """Batches bucketed by length: sentences of similar length go together, batches in random order."""
    lengths = [len(sentence.ids) for sentence in data.train]
    size = min(config.sentences, len(lengths))

    def epoch(number: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 * data.seed + number)
        chosen = walk(len(lengths), size, number, data.seed)
        chosen.sort(key=lambda index: (lengths[index], index))
        parts = [chosen[start : start + config.batch_size] for start in range(0, size, config.batch_size)]
        order = torch.randperm(len(parts), generator=generator).tolist()
        return [collate(data.train, parts[index]) for index in order]

    return epoch
