"""Inherited dynamic pruning: from a dense, fine-tuned model to N:M in steps, M fixed and N going down.

Each level starts from the weights of the level before it (inheritance) and trains with masks that follow the
magnitudes at every step (dynamic), with SR-STE gradients; masks are frozen for the last part of a level so
that the weights that stay can settle. Every level is a usable model, kept in its own folder:
``model.safetensors`` (dense weights and masks) and ``level.json``. ``levels="all"`` makes the whole family (M-1):M ... N:M in
one run; `family_table` and `family_plot` sum it up.

Ref: IDP, arXiv 2208.06118, as reconstructed from its abstract; SR-STE, arXiv 2102.04010.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.progress import Progress
from torch import Tensor, nn

from algo.checkpoint import difference, read_json, read_tensors, write_json, write_tensors
from algo.compress import choose_format, row_bits
from algo.distributed import from_main
from algo.layers import sparse_layers, weight_names
from algo.mask import group_minimum
from algo.nm import NM
from algo.oneshot import Calibration, prune_calibrated
from algo.sparsify import Pattern, finalize, mask_schedule, match_patterns, parametrizations, set_pattern, sparsify
from algo.train import Batches, LossFn, RunOptions, TrainConfig, TrainResult, train

__all__ = [
    "FamilyRow",
    "IDPConfig",
    "Level",
    "family_plot",
    "family_table",
    "idp_family",
    "idp_levels",
    "idp_schedule",
    "run_idp",
    "stage_accuracy",
]


@dataclass(frozen=True, kw_only=True)
class IDPConfig:
    """How each level trains.

    Members
    -------
    train
        Epochs and step size of one level.
    freeze
        Share of a level's steps, at its end, in which masks stay; in [0, 1).
    decay
        SR-STE's lambda.
    schedule
        N of each level, descending, for patterns that should not follow `idp_schedule`: ``{"1:8": (4, 2,
        1)}``.
    levels
        ``"halving"``: `idp_schedule`. ``"all"``: every N from M - 1 down, a family of models.
    budget
        Epochs of a level, by its name (``{"1:8": 4}``); others take ``train.epochs``.
    inherit
        What a level starts from. ``"weights"``: the weights of the level before, masked by magnitude. ``"second-order"``: what
        SparseGPT makes of them, so that weights that stay make up for those that go; needs ``calibration``. Pruned weights keep
        their sign and at most half the smallest magnitude that stays in their group, from which they can come back.
    floor
        Stop after the first level whose accuracy is below; None never stops. Needs ``evaluate``.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    freeze: float = 0.25
    decay: float = 2e-4
    schedule: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    levels: Literal["halving", "all"] = "halving"
    budget: Mapping[str, int] = field(default_factory=dict)
    inherit: Literal["weights", "second-order"] = "weights"
    floor: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.freeze < 1:
            raise ValueError(f"freeze must be in [0, 1), not {self.freeze!r}")
        for pattern, levels in self.schedule.items():
            target = NM(pattern)
            if not levels or levels[-1] != target.n or list(levels) != sorted(set(levels), reverse=True):
                raise ValueError(f"the schedule of {target} must descend to {target.n}, not {levels!r}")
            NM(levels[0], target.m)
        if self.levels not in ("halving", "all"):
            raise ValueError(f'levels must be "halving" or "all", not {self.levels!r}')
        if self.inherit not in ("weights", "second-order"):
            raise ValueError(f'inherit must be "weights" or "second-order", not {self.inherit!r}')
        for name, epochs in self.budget.items():
            if not isinstance(epochs, int) or epochs < 1:
                raise ValueError(f"the budget of {name} must be a number of epochs >= 1, not {epochs!r}")

    def at(self, number: int, name: str) -> IDPConfig:
        """The configuration of level ``number`` of that name: its own epochs, and its own dropout, which else would couple the
        levels."""
        own = replace(self.train, seed=self.train.seed + number + 1, epochs=self.budget.get(name, self.train.epochs))
        return replace(self, train=own)


@dataclass(frozen=True)
class Level:
    """One finished level: its patterns by layer, its folder (None if nothing is kept), its training (None if
    reused), its accuracy (None if nobody evaluated it)."""

    patterns: Mapping[str, NM]
    folder: Path | None
    training: TrainResult | None
    accuracy: float | None = None

    @property
    def name(self) -> str:
        """The distinct patterns, such as ``"2:4"`` or ``"1:4+2:4"``."""
        return _name(self.patterns)


