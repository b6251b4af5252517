"""The registered models with what they cost and what others published of them: rows for a list, pages for the documentation."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import models
from algo import count as counting
from algo.count import count
from hw.verilog import cache_dir
from models.bert import DISTRIBUTIONS
from models.info import ModelInfo, Published
from models.registry import create_model, defined_in, list_models, model_info
from nmforge.errors import BadInputError, unknown

__all__ = ["Cost", "catalogue", "cost", "counts_page", "families"]


@dataclass(frozen=True)
class Cost:
    """Parameters, MACs and activations of a model on its example inputs, as `algo.count` counts; None: no example inputs."""

    parameters: int
    macs: int | None
    activations: int | None


def families() -> list[str]:
    """Families of the registered models, sorted."""
    return sorted({model_info(name).family for name in list_models()})


def catalogue(name: str | None = None, *, family: str | None = None) -> list[dict[str, Any]]:
    """One row a model (JSON values).

    Parameters
    ----------
    name
        Part of the names, or a glob; None: all.
    family
        One of `families()`, in any case; None: all.

    Returns
    -------
    list[dict]
        ``name``, ``family``, ``params``, ``macs`` and ``activations`` on the example inputs of ``input_shape`` (name -> shape),
        ``paper`` (arXiv number), ``weights`` (where they come from).

    Raises
    ------
    BadInputError
        No such family, or no such name; the message offers near ones.
    """
    names = list_models()
    if family is not None:
        known = {item.lower(): item for item in families()}
        if family.lower() not in known:
            raise unknown("family", family, known.values())
        names = [item for item in names if model_info(item).family == known[family.lower()]]
    if name is not None:
        found = [item for item in names if name in item or fnmatch.fnmatchcase(item, name)]
        if not found:
            raise unknown("model", name, names)
        names = found
    return [_row(item) for item in names]


def _row(name: str) -> dict[str, Any]:
    info, costs = model_info(name), cost(name)
    return {
        "name": name,
        "family": info.family,
        "params": costs.parameters,
        "macs": costs.macs,
        "activations": costs.activations,
        "input_shape": {given.name: list(given.shape) for given in info.inputs},
        "paper": info.paper,
        "weights": _weights(name),
    }


def _weights(name: str) -> str:
    if name not in DISTRIBUTIONS:
        return "random, or pretrained=PATH"
    package = DISTRIBUTIONS[name]
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"pip install {package}"


# -- counting ---------------------------------------------------------------------------------------------------------


def cost(name: str) -> Cost:
    """Count a registered model on the meta device, or recall what it came to: counts are kept in the cache by the hash of
    the models' sources."""
    if not defined_in(name).startswith("models."):
        return _counted(name)
    file = cache_dir() / "models" / f"{_sources()}.json"
    known = _recall(file)
    if name not in known:
        known = {**_recall(file), name: asdict(_counted(name))}
        _keep(file, known)
    return Cost(**known[name])


def _counted(name: str) -> Cost:
    info = model_info(name)
    with torch.device("meta"):
        model = create_model(name)
    if not info.inputs:
        return Cost(sum(parameter.numel() for parameter in model.parameters()), None, None)
    part = model if info.counted is None else info.counted(model)
    found = count(part, tuple(given.tensor() for given in info.inputs))
    return Cost(sum(parameter.numel() for parameter in model.parameters()), found.macs, found.activations)


@functools.cache
def _sources() -> str:
    """Hash of all that decides a count."""
    files = [*sorted(Path(models.__file__).parent.glob("*.py")), Path(counting.__file__)]
    text = b"".join(file.name.encode() + file.read_bytes() for file in files)
    return hashlib.sha256(text + torch.__version__.encode()).hexdigest()[:16]


def _recall(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # not there, or damaged: counted again
        return {}


def _keep(file: Path, known: dict[str, Any]) -> None:
    """Without effect where the cache cannot be written."""
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known))
        temporary.replace(file)
    except OSError:
        return


# -- the page of counts -----------------------------------------------------------------------------------------------

_INTRODUCTION = """\
# Counts

Generated (`nmforge models --markdown > docs/counts.md`) and tested (`tests/nmforge/test_catalogue.py`). MACs are those of
convolutions, linear layers and matrix products, attention's included; activations are the output elements of convolutions
([`algo/count.py`](../algo/count.py)), all at batch 1 on the input shown. A difference is ours minus the published figure, in
percent of it; "equal" is equal to the unit. Figures that sources print rounded cannot be closer than their last digit."""


def counts_page(names: Iterable[str] | None = None) -> str:
    """Markdown: a section a family, a row a model, and each published figure with its source and the difference."""
    chosen = list_models() if names is None else list(names)
    parts = [_INTRODUCTION]
    for family in sorted({model_info(name).family for name in chosen}, key=str.lower):
        parts.append(_section(family, [name for name in chosen if model_info(name).family == family]))
    return "\n\n".join(parts) + "\n"


def _section(family: str, names: Sequence[str]) -> str:
    papers = dict.fromkeys(model_info(name).paper for name in names)
    links = ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in papers if paper)
    marked = ". A reconstruction: there is no public code" if any(model_info(name).reconstruction for name in names) else ""
    lines = [f"## {family}", *([f"{links}{marked}", ""] if links else [])]
    lines += ["| model | input | parameters | MACs | activations | published: difference (source) |"]
    lines += ["|---|---|---:|---:|---:|---|"]
    for name in sorted(names, key=lambda name: cost(name).parameters):
        info, costs = model_info(name), cost(name)
        shapes = ", ".join("x".join(map(str, given.shape[1:])) for given in info.inputs)
        numbers = " | ".join("" if value is None else f"{value:,}" for value in asdict(costs).values())
        lines.append(f"| `{name}` | {shapes} | {numbers} | {_against(info, costs)} |")
    return "\n".join(lines)


def _against(info: ModelInfo, costs: Cost) -> str:
    rows = [_source(published, costs) for published in info.published]
    return "; ".join([*rows, *([info.note] if info.note else [])])


def _source(published: Published, costs: Cost) -> str:
    figures = []
    for quantity, value in published.figures():
        unit = "MACs" if quantity == "macs" else quantity
        figures.append(f"{value:,} {unit}: {_difference(getattr(costs, quantity), value)}")
    note = f"; {published.note}" if published.note else ""
    return f"{', '.join(figures)} ({published.source}{note})"


def _difference(own: int | None, published: int) -> str:
    if own is None:
        raise BadInputError("a figure is published of a model that has no example inputs")
    return "equal" if own == published else f"{100 * (own / published - 1):+.2f} %"
