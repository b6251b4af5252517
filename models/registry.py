"""Names of models: a decorator that records them, what is known of each, and the functions that users call."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn

from models.info import ModelInfo, Published

__all__ = ["create_model", "defined_in", "describe_models", "list_models", "model_info", "register_model"]


class ModelBuilder(Protocol):
    """A function that builds one named model."""

    __name__: str

    def __call__(self, *, pretrained: bool | str | Path = False, **overrides: Any) -> nn.Module: ...


Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}
_infos: dict[str, ModelInfo] = {}


def register_model(builder: Builder) -> Builder:
    """Record a builder under its own name; see `ModelBuilder` for its signature.

    Raises
    ------
    ValueError
        Another builder has that name already.
    """
    name = builder.__name__
    if name in _builders:
        raise ValueError(f"a model named {name!r} is already registered, by {_builders[name].__module__}")
    _builders[name] = builder
    return builder


def list_models() -> list[str]:
    """Names that `create_model` knows, sorted."""
    return sorted(_builders)


def describe_models(
    names: Sequence[str], info: ModelInfo, published: Mapping[str, Published | Sequence[Published]] | None = None
) -> None:
    """Record what is known of registered models: ``info`` of all of them, ``published`` of each.

    Raises
    ------
    ValueError
        No model of that name, or it is described already.
    """
    published = published or {}
    stray = sorted(set(published) - set(names))
    if stray:
        raise ValueError(f"figures are given for {stray[0]!r}, which is not among the names: {', '.join(names)}")
    for name in names:
        _check(name)
        if name in _infos:
            raise ValueError(f"the model {name!r} is described already")
        figures = published.get(name, ())
        _infos[name] = replace(info, published=(figures,) if isinstance(figures, Published) else tuple(figures))


def model_info(name: str) -> ModelInfo:
    """What `describe_models` recorded of a registered model; the family "other" and nothing else if it is not described.

    Raises
    ------
    ValueError
        Unknown name; the message offers near ones.
    """
    _check(name)
    return _infos.get(name, ModelInfo(family="other"))


def defined_in(name: str) -> str:
    """Name of the module that registered a model.

    Raises
    ------
    ValueError
        Unknown name; the message offers near ones.
    """
    _check(name)
    return _builders[name].__module__


def create_model(name: str, *, pretrained: bool | str | Path = False, **overrides: Any) -> nn.Module:
    """Build a registered model, in eval mode.

    Parameters
    ----------
    name
        One of `list_models()`.
    pretrained
        True: the published weights, from an installed package. A path: a safetensors file, or a folder with
        ``model.safetensors``. False: random weights from torch's global generator.
    overrides
        Fields of the model's configuration, and options of its builder such as ``num_classes``.

    Raises
    ------
    ValueError
        Unknown name (the message offers near ones), unknown override, or weights that do not fit.
    TypeError
        ``pretrained`` is neither a bool nor a path.
    FileNotFoundError
        The weights are not there; the message says what to install.
    """
    _check(name)
    if not isinstance(pretrained, bool | str | Path):
        raise TypeError(f"pretrained must be True, False or a path, not {pretrained!r}")
    return _builders[name](pretrained=pretrained, **overrides).eval()


def _check(name: str) -> None:
    """Refuse what is no registered name."""
    if not isinstance(name, str):
        raise TypeError(f"a model's name must be a string, not {type(name).__name__}")
    if name not in _builders:
        wanted = name.lower()
        near = difflib.get_close_matches(wanted, _builders, n=3, cutoff=0.5)
        near = near or [known for known in list_models() if wanted and wanted in known][:3]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(list_models())}"
        raise ValueError(f"unknown model {name!r}: {hint}")
