"""Files of tensors and facts: safetensors with JSON, never pickled, never half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from algo.distributed import is_main
from algo.layers import sparse_layers, weight_names
from algo.nm import NM
from algo.sparsify import model_patterns
from algo.verify import verify

__all__ = [
    "StateDictError",
    "difference",
    "load_model",
    "load_state",
    "read_json",
    "read_tensors",
    "save_model",
    "write_json",
    "write_tensors",
]

_FACTS = "nmforge"
_SHOWN = 8
_ONCE = {
    "optimizer": "adamw", "momentum": 0.9, "schedule": "linear", "amp": None, "accumulate": 1, "ema": 0.0, "processes": 1,
    "beta2": 0.999,
}  # fmt: skip
"""What files meant that were written before these settings existed."""


class StateDictError(ValueError):
    """Weights that do not fit a model; the message lists missing keys, keys too many, and shapes that differ."""


class Loadable(Protocol):
    """A module, or what stands for one."""

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...

    def state(self) -> dict[str, Tensor]: ...


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write tensors and JSON facts to one safetensors file: to a temporary name first, then renamed.

    Of several processes only the main one writes.
    """
    if not is_main():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # A clone each: safetensors refuses tensors that share memory, and views would store more than they show.
    plain = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    save_file(plain, temporary, metadata={_FACTS: json.dumps(facts or {}, sort_keys=True)})
    os.replace(temporary, path)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Truncated, altered in its structure, or not written by nmforge.
    """
    path = Path(path)
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


def write_json(path: str | Path, facts: Mapping[str, Any]) -> None:
    """Write JSON, sorted and indented: to a temporary name first, then renamed. Of several processes only the main
    one writes."""
    if not is_main():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; ValueError if it is damaged or not an object."""
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it or start over") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged (a JSON object was expected): delete it or start over")
    return facts


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Describe the first key in which two sets of JSON facts differ, or None: ``"train.lr was 0.1, is now 0.2"``."""
    new = _flat(json.loads(json.dumps(new)))  # tuples become lists, as they did in the file
    old = _flat(old)
    for key in set(new) - set(old):
        name = key.rpartition(".")[2]
        if name in _ONCE:
            old[key] = _ONCE[name]
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
    return None


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots; a list is a value."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def load_state(model: nn.Module | Loadable, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict, every key of it and no other.

    Parameters
    ----------
    where
        Where the tensors come from, for the message.

    Raises
    ------
    StateDictError
        Missing keys, keys too many, or shapes that differ: all are listed.
    """
    own = model.state_dict() if isinstance(model, nn.Module) else model.state()
    missing = [name for name in own if name not in tensors]
    extra = [name for name in tensors if name not in own]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, the model's {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if missing or extra or shapes:
        lists = (("missing", missing), ("not in the model", extra), ("of another shape", shapes))
        found = "; ".join(f"{what}: {_few(names)}" for what, names in lists if names)
        raise StateDictError(f"{where} holds another model. Keys {found}")
    if isinstance(model, nn.Module):
        model.load_state_dict(dict(tensors))
    else:
        model.load(tensors)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def save_model(model: nn.Module, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
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
    folder = Path(folder)
    write_tensors(folder / "model.safetensors", model.state_dict())
    named = {name: str(nm) for name, nm in patterns.items()}
    write_json(folder / "model.json", {"patterns": named, "facts": dict(facts or {})})


def load_model(model: nn.Module, folder: str | Path) -> dict[str, Any]:
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
    folder = Path(folder)
    if not (folder / "model.json").is_file():
        raise FileNotFoundError(f"no model in {folder}: model.json is missing")
    described = read_json(folder / "model.json")
    tensors, _ = read_tensors(folder / "model.safetensors")
    patterns = {name: NM(nm) for name, nm in described.get("patterns", {}).items()}
    load_state(model, tensors, str(folder))
    verify(model, patterns)
    layers = dict(sparse_layers(model))
    for name, nm in patterns.items():
        layers[name].nm_pattern = nm  # type: ignore[assignment]
    return dict(described.get("facts", {}))
