"""The encoder of a sentence model on the accelerator; embedding look-up, pooling and classifier head stay on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from compiler.compile import Progress
from compiler.ops import QuantNetwork
from compiler.program import Program
from hw.arch import Arch
from models.bert import BertClassifier, BertModel
from nmforge.api import compile
from nmforge.sentiment import Encoded, collate
from sim.reference import dequantise, quantise_inputs, run_reference

__all__ = ["PLACES", "calibration_batches", "choose_sentences", "compile_encoder", "encoder_inputs", "int8_logits", "pad"]

PLACES = {"batch": {"hidden_states": 0, "attention_mask": 0}, "length": {"hidden_states": 1, "attention_mask": 1}}
"""Where an encoder's dimensions are: input and number of the dimension."""

Tokens = tuple[Tensor, Tensor]
"""Token numbers and mask, int64 (B, S)."""


def encoder_inputs(bert: BertModel, tokens: Tokens) -> dict[str, Tensor]:
    """What the encoder takes: embedded tokens (B, S, C) and their mask (B, S)."""
    ids, mask = tokens
    with torch.no_grad():
        return {"hidden_states": bert.embeddings(ids), "attention_mask": mask}


def pad(tokens: Tokens, length: int) -> Tokens:
    """Pad with masked zeros to `length` tokens."""
    missing = length - tokens[0].shape[1]
    if missing < 0:
        raise ValueError(f"{tokens[0].shape[1]} tokens do not fit the length {length}")
    return torch.nn.functional.pad(tokens[0], (0, missing)), torch.nn.functional.pad(tokens[1], (0, missing))


def choose_sentences(sentences: Sequence[Encoded], count: int, length: int) -> list[int]:
    """Numbers of `count` sentences of at most `length` tokens, spread evenly from the shortest to the longest.

    Raises
    ------
    ValueError
        Fewer than `count` sentences fit.
    """
    fit = sorted((len(s.ids), number) for number, s in enumerate(sentences) if len(s.ids) <= length)
    if len(fit) < count:
        raise ValueError(f"only {len(fit)} of {len(sentences)} sentences fit {length} tokens: {count} are wanted")
    places = [round(i * (len(fit) - 1) / max(1, count - 1)) for i in range(count)]
    return [fit[place][1] for place in places]


def calibration_batches(
    bert: BertModel, sentences: Sequence[Encoded], *, count: int, batch_size: int = 32
) -> list[dict[str, Tensor]]:
    """Encoder inputs of the first `count` sentences, batched by length so that little of them is padding."""
    order = sorted(range(min(count, len(sentences))), key=lambda number: len(sentences[number].ids))
    batches = [collate(sentences, order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    return [encoder_inputs(bert, (batch.ids, batch.mask)) for batch in batches]


def compile_encoder(
    bert: BertModel,
    *,
    batch: int,
    length: int,
    arch: str | Arch,
    calibration: Iterable[dict[str, Tensor]],
    progress: Progress | None = None,
    **options: Any,
) -> Program:
    """Compile a model's encoder for `batch` sequences of `length` tokens with a padding mask; ``options``: of
    `nmforge.compile`, about scales and bits. A `DynamicProgram` if they have ``dynamic``."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    example = encoder_inputs(bert, (ids, torch.ones_like(ids)))
    program = compile(
        bert.encoder, example, arch=arch, calibration=calibration, progress=progress, host="forbid", **options
    )
    return cast(Program, program)  # nothing is on the host


def int8_logits(
    network: QuantNetwork,
    model: BertClassifier,
    sentences: Sequence[Encoded],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Logits (sentences, classes) with the encoder in the integer arithmetic of the accelerator, by the reference.

    Sentences are batched by length. The network's own batch size and length do not matter: its parameters depend on neither.
    """
    order = sorted(range(len(sentences)), key=lambda number: len(sentences[number].ids))
    result = torch.empty(len(sentences), model.head.out_features)
    for start in range(0, len(order), batch_size):
        batch = collate(sentences, order[start : start + batch_size])
        result[batch.numbers] = _host_logits(network, model, batch.ids, batch.mask)
        if progress is not None:
            progress(start + len(batch.numbers), len(order))
    return result


def _host_logits(network: QuantNetwork, model: BertClassifier, ids: Tensor, mask: Tensor) -> Tensor:
    (output,) = network.outputs
    integers = quantise_inputs(network, encoder_inputs(model.bert, (ids, mask)))
    values = run_reference(network, integers, keep=lambda name: name == output)[output]
    with torch.no_grad():
        return model.classify(dequantise(network, output, values), mask)
