"""Which weights of a model can be N:M sparse, by what names, and why others are left dense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from algo.nm import NM

__all__ = ["HEADS", "Pattern", "SparseLayer", "dense_reasons", "match_patterns", "row_length", "sparse_layers", "weight_names"]

Pattern: TypeAlias = str | NM | Mapping[str, str | NM]
SparseLayer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.MultiheadAttention

HEADS = tuple(glob for name in ("head", "heads", "classifier", "lm_head", "fc", "score", "predictions", "cls", "class_head",
                           "box_head")
              for glob in (name, f"*.{name}", f"{name}.*", f"*.{name}.*")) + ("output", "base.output")
"""Globs of the usual names of output heads: dense unless a dict of globs names them. ``output`` is a head as Meta names LLaMA's,
at the top of a model or of an adapter's base; further down it is what attention ends with."""


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """All layers that can be N:M sparse, each once, with their names; "" is the model itself if it is such a layer.

    Attention modules of torch stand for their joint input projection (``in_proj_weight``); their ``out_proj`` is a layer of
    its own.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.MultiheadAttention):
            yield name, module


def weight_names(layer: nn.Module) -> tuple[str, ...]:
    """Names of a layer's weights that are N:M sparse: ``weight``, or the input projections of torch's attention."""
    if not isinstance(layer, nn.MultiheadAttention):
        return ("weight",)
    joint = layer.in_proj_weight is not None
    return ("in_proj_weight",) if joint else ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def row_length(layer: nn.Module) -> int:
    """Consecutive weights among which groups are formed: input features, or input channels of one group."""
    return min(cast(Tensor, getattr(layer, name)).shape[1] for name in weight_names(layer))


def match_patterns(model: nn.Module, pattern: Pattern, *, exclude: Iterable[str] | None = None) -> dict[str, NM]:
    """Say which layer gets which pattern.

    Parameters
    ----------
    model
        A model, or a bare layer (its name is "").
    pattern
        One pattern for all layers, or globs of layer names to patterns: the first glob that matches decides,
        ``"dense"`` leaves a layer alone, an unmatched layer is dense.
    exclude
        Globs of layers that stay dense whatever ``pattern`` says. By default `HEADS` if ``pattern`` is one for all
        layers, none if it is a dict.

    Returns
    -------
    dict[str, NM]
        Only the layers that become sparse, in model order; for the others see `dense_reasons`.

    Raises
    ------
    TypeError
        ``pattern`` is of another kind.
    ValueError
        Not one layer matches, a glob matches none, or a layer that is named in full cannot be sparse.
    """
    table = _as_table(pattern)
    out = _excluded(pattern, exclude)
    names = [name for name, _ in sparse_layers(model)]
    used = {glob for glob in table if any(fnmatchcase(name, glob) for name in names)}
    reasons = _reasons(model, table, out)
    found: dict[str, NM] = {}
    for name in names:
        glob = _glob(name, table)
        if glob is None or any(fnmatchcase(name, other) for other in out) or table[glob].is_dense:
            continue
        if name not in reasons:
            found[name] = table[glob]
        elif glob == name and name:
            raise ValueError(f"layer {name!r} cannot be {table[glob]}: {reasons[name]}")
    unused = [glob for glob in table if glob not in used]
    dense = any(nm.is_dense for nm in table.values())
    if unused or not (found or (dense and used)):
        raise ValueError(_no_match(unused or list(table), names, out, reasons))
    return found


def dense_reasons(model: nn.Module, pattern: Pattern, *, exclude: Iterable[str] | None = None) -> dict[str, str]:
    """Why layers stay dense under a pattern: name to reason, in model order. Parameters as in `match_patterns`."""
    return _reasons(model, _as_table(pattern), _excluded(pattern, exclude))


def _excluded(pattern: Pattern, exclude: Iterable[str] | None) -> tuple[str, ...]:
    if exclude is not None:
        return tuple(exclude)
    return () if isinstance(pattern, Mapping) else HEADS


def _glob(name: str, table: Mapping[str, NM]) -> str | None:
    return next((glob for glob in table if fnmatchcase(name, glob)), None)


def _reasons(model: nn.Module, table: Mapping[str, NM], exclude: tuple[str, ...]) -> dict[str, str]:
    embeddings = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    reasons = {}
    for name, layer in sparse_layers(model):
        glob = _glob(name, table)
        weights = [getattr(layer, weight) for weight in weight_names(layer)] if not _parametrized(layer) else []
        tied = next((embeddings[id(weight)] for weight in weights if id(weight) in embeddings), None)
        shadow = next((other for other in exclude if fnmatchcase(name, other)), None)
        if glob is None:
            reasons[name] = "no glob matches"
        elif shadow is not None:
            reasons[name] = f"excluded by {shadow!r}"
        elif table[glob].is_dense:
            reasons[name] = f"dense by {glob!r}"
        elif tied is not None:
            reasons[name] = f"its weight is that of the embedding {tied!r}, which is looked up, not multiplied"
        elif (length := row_length(layer)) < table[glob].m and table[glob].kept(length) == length:
            reasons[name] = f"a row of {length} weights keeps all of them at {table[glob]} (depth-wise, or few channels)"
    return reasons


def _parametrized(layer: nn.Module) -> bool:
    return any(parametrize.is_parametrized(layer, name) for name in weight_names(layer))


def _no_match(globs: list[str], names: list[str], exclude: tuple[str, ...], reasons: Mapping[str, str]) -> str:
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    outside = f" outside {exclude}" if exclude and exclude != HEADS else ""
    told = [f"{name or 'the model'}: {reason}" for name, reason in reasons.items() if reason != "no glob matches"]
    why = "; ".join(told[:3])
    return (f"no Linear or convolution layer matches {', '.join(map(repr, globs))}{outside}: the layers are {shown or 'none'}"
            + (f" ({why})" if why else ""))


def _as_table(pattern: Pattern) -> dict[str, NM]:
    if isinstance(pattern, str | NM):
        return {"*": NM(pattern)}
    if not isinstance(pattern, Mapping):
        raise TypeError(f'a pattern is "N:M", an NM or a dict of name globs, not {type(pattern).__name__}')
    if not pattern:
        raise ValueError('the dict of patterns is empty: give at least one glob, such as {"*": "2:4"}')
    return {glob: NM(nm) for glob, nm in pattern.items()}
