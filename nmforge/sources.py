"""What `nmforge compile` compiles: a trained folder, or a registered model pruned at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from algo.checkpoint import load_model, read_json
from algo.nm import NM
from algo.sparsify import sparsify
from models.bert import BertClassifier, BertModel
from models.registry import create_model, list_models
from nmforge.encoder import calibration_batches, encoder_inputs
from nmforge.errors import BadInputError, unknown
from nmforge.sentiment import SentimentData, prepare

__all__ = ["Source", "load_source"]


@dataclass(frozen=True, eq=False)
class Source:
    """A model whose encoder is to be compiled, its calibration batches, and where both come from."""

    bert: BertModel
    calibration: Sequence[dict[str, Tensor]]
    description: str


def load_source(
    name: str, *, pattern: dict[str, NM] | None, pretrained: bool, calibration: int, seed: int
) -> Source:
    """Find a model.

    Parameters
    ----------
    name
        A folder that `nmforge train` or the demo left, a model folder within one, or a registered model.
    pattern
        Which of a training folder's models (None: the only sparse one); of a registered model, how to prune it by magnitude.
    pretrained
        Published weights for a registered model, rather than random ones.
    calibration
        Sentences for the scales.

    Raises
    ------
    BadInputError
        Nothing of that name, or no model of that pattern.
    """
    if Path(name).is_dir():
        return _trained(Path(name), pattern, calibration)
    if name not in list_models():
        raise unknown("model or folder", name, list_models())
    return _registered(name, pattern, pretrained, calibration, seed)


def _trained(folder: Path, pattern: dict[str, NM] | None, calibration: int) -> Source:
    chosen = folder if (folder / "model.json").is_file() else _choose(folder, pattern)
    facts = read_json(chosen / "model.json").get("facts", {})
    facts = facts.get("identity", {}).get("facts", facts)
    classifier = create_model("minilm_l6", num_classes=2)
    load_model(classifier, chosen)
    if not isinstance(classifier, BertClassifier):
        raise TypeError(f"a trained model is a BertClassifier, not a {type(classifier).__name__}")
    data = prepare(int(facts.get("data_seed", 0)))
    batches = calibration_batches(classifier.bert, data.train, count=calibration)
    return Source(classifier.bert, batches, str(chosen))


def _choose(folder: Path, pattern: dict[str, NM] | None) -> Path:
    """The model of a training folder that has the wanted patterns."""
    root = folder / "train" if (folder / "train").is_dir() else folder
    found = sorted(path.parent for path in root.glob("*/sparse/model.json"))
    if pattern and all(nm.is_dense for nm in pattern.values()):
        if (root / "dense" / "model.json").is_file():
            return root / "dense"
        raise BadInputError(f"{folder} holds no finished dense model: run nmforge train --out {folder}")
    wanted = None if pattern is None else {str(nm) for nm in pattern.values() if not nm.is_dense}
    fit = [path for path in found if wanted is None or _patterns(path) == wanted]
    if len(fit) == 1:
        return fit[0]
    names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
    if not fit:
        raise BadInputError(f"{folder} holds no finished model of that pattern; sparse models there: {names}")
    raise BadInputError(f"{folder} holds several sparse models: choose with --pattern, or name one folder: {names}")


def _patterns(model: Path) -> set[str]:
    return set(read_json(model / "model.json").get("patterns", {}).values())


def _registered(
    name: str, pattern: dict[str, NM] | None, pretrained: bool, calibration: int, seed: int
) -> Source:
    torch.manual_seed(seed)
    model = create_model(name, pretrained=pretrained)
    if not isinstance(model, BertModel):
        raise BadInputError(f"{name} is no BERT: compile it from Python with nmforge.compile(model, example_inputs)")
    if pattern:
        sparsify(model, {glob.removeprefix("bert."): nm for glob, nm in pattern.items()}, method="magnitude")
    batches = _real_sentences(model, name, calibration) if pretrained else None
    if batches is None:
        warnings.warn("calibrated on random tokens: fit for cycle counts, not for accuracy", stacklevel=2)
        batches = _random_tokens(model, calibration, seed)
    return Source(model, batches, f"{name}, {'published' if pretrained else f'random (seed {seed})'} weights")


def _real_sentences(model: BertModel, name: str, count: int) -> list[dict[str, Tensor]] | None:
    try:
        data: SentimentData = prepare(model=name)
    except FileNotFoundError:
        return None
    return calibration_batches(model, data.train, count=count)


def _random_tokens(model: BertModel, count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    size: dict[str, Any] = {"generator": generator}
    batches = []
    for start in range(0, count, 32):
        ids = torch.randint(1, model.config.vocabulary, (min(32, count - start), 32), **size)
        batches.append(encoder_inputs(model, (ids, torch.ones_like(ids))))
    return batches
