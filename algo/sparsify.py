"""Make the layers of a model N:M sparse, while it trains or at once.

`sparsify` -> train -> `finalize` is the whole use. A training method (`algo.methods`) registers a torch parametrisation: the
layer's ``weight`` is then masked, and the parameter that the optimiser sees (``parametrizations.weight.original``) is dense.
Methods with a schedule are told of progress by `advance`, before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from algo.layers import Pattern, SparseLayer, dense_reasons, match_patterns, sparse_layers, weight_names
from algo.mask import magnitude_mask
from algo.methods import FixedMask, GradualMask, NMParametrization, SoftThreshold, StepMask, StraightThrough
from algo.nm import NM
from algo.oneshot import Calibration, prune_calibrated
from algo.verify import violations

__all__ = [
    "LayerRow",
    "Method",
    "NMParametrization",
    "Pattern",
    "SparseLayer",
    "advance",
    "finalize",
    "freeze_masks",
    "mask_schedule",
    "match_patterns",
    "model_patterns",
    "parametrizations",
    "pattern_of",
    "set_pattern",
    "sparse_layers",
    "sparsify",
    "sparsity_report",
]

Method = Literal["sr-ste", "ste", "magnitude", "fixed", "gradual", "s-ste", "step", "wanda", "sparsegpt"]


@dataclass(frozen=True)
class LayerRow:
    """One weight of a `sparsity_report`: ``pattern`` is None for a dense layer, ``violations`` counts groups, ``reason`` says why
    a layer is dense if a pattern was given."""

    layer: str
    shape: tuple[int, ...]
    pattern: NM | None
    nonzeros: int
    violations: int
    reason: str = ""


def sparsify(
    model: nn.Module,
    pattern: Pattern,
    *,
    method: Method = "sr-ste",
    exclude: Iterable[str] | None = None,
    decay: float = 2e-4,
    end: float = 0.75,
    precondition: float = 0.25,
    calibration: Calibration | None = None,
    hold: bool = False,
) -> dict[str, NM]:
    """Make layers N:M sparse, in place.

    Parameters
    ----------
    model, pattern, exclude
        See `match_patterns`. Embeddings and norms are never touched, output heads not by default.
    method
        ``"sr-ste"``, ``"ste"``, ``"fixed"``, ``"gradual"``, ``"s-ste"`` and ``"step"`` parametrise the weights, for training;
        `finalize` ends it. ``"magnitude"`` zeroes the smallest weights at once, ``"wanda"`` and ``"sparsegpt"`` at once by
        calibration data. `algo.methods.METHODS` describes each and names its source; for ``"idp"`` see `algo.idp.run_idp`.
    decay
        SR-STE's lambda, >= 0.
    end
        Of ``"gradual"``: share of the steps, in (0, 1], after which N is reached.
    precondition
        Of ``"step"``: share of the steps, in [0, 1), that are dense.
    calibration
        Of ``"wanda"`` and ``"sparsegpt"``: batches, each what the model takes: a tensor, a tuple of arguments or a dict.
    hold
        Of methods that prune at once: keep what was pruned at zero in training that follows, until `finalize`.

    Returns
    -------
    dict[str, NM]
        The layers made sparse and their patterns.

    Raises
    ------
    ValueError
        Unknown method, no layer matches, a layer is parametrised already (use `set_pattern`), or calibration is missing.
    """
    _check_options(method, decay, end, precondition, calibration)
    chosen = match_patterns(model, pattern, exclude=exclude)
    layers = dict(sparse_layers(model))
    for name in chosen:
        if any(parametrize.is_parametrized(layers[name], weight) for weight in weight_names(layers[name])):
            raise ValueError(f"layer {name!r} {_what_holds(layers[name])}")
    if method in ("magnitude", "wanda", "sparsegpt"):
        _prune(model, chosen, method, calibration)
        method = "fixed"
        if not hold:
            return chosen
    tied: dict[int, NMParametrization] = {}
    for name, nm in chosen.items():
        for weight_name in weight_names(layers[name]):
            weight = getattr(layers[name], weight_name)
            mask = tied.setdefault(id(weight), _parametrization(weight, nm, method, decay, end, precondition))
            parametrize.register_parametrization(layers[name], weight_name, mask.to(weight.device))
    return chosen


def _check_options(method: str, decay: float, end: float, precondition: float, calibration: Calibration | None) -> None:
    if method == "idp":
        raise ValueError('"idp" trains level after level: call algo.idp.run_idp (nmforge train --set method=idp)')
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    if not decay >= 0:
        raise ValueError(f"decay must be >= 0, not {decay!r}")
    if not 0 < end <= 1:
        raise ValueError(f"end must be in (0, 1], not {end!r}")
    if not 0 <= precondition < 1:
        raise ValueError(f"precondition must be in [0, 1), not {precondition!r}")
    if method in ("wanda", "sparsegpt") and calibration is None:
        raise ValueError(f"method {method!r} chooses weights by their inputs: give calibration=batches")


def _prune(model: nn.Module, chosen: dict[str, NM], method: str, calibration: Calibration | None) -> None:
    """Zero weights now."""
    layers = dict(sparse_layers(model))
    if method == "magnitude":
        for name, nm in chosen.items():
            for weight in _weights(layers[name]):
                with torch.no_grad():
                    weight.mul_(magnitude_mask(weight, nm))
    else:
        prune_calibrated(model, chosen, method=cast(Literal["wanda", "sparsegpt"], method), calibration=calibration or ())
    for name, nm in chosen.items():
        _remember(layers[name], nm)


def _what_holds(layer: nn.Module) -> str:
    """Why a parametrised layer cannot be made sparse, and the way out."""
    own = [step for steps in cast(Any, layer).parametrizations.values() for step in steps]
    if any(isinstance(step, NMParametrization) for step in own):
        return "is being trained already: call finalize() first, or set_pattern()"
    kinds = ", ".join(type(step).__name__.strip("_") for step in own)
    return f"has a parametrisation of its own ({kinds}): torch.nn.utils.parametrize.remove_parametrizations takes it off"


def _parametrization(weight: Tensor, nm: NM, method: str, decay: float, end: float, precondition: float) -> NMParametrization:
    if method == "fixed":
        return FixedMask(weight, nm)
    if method == "gradual":
        return GradualMask(weight, nm, end=end)
    if method == "s-ste":
        return SoftThreshold(weight, nm)
    if method == "step":
        return StepMask(weight, nm, precondition=precondition)
    return StraightThrough(weight, nm, decay=decay if method == "sr-ste" else 0.0)


def advance(model: nn.Module, step: int, steps: int) -> None:
    """Tell methods with a schedule (gradual, step) that ``step`` of ``steps`` are done; call it before each step.

    It has the signature of `algo.train`'s ``before_step``, and does nothing for other methods.
    """
    for _, weight, mask in parametrizations(model):
        mask.at(weight, step / steps)


def mask_schedule(freeze: float) -> Callable[[nn.Module, int, int], None]:
    """A ``before_step`` of `algo.train`: `advance`, and for the last share ``freeze`` of the steps, in [0, 1), `freeze_masks`."""

    def before_step(model: nn.Module, step: int, steps: int) -> None:
        advance(model, step, steps)
        if freeze and step >= round(steps * (1 - freeze)):
            freeze_masks(model)

    return before_step


def set_pattern(model: nn.Module, pattern: Pattern, *, exclude: Iterable[str] | None = None) -> dict[str, NM]:
    """Change the patterns of layers in training, keeping their dense weights; masks thaw.

    Raises
    ------
    ValueError
        A layer that matches is not in training (see `sparsify`).
    """
    chosen = match_patterns(model, pattern, exclude=exclude)
    found = list(parametrizations(model))
    missing = [name for name in chosen if name not in {name for name, _, _ in found}]
    if missing:
        raise ValueError(f"layer {missing[0]!r} is not being trained sparse: call sparsify() first")
    for name, _, mask in found:
        if name in chosen:
            mask.pattern = chosen[name]
            mask.thaw()
    return chosen


def freeze_masks(model: nn.Module, frozen: bool = True) -> None:
    """Keep the masks of the present weights from now on, or let them follow the magnitudes again."""
    for _, weight, mask in parametrizations(model):
        if frozen:
            mask.freeze(weight)
        else:
            mask.thaw()


def finalize(model: nn.Module) -> dict[str, NM]:
    """Bake the masks into the weights and remove the parametrisations, in place. Tied weights stay tied.

    Each layer keeps its pattern as the attribute ``nm_pattern``; read it with `pattern_of`.

    Returns
    -------
    dict[str, NM]
        Every sparse layer's pattern, those made sparse at once included.
    """
    baked: dict[int, nn.Parameter] = {}
    for _, layer in list(sparse_layers(model)):
        masks = _masks(layer)
        if not masks:
            continue
        values = {}
        for weight_name, original, mask in masks:
            mask.freeze(original)
            # A layer that was parametrised and is no longer must hand out a leaf that trains again. A sum, not a copy: no minus
            # zeros of masked weights.
            values[weight_name] = baked.setdefault(id(original), nn.Parameter(getattr(layer, weight_name).detach() + 0.0))
        _remove_parametrizations(layer, list(values))
        for weight_name, value in values.items():
            setattr(layer, weight_name, value)
        _remember(layer, masks[0][2].pattern)
    return model_patterns(model)


def model_patterns(model: nn.Module) -> dict[str, NM]:
    """Patterns of the sparse layers of a model, by layer name; dense layers are left out."""
    patterns = {name: pattern_of(layer) for name, layer in sparse_layers(model)}
    return {name: nm for name, nm in patterns.items() if nm is not None}


def pattern_of(layer: nn.Module) -> NM | None:
    """The pattern that a layer's weight obeys, in training or finalised; None if it is dense."""
    for _, _, mask in _masks(layer):
        return mask.pattern
    return getattr(layer, "nm_pattern", None)


