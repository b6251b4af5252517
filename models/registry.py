"""Names of models: a decorator that records them and the two functions that users call."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn

__all__ = ["create_model", "list_models", "register_model"]


class ModelBuilder(Protocol):
    """A function that builds one named model."""

    __name__: str

    def __call__(self, *, pretrained: bool | str | Path = False, **overrides: Any) -> nn.Module: ...


Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}


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
    FileNotFoundError
        The weights are not there; the message says what to install.
    """
    if not isinstance(name, str):
        raise TypeError(f"a model's name must be a string, not {type(name).__name__}")
    if name not in _builders:
        near = difflib.get_close_matches(name, _builders, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(list_models())}"
        raise ValueError(f"unknown model {name!r}: {hint}")
    return _builders[name](pretrained=pretrained, **overrides).eval()
