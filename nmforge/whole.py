"""Whole networks for `nmforge compile --whole`: token numbers or images in, and what to calibrate with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from algo.nm import NM
from algo.sparsify import sparsify
from compiler.onnx_import import load_onnx, open_dimensions
from compiler.shapes import argument_names
from models.bert import BertModel
from models.registry import create_model, list_models
from nmforge.dynamic import Places
from nmforge.errors import BadInputError, unknown
from nmforge.sentiment import prepare

__all__ = ["Whole", "whole_source"]

TOKENS = ("input_ids", "attention_mask")
"""Inputs of a sentence model."""

IMAGE = 224
"""Pixels of a side, of images for models that do not say."""


@dataclass(frozen=True, eq=False)
class Whole:
    """A network, inputs that fix its shapes, calibration batches of the same shapes, and where they come from.

    An ONNX file of which dimensions vary is a path, without inputs. places: where named dimensions are.
    """

    model: nn.Module | str
    example: Any
    calibration: Sequence[Any] | None
    description: str
    places: Places


def whole_source(
    name: str, *, pattern: dict[str, NM] | None, pretrained: bool, batch: int, length: int, calibration: int, seed: int,
    dynamic: Mapping[str, tuple[int, ...]] | None = None,
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
    dynamic
        What dimensions may be, by name.

    Raises
    ------
    BadInputError
        Nothing of that name.
    """
    torch.manual_seed(seed)
    if name.endswith(".onnx"):
        if pattern or pretrained:
            raise BadInputError("an ONNX file has its weights and patterns: --pattern and --pretrained are for registered models")
        if dynamic:
            return Whole(name, None, None, name, _open_places(name))
        model, example = load_onnx(name)
        warnings.warn("calibrated on random inputs: fit for cycle counts, not for accuracy", stacklevel=2)
        return Whole(model, example, [example], name, {})
    if name not in list_models():
        raise unknown("model", name, list_models())
    model = create_model(name, pretrained=pretrained)
    if pattern:
        sparsify(model, {glob.removeprefix("bert."): nm for glob, nm in pattern.items()}, method="magnitude")
    lengths, sizes = (dynamic or {}).get("length", (length,)), (dynamic or {}).get("batch", (batch,))
    if isinstance(model, BertModel):
        shapes = [(size, tokens) for size in sizes for tokens in lengths]
        batches: Sequence[Any] = [
            item for size, tokens in shapes
            for item in _tokens(model, name, pretrained, size, tokens, -(-calibration // len(shapes)))
        ]  # fmt: skip
        places: Places = {"batch": dict.fromkeys(TOKENS, 0), "length": dict.fromkeys(TOKENS, 1)}
    else:
        batches = [item for size in sizes for item in _images(model, size)]
        places = {"batch": {argument_names(model, batches[0])[0]: 0}}
    description = f"{name}, {'published' if pretrained else f'random (seed {seed})'} weights"
    return Whole(model, batches[-1], batches, description, places)


def _open_places(file: str) -> dict[str, dict[str, int]]:
    """Where the dimensions are that an ONNX file leaves open, by the names that it has for them."""
    found: dict[str, dict[str, int]] = {}
    for given, dims in open_dimensions(file).items():
        for axis, dim in dims.items():
            found.setdefault(dim or f"{given}:{axis}", {})[given] = axis
    return found


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