def parametrizations(model: nn.Module) -> Iterator[tuple[str, Tensor, NMParametrization]]:
    """Layer name, dense weight and parametrisation of every weight in training."""
    for name, layer in sparse_layers(model):
        for _, original, mask in _masks(layer):
            yield name, original, mask


def sparsity_report(
    model: nn.Module, pattern: Pattern | None = None, *, exclude: Iterable[str] | None = None
) -> list[LayerRow]:
    """One row for each weight that could be sparse, in model order; with a ``pattern``, why the others stay dense."""
    reasons = {} if pattern is None else dense_reasons(model, pattern, exclude=exclude)
    return [_row(name, layer, weight, reasons.get(name, ""))
            for name, layer in sparse_layers(model) for weight in _weights(layer)]


def _row(name: str, layer: SparseLayer, weight: Tensor, reason: str) -> LayerRow:
    pattern, weight = pattern_of(layer), weight.detach()
    broken = 0 if pattern is None else len(violations(weight, pattern))
    return LayerRow(name, tuple(weight.shape), pattern, int(torch.count_nonzero(weight)), broken, "" if pattern else reason)


def _weights(layer: nn.Module) -> list[Tensor]:
    return [cast(Tensor, getattr(layer, name)) for name in weight_names(layer)]


def _masks(layer: nn.Module) -> list[tuple[str, Tensor, NMParametrization]]:
    """Weight name, dense weight and parametrisation of each sparse weight of a layer."""
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.MultiheadAttention):
        return []
    found = []
    for name in weight_names(layer):
        if parametrize.is_parametrized(layer, name):
            chain = cast(Any, layer).parametrizations[name]
            found += [(name, chain.original, mask) for mask in chain if isinstance(mask, NMParametrization)]
    return found


def _remove_parametrizations(layer: nn.Module, names: list[str]) -> None:
    if set(names) == set(cast(Any, layer).parametrizations):
        # not torch's function: it changes the class, which copies of the layer share
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
    else:
        for name in names:
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)


def _remember(layer: nn.Module, pattern: NM) -> None:
    layer.nm_pattern = pattern  # type: ignore[assignment]