def idp_schedule(target: NM) -> tuple[NM, ...]:
    """Patterns to pass through, the last being ``target``: N halves from M, in at least two steps where there
    is room.

    2:4 -> 3:4, 2:4. 1:4 -> 2:4, 1:4. 2:8 -> 4:8, 2:8. 1:16 -> 8:16, 4:16, 2:16, 1:16. Dense gives ().
    """
    counts, n = [], target.m
    while n > target.n:
        n = max(target.n, math.ceil(n / 2))
        counts.append(n)
    if len(counts) == 1 and target.n + 1 < target.m:
        counts.insert(0, (target.n + target.m) // 2)
    return tuple(NM(count, target.m) for count in counts)


def idp_family(target: NM) -> tuple[NM, ...]:
    """Every pattern from (M-1):M down to the target."""
    return tuple(NM(n, target.m) for n in range(target.m - 1, target.n - 1, -1))


def idp_levels(
    targets: Mapping[str, NM], schedule: Mapping[str, tuple[int, ...]] | None = None, *, family: bool = False
) -> list[dict[str, NM]]:
    """Patterns of every layer at every level, for layers with different targets.

    There are as many levels as the longest schedule has; shorter ones are spread over them and all end
    together.
    """
    own = {NM(pattern): counts for pattern, counts in (schedule or {}).items()}
    steps = {
        nm: [NM(n, nm.m) for n in own[nm]] if nm in own else list(idp_family(nm) if family else idp_schedule(nm))
        for nm in set(targets.values())
    }
    count = max((len(step) for step in steps.values()), default=0)

    def at(nm: NM, level: int) -> NM:
        return steps[nm][math.ceil((level + 1) * len(steps[nm]) / count) - 1]

    return [{name: at(nm, level) for name, nm in targets.items()} for level in range(count)]


def run_idp(
    model: nn.Module,
    pattern: Pattern,
    batches: Batches,
    loss_fn: LossFn,
    config: IDPConfig,
    *,
    out_dir: Path | None = None,
    exclude: Iterable[str] | None = (),
    facts: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    calibration: Calibration | None = None,
    on_level: Callable[[Level], Mapping[str, Any] | None] | None = None,
    progress: Progress | None = None,
    run: RunOptions | None = None,
) -> list[Level]:
    """Prune a dense model in place; it is left parametrised at the last level: `finalize` it.

    Parameters
    ----------
    model
        Dense, fine-tuned.
    pattern, exclude
        The targets, see `algo.sparsify.match_patterns`.
    batches, loss_fn
        See `algo.train`. A level goes on with the epoch number at which the one before it stopped. To distil from the dense
        model, let the loss use it.
    out_dir
        A folder per level is written here. Finished levels are reused, an unfinished one goes on from its
        last epoch.
    facts
        Anything else that decides the result (JSON values): compared on reuse.
    evaluate
        Model in eval mode -> accuracy in [0, 1], kept with each level.
    calibration
        Batches as `algo.sparsify.sparsify` takes them, for ``inherit="second-order"``.
    on_level
        Called after each level, finished now or before.
    run
        See `algo.train.RunOptions`.

    Returns
    -------
    list[Level]
        With a ``floor``, the last one may be below it; the model is at that level then, and those before are in ``out_dir``.

    Raises
    ------
    ValueError
        A level in ``out_dir`` was made with other settings (names the key), or there is a ``floor`` but no ``evaluate``.
    """
    if config.floor is not None and evaluate is None:
        raise ValueError(f"a floor of {config.floor} needs evaluate=, which tells a model's accuracy")
    if config.inherit == "second-order" and calibration is None:
        raise ValueError('inherit="second-order" weighs weights by their inputs: give calibration=batches')
    samples = list(calibration or ()) if config.inherit == "second-order" else None
    levels = idp_levels(match_patterns(model, pattern, exclude=exclude), config.schedule, family=config.levels == "all")
    epochs = 0
    done: list[Level] = []
    for number, patterns in enumerate(levels):
        if number == 0:
            sparsify(model, dict(patterns), decay=config.decay)
        else:
            set_pattern(model, dict(patterns))
        own = config.at(number, _name(patterns))
        folder = (
            None if out_dir is None else out_dir / f"level-{number + 1}-{_name(patterns).replace(':', 'of')}"
        )
        level = _run_level(
            model,
            patterns,
            _later(batches, epochs),
            loss_fn,
            own,
            folder,
            dict(facts or {}),
            progress,
            run,
            samples,
            number == 0,
        )
        epochs += own.train.epochs
        if evaluate is not None:
            level = replace(level, accuracy=stage_accuracy(model, evaluate, folder))
        done.append(level)
        if on_level is not None:
            on_level(level)
        if config.floor is not None and level.accuracy is not None and level.accuracy < config.floor:
            break
    return done


@torch.no_grad()
def _compensate(model: nn.Module, patterns: Mapping[str, NM], samples: list[Any], *, first: bool) -> None:
    """Make SparseGPT's weights and masks those that a level starts with."""
    twin = copy.deepcopy(model)
    for _, _, mask in parametrizations(twin):
        if first:
            mask.mask = torch.ones_like(mask.mask)
        mask.set_frozen(True)  # what the level before computed with
    finalize(twin)
    prune_calibrated(twin, patterns, method="sparsegpt", calibration=samples)
    after = dict(twin.named_modules())
    for name, weight, mask in parametrizations(model):
        new = cast(Tensor, after[name].weight)
        kept = new != 0
        least = group_minimum(torch.where(kept, new.abs(), torch.inf), mask.pattern)
        bound = torch.where(least.isinf(), torch.zeros_like(least), least / 2)
        weight.copy_(torch.where(kept, new, weight.clamp(-bound, bound)))


def stage_accuracy(model: nn.Module, evaluate: Callable[[nn.Module], float], folder: Path | None) -> float:
    """Evaluate a level or another stage once, and keep the figure in its folder."""
    file = None if folder is None else folder / "accuracy.json"
    known = from_main(float(read_json(file)["accuracy"]) if file is not None and file.exists() else None)
    if known is not None:
        return known
    accuracy = float(evaluate(model.eval()))
    if file is not None:
        write_json(file, {"accuracy": accuracy})
    return accuracy


@dataclass(frozen=True)
class FamilyRow:
    """One model of a family: bytes of its sparse weights as stored (positions included) and dense, and the bound of its speed-up:
    multiplications that are left (every layer weighted by its size)."""

    name: str
    accuracy: float | None
    packed_bytes: int
    dense_bytes: int
    ideal_speedup: float
    seconds: float


def family_table(model: nn.Module, levels: Iterable[Level], *, value_bits: int = 8) -> list[FamilyRow]:
    """Sum up the levels of `run_idp`; ``value_bits`` are those of a stored weight."""
    layers, found = dict(sparse_layers(model)), []
    for level in levels:
        packed = dense = work = 0.0
        for name, pattern in level.patterns.items():
            for weight in weight_names(layers[name]):
                shape = getattr(layers[name], weight).shape
                width, count = shape[1], math.prod(shape)
                size = row_bits(pattern, width, choose_format(pattern, value_bits, width=width), value_bits=value_bits)
                packed += count // width * -(-size // 8)
                dense, work = dense + count * value_bits / 8, work + count * pattern.density
        seconds = level.training.seconds if level.training else 0.0
        found.append(FamilyRow(level.name, level.accuracy, round(packed), round(dense), dense * 8 / value_bits / work, seconds))
    return found


def family_plot(rows: Iterable[FamilyRow], path: str | Path, *, dense_accuracy: float | None = None) -> None:
    """Draw accuracy, storage and the bound of the speed-up of a family against its patterns, as a PNG."""
    from algo.plots import save_panels

    rows = list(rows)
    names = [row.name for row in rows]
    panels: dict[str, list[float | None]] = {
        "accuracy": [row.accuracy for row in rows],
        "weights stored, of dense": [row.packed_bytes / row.dense_bytes for row in rows],
        "speed-up, bound": [row.ideal_speedup for row in rows],
    }
    save_panels(path, names, panels, lines={} if dense_accuracy is None else {"accuracy": ("dense", dense_accuracy)})


def _later(batches: Batches, epochs: int) -> Batches:
    return lambda epoch: batches(epoch + epochs)


def _run_level(
    model: nn.Module,
    patterns: Mapping[str, NM],
    batches: Batches,
    loss_fn: LossFn,
    config: IDPConfig,
    folder: Path | None,
    facts: Mapping[str, Any],
    progress: Progress | None,
    run: RunOptions | None,
    samples: list[Any] | None,
    first: bool,
) -> Level:
    identity = {
        "patterns": {name: str(nm) for name, nm in patterns.items()},
        "freeze": config.freeze,
        "decay": config.decay,
        "train": asdict(config.train),
        "facts": facts,
    }
    if samples is not None:
        identity["inherit"] = config.inherit
    if folder is not None and _reuse(model, folder, identity):
        return Level(patterns, folder, None)
    if samples is not None:
        _compensate(model, patterns, samples, first=first)

    result = train(
        model,
        batches,
        loss_fn,
        config.train,
        checkpoint=None if folder is None else folder / "epoch.safetensors",
        facts=identity,
        before_step=mask_schedule(config.freeze),
        run=run,
        progress=progress,
        label=f"prune to {_name(patterns)}",
    )
    if folder is not None:
        write_tensors(folder / "model.safetensors", model.state_dict(), {"identity": identity})
        # level.json last: it is the sign that the level is whole.
        write_json(
            folder / "level.json", {"identity": identity, "losses": result.losses, "seconds": result.seconds}
        )
        (folder / "epoch.safetensors").unlink(missing_ok=True)
    return Level(patterns, folder, result)


def _reuse(model: nn.Module, folder: Path, identity: Mapping[str, Any]) -> bool:
    """Load a finished level; False if there is none."""
    if not (folder / "level.json").exists():
        return False
    changed = difference(read_json(folder / "level.json").get("identity", {}), identity)
    if changed:
        raise ValueError(f"cannot reuse {folder}: {changed}. Set it back, or start over (fresh)")
    tensors, _ = read_tensors(folder / "model.safetensors")
    model.load_state_dict(tensors)
    return True


def _name(patterns: Mapping[str, NM]) -> str:
    return "+".join(sorted({str(nm) for nm in patterns.values()}))
