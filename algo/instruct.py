"""Instruction tuning: examples of an instruction, an input and an answer, as tokens of which only the answer is learned.

Ref: the recipe is that of R. Zhang et al., LLaMA-Adapter, arXiv 2303.16199 (code alpaca_finetuning_v1): prompt and answer in one
sequence, cross-entropy on the next token, prompt and padding without a label. The words around an instruction are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from algo.batches import walk

__all__ = [
    "END",
    "IGNORED",
    "PAD",
    "START",
    "Example",
    "TokenBatch",
    "answer_of",
    "collate",
    "encode",
    "example_batches",
    "prompt_of",
    "token_loss",
    "train_tokenizer",
    "window_batches",
]

PAD, START, END = 0, 1, 2
"""Numbers of the tokens for padding, the start and the end of a text."""

IGNORED = -100
"""Label of what is not learned."""


@dataclass(frozen=True)
class Example:
    """What to do, on what (may be empty), and what comes out."""

    instruction: str
    text: str
    answer: str


class TokenBatch(NamedTuple):
    """Token numbers and labels, both int64 (B, S); labels are the next tokens, or `IGNORED`."""

    tokens: Tensor
    labels: Tensor


def prompt_of(example: Example) -> str:
    """The text that the answer follows, behind a space: ``answer_of``."""
    text = f"### Text\n{example.text}\n" if example.text else ""
    return f"### Task\n{example.instruction}\n{text}### Answer:"


def answer_of(example: Example) -> str:
    """The answer and the space before it, which tokenizers on bytes count to its first word, whose token is that of texts."""
    return f" {example.answer}"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-pair tokenizer on bytes, so that it can write any text; the same for the same texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, example: Example, max_length: int) -> tuple[list[int], list[int]]:
    """Token numbers of prompt and answer, and their labels: `IGNORED` in the prompt. What is too long is cut in the text.

    Raises
    ------
    ValueError
        Instruction and answer alone are longer than ``max_length`` tokens.
    """

    def parts(text: str) -> tuple[list[int], list[int]]:
        prompt = [START, *tokenizer.encode(prompt_of(Example(example.instruction, text, example.answer))).ids]
        return prompt, [*tokenizer.encode(answer_of(example)).ids, END]

    words = example.text.split(" ")
    prompt, answer = parts(example.text)
    while len(prompt) + len(answer) > max_length:
        if not words:
            raise ValueError(f"instruction and answer take {len(prompt) + len(answer)} tokens, more than {max_length}")
        over = len(prompt) + len(answer) - max_length
        words = words[: len(words) - max(1, over // 3)]
        prompt, answer = parts(" ".join(words))
    return prompt + answer, [IGNORED] * len(prompt) + answer


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TokenBatch:
    """Pad encoded examples to the longest; each label is the token that comes next."""
    length = max(len(tokens) for tokens, _ in rows) - 1
    tokens = torch.full((len(rows), length), PAD)
    labels = torch.full((len(rows), length), IGNORED)
    for number, (ids, wanted) in enumerate(rows):
        tokens[number, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[number, : len(ids) - 1] = torch.tensor(wanted[1:])
    return TokenBatch(tokens, labels)


def example_batches(
    rows: Sequence[tuple[list[int], list[int]]], *, size: int | None, batch_size: int, seed: int
) -> Callable[[int], list[TokenBatch]]:
    """Epochs of ``size`` encoded examples (None: all); similar lengths go together, batches in random order."""
    count = min(size or len(rows), len(rows))

    def epoch(number: int) -> list[TokenBatch]:
        chosen = sorted(walk(len(rows), count, number, seed), key=lambda place: (len(rows[place][0]), place))
        parts = [chosen[start : start + batch_size] for start in range(0, count, batch_size)]
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(1000 * seed + number)).tolist()
        return [collate([rows[place] for place in parts[index]]) for index in order]

    return epoch


def window_batches(
    stream: Tensor, *, length: int, size: int | None, batch_size: int, seed: int
) -> Callable[[int], list[TokenBatch]]:
    """Epochs of ``size`` windows of ``length`` tokens (None: all) of one long text (N,), each token learned."""
    windows = stream[: (len(stream) - 1) // length * length].view(-1, length)
    following = stream[1 : len(windows) * length + 1].view(-1, length)
    count = min(size or len(windows), len(windows))

    def epoch(number: int) -> list[TokenBatch]:
        chosen = torch.tensor(walk(len(windows), count, number, seed))
        return [TokenBatch(windows[part], following[part]) for part in chosen.split(batch_size)]

    return epoch


def token_loss(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy of the labelled tokens, in nats; the model gives logits (B, S, vocabulary)."""
    logits = model(batch.tokens)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED)
