"""Files of tensors and facts: safetensors with JSON, never pickled, never half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from algo.layers import sparse_layers, weight_names
from algo.nm import NM
from algo.sparsify import model_patterns
from algo.verify import verify

__all__ = [
    "difference",
    "load_model",
    "read_json",
    "read_tensors",
    "save_model",
    "write_json",
    "write_tensors",
]

_FACTS = "nmforge"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write tensors and JSON facts to one safetensors file: to a temporary name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # A clone each: safetensors refuses tensors that share memory, and views would store more than they show.
    plain = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    save_file(plain, temporary, metadata={_FACTS: json.dumps(facts or {}, sort_keys=True)})
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Truncated, altered in its structure, or not written by nmforge.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get(_FACTS)
            if facts is None:
                raise ValueError(f"{path} was not written by nmforge: its metadata has no field {_FACTS!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(facts)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it or start over") from None


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write JSON, sorted and indented: to a temporary name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError if it is damaged or not an object."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it or start over") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged (a JSON object was expected): delete it or start over")
    return facts


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Describe the first key in which two sets of JSON facts differ, or None: ``"lr was 0.1, is now
    0.2"``."""
    new = json.loads(json.dumps(new))  # tuples become lists, as they did in the file
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
    return None


def save_model(model: nn.Module, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a dense or finalised model to ``folder``: ``model.safetensors`` and ``model.json`` with the
    patterns.

    ``model.json`` has ``patterns`` (layer name -> "N:M") and ``facts``, and is written last.

    Raises
    ------
    ValueError
        A layer is still in training (call `algo.sparsify.finalize`), or breaks its pattern.
    """
    training = [name for name, layer in sparse_layers(model)
                if any(parametrize.is_parametrized(layer, weight) for weight in weight_names(layer))]
    if training:
        raise ValueError(f"layer {training[0]!r} is still in training: call finalize() before saving")
    patterns = model_patterns(model)
    verify(model, patterns)
    write_tensors(folder / "model.safetensors", model.state_dict())
    named = {name: str(nm) for name, nm in patterns.items()}
    write_json(folder / "model.json", {"patterns": named, "facts": dict(facts or {})})


def load_model(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Load what `save_model` wrote into a model of the same shape, in place; its layers get their
    ``nm_pattern``.

    Returns
    -------
    dict
        The facts given to `save_model`.

    Raises
    ------
    FileNotFoundError
        No model there.
    ValueError
        Damaged files, weights of another model, or weights that break their pattern (`PatternViolation`).
    """
    if not (folder / "model.json").is_file():
        raise FileNotFoundError(f"no model in {folder}: model.json is missing")
    described = read_json(folder / "model.json")
    tensors, _ = read_tensors(folder / "model.safetensors")
    patterns = {name: NM(nm) for name, nm in described.get("patterns", {}).items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder} holds another model: {error}") from None
    verify(model, patterns)
    layers = dict(sparse_layers(model))
    for name, nm in patterns.items():
        layers[name].nm_pattern = nm  # type: ignore[assignment]
    return dict(described.get("facts", {}))
