"""Whole networks for `nmforge compile --whole`: token numbers or images in, and what to calibrate with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from algo.nm import NM
from algo.sparsify import sparsify
from compiler.onnx_import import load_onnx
from models.bert import BertModel
from models.registry import create_model, list_models
from nmforge.errors import BadInputError, unknown
from nmforge.sentiment import prepare

__all__ = ["Whole", "whole_source"]

IMAGE = 224
"""Pixels of a side, of images for models that do not say."""


@dataclass(frozen=True, eq=False)
class Whole:
    """A network, inputs that fix its shapes, calibration batches of the same shapes, and where they come from."""

    model: nn.Module
    example: Any
    calibration: Sequence[Any]
    description: str


def whole_source(
    name: str, *, pattern: dict[str, NM] | None, pretrained: bool, batch: int, length: int, calibration: int, seed: int
) -> Whole:
    """Find a network.

    Parameters
    ----------
    name
        A registered model, or an ONNX file.
    pattern
        How to prune a registered model, by magnitude.
    pretrained
        Published weights for a registered model, rather than random ones.
    batch, length
        Sequences and tokens of a sentence model, images of a vision model.
    calibration
        Sentences for the scales; images are random.

    Raises
    ------
    BadInputError
        Nothing of that name.
    """
    torch.manual_seed(seed)
    if name.endswith(".onnx"):
        if pattern or pretrained:
            raise BadInputError("an ONNX file has its weights and patterns: --pattern and --pretrained are for registered models")
        model, example = load_onnx(name)
        warnings.warn("calibrated on random inputs: fit for cycle counts, not for accuracy", stacklevel=2)
        return Whole(model, example, [example], name)
    if name not in list_models():
        raise unknown("model", name, list_models())
    model = create_model(name, pretrained=pretrained)
    if pattern:
        sparsify(model, {glob.removeprefix("bert."): nm for glob, nm in pattern.items()}, method="magnitude")
    if isinstance(model, BertModel):
        batches: Sequence[Any] = _tokens(model, name, pretrained, batch, length, calibration)
    else:
        batches = _images(model, batch)
    return Whole(model, batches[0], batches, f"{name}, {'published' if pretrained else f'random (seed {seed})'} weights")


def _tokens(model: BertModel, name: str, pretrained: bool, batch: int, length: int, count: int) -> list[dict[str, Tensor]]:
    """Real sentences padded to the length, or random tokens."""
    if length > model.config.positions:
        raise BadInputError(f"length must be <= {model.config.positions}, the positions of the model, not {length}")
    if pretrained:
        try:
            sentences = [s.ids for s in prepare(model=name).train if len(s.ids) <= length]
        except FileNotFoundError:
            sentences = []
        if len(sentences) >= batch:
            used = sentences[: max(batch, count)]
            return [_padded(used[i : i + batch], length) for i in range(0, len(used) - batch + 1, batch)]
    warnings.warn("calibrated on random tokens: fit for cycle counts, not for accuracy", stacklevel=2)
    ids = torch.randint(1, model.config.vocabulary, (batch, length))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def _padded(sentences: Sequence[Sequence[int]], length: int) -> dict[str, Tensor]:
    ids = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in sentences])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in sentences])
    return {"input_ids": ids, "attention_mask": mask}


def _images(model: nn.Module, batch: int) -> list[Tensor]:
    warnings.warn("calibrated on random images: fit for cycle counts, not for accuracy", stacklevel=3)
    size = getattr(getattr(model, "config", None), "image_size", IMAGE)
    return [torch.randn(batch, 3, size, size)]
