"""Facts about the registered models, without building their weights."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from models.bert import DISTRIBUTIONS, BertModel
from models.registry import create_model, list_models

__all__ = ["catalogue"]


def catalogue() -> list[dict[str, Any]]:
    """One row a model: name, parameters, shapes, and the source of its weights."""
    return [_row(name) for name in list_models()]


def _row(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = create_model(name)
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shapes": _shapes(model),
        "source": _source(name),
    }


def _shapes(model: torch.nn.Module) -> str:
    if not isinstance(model, BertModel):
        return type(model).__name__
    sizes = model.config
    return (
        f"{sizes.layers} layers, hidden {sizes.hidden}, {sizes.heads} heads of {sizes.hidden // sizes.heads}, "
        f"feed-forward {sizes.intermediate}, up to {sizes.positions} tokens"
    )


def _source(name: str) -> str:
    if name not in DISTRIBUTIONS:
        return "random, or pretrained=PATH"
    package = DISTRIBUTIONS[name]
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"pip install {package}"
