"""Make the Linear and Conv2d layers of a model N:M sparse, while it trains or at once.

`sparsify` -> train -> `finalize` is the whole use. A training method registers a torch parametrisation: the
layer's
``weight`` is then masked, and the parameter that the optimiser sees (``parametrizations.weight.original``) is
dense.

Ref: SR-STE, A. Zhou et al., arXiv 2102.04010: forward with the masked weight; backward straight through to
all weights, pruned ones too, plus ``decay * (1 - mask) * weight``, which pulls pruned weights towards zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from algo.mask import magnitude_mask
from algo.nm import NM
from algo.verify import violations

__all__ = [
    "LayerRow",
    "Method",
    "NMParametrization",
    "Pattern",
    "SparseLayer",
    "finalize",
    "freeze_masks",
    "match_patterns",
    "model_patterns",
    "pattern_of",
    "set_pattern",
    "sparse_layers",
    "sparsify",
    "sparsity_report",
]

Method = Literal["sr-ste", "ste", "magnitude"]
Pattern: TypeAlias = str | NM | Mapping[str, str | NM]
SparseLayer: TypeAlias = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class LayerRow:
    """One layer of a `sparsity_report`: ``pattern`` is None for a dense layer, ``violations`` counts
    groups."""

    layer: str
    shape: tuple[int, ...]
    pattern: NM | None
    nonzeros: int
    violations: int


class _StraightThrough(torch.autograd.Function):
    """``weight * mask`` with the gradient ``g + decay * (1 - mask) * weight``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        gradient = gradients[0]
        if ctx.decay:
            gradient = torch.addcmul(gradient, weight, (~mask).to(weight.dtype), value=ctx.decay)
        return gradient, None, None


