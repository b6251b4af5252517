"""Does LLaMA-Adapter train? A small LLaMA learns to write news and film reviews; frozen, an adapter teaches it instructions.

1. A byte-pair tokenizer and the base: next tokens of R8 articles and movie sentences, training parts only, no labels.
2. The adapter on two instructions, the topic of an article and the opinion of a sentence, by the recipe of arXiv 2303.16199:
   AdamW (0.9, 0.95), weight decay 0.02, two fifths of warm-up, half a cosine; only the answer is learned. Ours: ten epochs and a
   higher learning rate, for a small base that never saw an instruction.
3. The same with gates fixed at 1 from the start: prompts drawn at random disturb the base ("rand-init" of the paper's table 5).

Every stage is a training that goes on where it was stopped (``out/train_llama``). ``train_llama_by_heart`` learns a few of the
examples by heart.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from algo.data import Sentence, movie_sentences, r8
from algo.instruct import (
    END,
    IGNORED,
    START,
    Example,
    TokenBatch,
    answer_of,
    collate,
    encode,
    example_batches,
    prompt_of,
    token_loss,
    train_tokenizer,
    window_batches,
)
from algo.train import RunOptions, TrainConfig, TrainResult, progress_bars, train
from benchmarks import Table
from models import AdapterConfig, Llama, LlamaAdapter, create_model, generate

__all__ = ["ADAPTER", "FEW", "Data", "load_data", "pretrained", "run", "score_of", "stage"]

OUT = Path("out/train_llama")
TOPICS = {
    "acq": "acquisition", "crude": "oil", "earn": "earnings", "grain": "grain", "interest": "interest rates",
    "money-fx": "currencies", "ship": "shipping", "trade": "trade",
}  # fmt: skip
TOPIC = "What is this article about?"
OPINION = "Did the author like the film?"
LENGTH, HELD_OUT, KNOWN, PER_EPOCH = 80, 500, 3000, 1500
PRETRAINING = TrainConfig(epochs=4, lr=2e-3, weight_decay=0.1, beta2=0.95, warmup=0.05, schedule="cosine", clip=1.0)
ADAPTER = AdapterConfig(length=10, layers=5)
TUNING = TrainConfig(epochs=10, lr=0.2, weight_decay=0.02, beta2=0.95, warmup=0.4, schedule="cosine", clip=1.0)
FEW = 16
"""Examples for `train_llama_by_heart`."""
WINDOWS = 1700
"""Windows of 128 tokens in an epoch of pre-training."""

Row: TypeAlias = tuple[list[int], list[int]]
"""Tokens and labels of an example."""


@dataclass(frozen=True)
class Data:
    """The tokenizer, the text that the base learns, examples to learn as tokens and labels (and a few of them, of both kinds
    alike), and held-out ones."""

    tokenizer: Tokenizer
    stream: Tensor
    held_stream: Tensor
    train: list[Row]
    few: list[Row]
    topics: list[Example]
    opinions: list[Example]

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """Examples as tokens and labels."""
        return [encode(self.tokenizer, example, LENGTH) for example in examples]


def load_data(vocabulary: int) -> Data:
    news = r8()
    films, held_films = movie_sentences(seed=0, test_size=HELD_OUT)
    topics, held_topics = _topics(news.train, news.classes), _topics(_spread(news.test), news.classes)
    opinions, held_opinions = (
        [Example(OPINION, text, "yes" if label else "no") for text, label in part] for part in (films, held_films)
    )
    texts = [example.text for example in (*topics, *opinions)]
    file = OUT / "tokenizer.json"
    if file.is_file():
        tokenizer = Tokenizer.from_file(str(file))
    else:
        OUT.mkdir(parents=True, exist_ok=True)
        whole = [prompt_of(part[0]) + answer_of(part[0]) for part in (topics, opinions)]
        tokenizer = train_tokenizer([*texts, *whole], vocabulary)
        tokenizer.save(str(file))
    rows = [encode(tokenizer, example, LENGTH) for example in (*topics[:KNOWN], *opinions[:KNOWN])]
    few = rows[: FEW // 2] + rows[KNOWN : KNOWN + FEW // 2]
    held = [example.text for example in (*held_topics, *held_opinions)]
    return Data(tokenizer, _stream(tokenizer, texts), _stream(tokenizer, held), rows, few, held_topics, held_opinions)


def _topics(part: list[Sentence], classes: tuple[str, ...]) -> list[Example]:
    return [Example(TOPIC, text, TOPICS[classes[label]]) for text, label in part]


def _spread(part: list[Sentence]) -> list[Sentence]:
    """Held-out articles drawn from all classes, which the corpus has one after the other."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:HELD_OUT]
    return [part[number] for number in order.tolist()]


def _stream(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts one after the other, in an order of no meaning, each between start and end."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    codes = tokenizer.encode_batch([texts[number] for number in order])
    return torch.tensor([token for code in codes for token in (START, *code.ids, END)])


@torch.no_grad()
def score_of(model: nn.Module, rows: Sequence[Row]) -> tuple[float, float]:
    """Mean loss of an answer's tokens in nats, and the share of answers that the likeliest tokens spell out (which is what greedy
    generation would give)."""
    model.eval()
    total, count, right = 0.0, 0, 0
    rows = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(rows), 50):
        batch = collate(rows[start : start + 50])
        logits = model(batch.tokens)
        wanted = batch.labels != IGNORED
        total += float(F.cross_entropy(logits[wanted], batch.labels[wanted], reduction="sum"))
        count += int(wanted.sum())
        right += int(((logits.argmax(-1) == batch.labels) | ~wanted).all(1).sum())
    return total / count, right / len(rows)