class NMParametrization(nn.Module):
    """Mask a weight by magnitude in each forward, straight-through in backward.

    Parameters
    ----------
    weight
        The weight it will stand before: ``(O, I)`` or ``(O, I, kh, kw)``.
    pattern
        The N:M pattern; assign to ``pattern`` to change it.
    decay
        SR-STE's lambda; 0 is the plain straight-through estimator.

    Members
    -------
    mask
        bool buffer, the weight's shape: the mask of the latest forward.
    frozen
        bool buffer, one element: while True the mask stays as it is.
    """

    mask: Tensor
    frozen: Tensor

    def __init__(self, weight: Tensor, pattern: NM, *, decay: float) -> None:
        super().__init__()
        self.pattern = pattern
        self.decay = decay
        self.register_buffer("mask", magnitude_mask(weight, pattern))
        self.register_buffer("frozen", torch.zeros(1, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.frozen.item():
            # A new tensor, not a copy into the old one: backward may still need the old one.
            self.mask = magnitude_mask(weight, self.pattern)
        return cast(Tensor, _StraightThrough.apply(weight, self.mask, self.decay))

    def extra_repr(self) -> str:
        return f"{self.pattern}, decay={self.decay}"


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """All layers that can be N:M sparse, with their names; "" is the model itself if it is such a layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, module


def match_patterns(model: nn.Module, pattern: Pattern, *, exclude: Iterable[str] = ()) -> dict[str, NM]:
    """Say which layer gets which pattern.

    Parameters
    ----------
    model
        A model, or a bare Linear or Conv2d (its name is "").
    pattern
        One pattern for all layers, or globs of layer names to patterns: the first glob that matches decides,
        ``"dense"`` leaves a layer alone, an unmatched layer is dense.
    exclude
        Globs of layers that stay dense whatever ``pattern`` says.

    Returns
    -------
    dict[str, NM]
        Only the layers that become sparse, in model order.

    Raises
    ------
    TypeError
        ``pattern`` is of another kind.
    ValueError
        Not one layer matches, or a glob matches none.
    """
    table = _as_table(pattern)
    excluded = tuple(exclude)
    used: set[str] = set()
    found: dict[str, NM] = {}
    names = [name for name, _ in sparse_layers(model)]
    for name in names:
        glob = next((glob for glob in table if fnmatchcase(name, glob)), None)
        if glob is None or any(fnmatchcase(name, out) for out in excluded):
            continue
        used.add(glob)
        if not table[glob].is_dense:
            found[name] = table[glob]
    unused = [
        glob for glob in table if glob not in used and not any(fnmatchcase(name, glob) for name in names)
    ]
    if unused or not (found or used):
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise ValueError(
            f"no Linear or Conv2d layer matches {', '.join(map(repr, unused or table))}"
            f"{f' outside {excluded}' if excluded else ''}: the layers are {shown or 'none'}"
        )
    return found


def sparsify(
    model: nn.Module,
    pattern: Pattern,
    *,
    method: Method = "sr-ste",
    exclude: Iterable[str] = (),
    decay: float = 2e-4,
) -> dict[str, NM]:
    """Make layers N:M sparse, in place.

    Parameters
    ----------
    model, pattern, exclude
        See `match_patterns`. Embeddings and norms are never touched.
    method
        ``"sr-ste"`` and ``"ste"`` parametrise the weights, for training; `finalize` ends it.
        ``"magnitude"`` zeroes the smallest weights at once.
    decay
        SR-STE's lambda.

    Returns
    -------
    dict[str, NM]
        The layers made sparse and their patterns.

    Raises
    ------
    ValueError
        Unknown method, no layer matches, or a layer is parametrised already (use `set_pattern`).
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    if not decay >= 0:
        raise ValueError(f"decay must be >= 0, not {decay!r}")
    chosen = match_patterns(model, pattern, exclude=exclude)
    layers = dict(sparse_layers(model))
    for name in chosen:
        if parametrize.is_parametrized(layers[name], "weight"):
            raise ValueError(
                f"layer {name!r} is being trained already: call finalize() first, or set_pattern()"
            )
    for name, nm in chosen.items():
        layer = layers[name]
        if method == "magnitude":
            with torch.no_grad():
                layer.weight.mul_(magnitude_mask(layer.weight, nm))
            _remember(layer, nm)
        else:
            mask = NMParametrization(layer.weight, nm, decay=decay if method == "sr-ste" else 0.0)
            parametrize.register_parametrization(layer, "weight", mask.to(layer.weight.device))
    return chosen


def set_pattern(model: nn.Module, pattern: Pattern, *, exclude: Iterable[str] = ()) -> dict[str, NM]:
    """Change the patterns of layers in training, keeping their dense weights; masks thaw.

    Raises
    ------
    ValueError
        A layer that matches is not in training (see `sparsify`).
    """
    chosen = match_patterns(model, pattern, exclude=exclude)
    masks = dict(_parametrizations(model))
    missing = [name for name in chosen if name not in masks]
    if missing:
        raise ValueError(f"layer {missing[0]!r} is not being trained sparse: call sparsify() first")
    for name, nm in chosen.items():
        masks[name].pattern = nm
        masks[name].frozen.fill_(False)
    return chosen


def freeze_masks(model: nn.Module, frozen: bool = True) -> None:
    """Keep the masks as they are from now on, or let them follow the magnitudes again."""
    for name, mask in _parametrizations(model):
        if frozen and not mask.frozen.item():
            weight = dict(sparse_layers(model))[name].parametrizations.weight.original  # type: ignore[union-attr]
            mask.mask = magnitude_mask(cast(Tensor, weight), mask.pattern)
        mask.frozen.fill_(frozen)


def finalize(model: nn.Module) -> dict[str, NM]:
    """Bake the masks into the weights and remove the parametrisations, in place.

    Each layer keeps its pattern as the attribute ``nm_pattern``; read it with `pattern_of`.

    Returns
    -------
    dict[str, NM]
        Every sparse layer's pattern, those made sparse at once included.
    """
    for name, mask in list(_parametrizations(model)):
        layer = dict(sparse_layers(model))[name]
        pattern = mask.pattern
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        # A layer that was parametrised and is no longer must hand out a leaf that trains again.
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        _remember(layer, pattern)
    return model_patterns(model)


def model_patterns(model: nn.Module) -> dict[str, NM]:
    """Patterns of the sparse layers of a model, by layer name; dense layers are left out."""
    patterns = {name: pattern_of(layer) for name, layer in sparse_layers(model)}
    return {name: nm for name, nm in patterns.items() if nm is not None}


def pattern_of(layer: nn.Module) -> NM | None:
    """The pattern that a layer's weight obeys, in training or finalised; None if it is dense."""
    for mask in _masks(layer):
        return mask.pattern
    return getattr(layer, "nm_pattern", None)


def sparsity_report(model: nn.Module) -> list[LayerRow]:
    """One row for each Linear and Conv2d, in model order."""
    return [_row(name, layer) for name, layer in sparse_layers(model)]


def _row(name: str, layer: SparseLayer) -> LayerRow:
    pattern, weight = pattern_of(layer), layer.weight.detach()
    broken = 0 if pattern is None else len(violations(weight, pattern))
    return LayerRow(name, tuple(weight.shape), pattern, int(torch.count_nonzero(weight)), broken)


def _as_table(pattern: Pattern) -> dict[str, NM]:
    if isinstance(pattern, str | NM):
        return {"*": NM(pattern)}
    if not isinstance(pattern, Mapping):
        raise TypeError(f'a pattern is "N:M", an NM or a dict of name globs, not {type(pattern).__name__}')
    if not pattern:
        raise ValueError('the dict of patterns is empty: give at least one glob, such as {"*": "2:4"}')
    return {glob: NM(nm) for glob, nm in pattern.items()}


def _masks(layer: nn.Module) -> Sequence[NMParametrization]:
    if not parametrize.is_parametrized(layer, "weight"):
        return ()
    chain = cast(Any, layer).parametrizations.weight
    return [mask for mask in chain if isinstance(mask, NMParametrization)]


def _parametrizations(model: nn.Module) -> Iterator[tuple[str, NMParametrization]]:
    for name, layer in sparse_layers(model):
        for mask in _masks(layer):
            yield name, mask


def _remember(layer: nn.Module, pattern: NM) -> None:
    layer.nm_pattern = pattern  # type: ignore[assignment]