def stage(name: str, model: nn.Module, batches: object, config: TrainConfig, score: object) -> TrainResult:
    with progress_bars() as progress:
        return train(
            model, batches, token_loss, config, checkpoint=OUT / f"{name}.safetensors", evaluate=score,  # type: ignore[arg-type]
            run=RunOptions(save_every=50), progress=progress, label=name,
        )  # fmt: skip


def pretrained(data: Data) -> tuple[Llama, TrainResult]:
    torch.manual_seed(0)
    base = create_model("llama_small")
    held = window_batches(data.held_stream, length=128, size=None, batch_size=50, seed=0)(0)

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        model.eval()
        return sum(float(token_loss(model, TokenBatch(*batch))) for batch in held) / len(held)

    batches = window_batches(data.stream, length=128, size=WINDOWS, batch_size=16, seed=0)
    result = stage("base", base, batches, PRETRAINING, score)
    assert isinstance(base, Llama)
    return base, result


def _tuned(name: str, base: Llama, data: Data, *, gated: bool) -> tuple[LlamaAdapter, TrainResult]:
    torch.manual_seed(1)
    model = LlamaAdapter(copy.deepcopy(base), ADAPTER)
    if not gated:
        for gate in model.gates:
            nn.init.constant_(gate, 20.0).requires_grad_(False)  # tanh(20) is 1 in float32
    batches = example_batches(data.train, size=PER_EPOCH, batch_size=16, seed=0)
    held = data.rows(data.topics[:150] + data.opinions[:150])
    return model, stage(name, model, batches, TUNING, lambda model: score_of(model, held)[0])


def run() -> list[Table]:
    """Losses and accuracies on held-out texts, before and after tuning, and what tuning changed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = load_data(create_model("llama_small").config.vocabulary)
    base, first = pretrained(data)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    rows: list[tuple[str | int | float | None, ...]] = [_row("base, frozen", base, data, None, 0)]
    curves = [("base: next token of texts", *first.scores[:1], *first.scores[-1:])]
    samples = []
    for name, gated in (("zero-init gates", True), ("random prompts, gates fixed at 1", False)):
        model, result = _tuned("adapter" if gated else "ungated", base, data, gated=gated)
        same = all(torch.equal(value, before[key]) for key, value in model.base.state_dict().items())
        if not same:
            raise RuntimeError("tuning changed the base")
        learned = sum(value.numel() for value in model.parameters() if value.requires_grad)
        start = _start(base, data, gated)
        rows.append(_row(name, model, data, start, learned))
        curves.append((f"{name}: answers", *result.scores[:1], *result.scores[-1:]))
        if gated:
            file = OUT / "adapter_only.safetensors"
            model.save_adapter(file)
            samples = _samples(model, data)
            saved = file.stat().st_size
    torch.set_num_threads(threads)
    note = (
        f"{HELD_OUT} held-out articles of R8 and {HELD_OUT} movie sentences; loss of the answer's tokens in nats, 'start' before "
        "any step; right: the whole answer by greedy decoding. The base has 1.47 M parameters and never saw an instruction. "
        f"Its weights are the same to the bit after both tunings. The adapter's file has {saved:,} bytes."
    )
    columns = ("model", "learned", "loss, start", "loss, topics", "right (%)", "loss, opinions", "right (%)")
    return [
        Table("LLaMA-Adapter on held-out instructions", columns, tuple(rows), note),
        Table("Held-out loss", ("stage", "after epoch 1", "after the last"), tuple(curves)),
        Table("Greedy answers", ("text", "wanted", "given"), tuple(samples), "The first held-out examples."),
    ]


def _start(base: Llama, data: Data, gated: bool) -> float:
    """Held-out loss of an adapter that has learned nothing yet."""
    torch.manual_seed(1)
    model = LlamaAdapter(copy.deepcopy(base), ADAPTER)
    if not gated:
        for gate in model.gates:
            nn.init.constant_(gate, 20.0)
    return score_of(model, data.rows(data.topics + data.opinions))[0]


def _row(name: str, model: nn.Module, data: Data, start: float | None, learned: int) -> tuple[str | int | float | None, ...]:
    (topic, right), (opinion, liked) = (score_of(model, data.rows(part)) for part in (data.topics, data.opinions))
    return name, learned, start, topic, 100 * right, opinion, 100 * liked


def _samples(model: LlamaAdapter, data: Data) -> list[tuple[str, str, str]]:
    found = []
    for example in (*data.topics[:3], *data.opinions[:3]):
        tokens, labels = encode(data.tokenizer, example, LENGTH)
        prompt = tokens[: labels.count(IGNORED)]
        (answer,) = generate(model.eval(), [prompt], new_tokens=8, stop=END)
        found.append((example.text[:60], example.answer, data.tokenizer.decode(answer).strip()))
    return found
