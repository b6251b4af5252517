"""The training half of the main job: fine-tune dense, prune level by level, bake the masks in, verify.

Everything is kept under one folder and reused by the next run::

    out_dir/dense/                       the dense, fine-tuned model
    out_dir/2of4-1f0c9a/level-1-3of4/    each level of pruning to this set of patterns
    out_dir/2of4-1f0c9a/sparse/          the finalised, verified model

A folder is whole when its JSON file is there; an unfinished one goes on from its last epoch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rich.progress import Progress
from torch import nn

from algo.checkpoint import difference, load_model, save_model
from algo.idp import IDPConfig, Level, run_idp, stage_accuracy
from algo.nm import NM
from algo.sparsify import Pattern, finalize, match_patterns
from algo.train import Batches, LossFn, TrainConfig, train
from algo.verify import verify

__all__ = ["EvaluateFn", "PipelineConfig", "PipelineResult", "StageResult", "prune_pipeline"]

EvaluateFn: TypeAlias = Callable[[nn.Module], float]
"""Model in eval mode -> accuracy in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What to train: the dense stage, each level of pruning, and the target patterns (see
    `match_patterns`)."""

    pattern: Pattern = "2:4"
    exclude: tuple[str, ...] = ()
    dense: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=2))
    idp: IDPConfig = field(default_factory=IDPConfig)


@dataclass(frozen=True)
class StageResult:
    """One stage: its name ("dense", "3:4", ...), accuracy, folder, wall and processor seconds of its
    training."""

    name: str
    accuracy: float
    folder: Path
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, eq=False)
class PipelineResult:
    """Both models in eval mode, the patterns by layer, and each stage. Seconds are 0 for a reused stage."""

    dense: nn.Module
    sparse: nn.Module
    patterns: Mapping[str, NM]
    stages: tuple[StageResult, ...]
    dense_folder: Path
    sparse_folder: Path
    seconds: float

    @property
    def dense_accuracy(self) -> float:
        """Accuracy of the dense model."""
        return self.stages[0].accuracy

    @property
    def sparse_accuracy(self) -> float:
        """Accuracy of the finalised sparse model: finalising changes no output."""
        return self.stages[-1].accuracy


def prune_pipeline(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    evaluate: EvaluateFn,
    config: PipelineConfig,
    out_dir: Path,
    *,
    level_loss: Callable[[nn.Module], LossFn] | None = None,
    facts: Mapping[str, Any] | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> PipelineResult:
    """Fine-tune, prune, finalise and verify.

    Parameters
    ----------
    model
        Where to start; trained in place and returned as ``sparse``.
    batches, loss_fn
        See `algo.train`.
    evaluate
        See `EvaluateFn`.
    config
        What to train.
    out_dir
        See the module's description.
    level_loss
        Makes the loss of the pruning levels from the dense model, for instance with it as a teacher; else
        ``loss_fn``.
    facts
        Anything else that decides the result (JSON values), such as the data's seed; a reused folder must
        have the same.
    fresh
        Start over: what ``out_dir`` holds of the dense stage and of these patterns is deleted.
    progress
        Rich progress to show bars in.

    Raises
    ------
    ValueError
        No layer matches, or ``out_dir`` holds a run with other settings (names the key).
    """
    started = time.perf_counter()
    targets = match_patterns(model, config.pattern, exclude=config.exclude)
    pruned = out_dir / _folder_name(targets)
    if fresh:
        for folder in (out_dir / "dense", pruned):
            shutil.rmtree(folder, ignore_errors=True)
    known = dict(facts or {})
    stages = [
        _dense_stage(model, batches, loss_fn, evaluate, config.dense, out_dir / "dense", known, progress)
    ]
    dense = copy.deepcopy(model).eval()

    def on_level(level: Level) -> None:
        if level.folder is None:
            raise RuntimeError("run_idp was given a folder and reported a level without one")
        spent = level.training
        accuracy = stage_accuracy(model, evaluate, level.folder)
        seconds = (spent.seconds, spent.cpu_seconds) if spent else (0.0, 0.0)
        stages.append(StageResult(level.name, accuracy, level.folder, *seconds))

    run_idp(
        model,
        dict(targets) if targets else config.pattern,
        batches,
        level_loss(dense) if level_loss else loss_fn,
        config.idp,
        out_dir=pruned,
        # A level depends on the dense weights, so on how they were trained.
        facts=known | {"dense": asdict(config.dense)},
        on_level=on_level,
        progress=progress,
    )
    patterns = finalize(model)
    model.eval()
    verify(model, patterns)
    save_model(model, pruned / "sparse", known | {"accuracy": stages[-1].accuracy})
    return PipelineResult(
        dense=dense,
        sparse=model,
        patterns=patterns,
        stages=tuple(stages),
        dense_folder=out_dir / "dense",
        sparse_folder=pruned / "sparse",
        seconds=time.perf_counter() - started,
    )


def _dense_stage(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    evaluate: EvaluateFn,
    config: TrainConfig,
    folder: Path,
    facts: Mapping[str, Any],
    progress: Progress | None,
) -> StageResult:
    identity = json.loads(json.dumps(asdict(config) | {"facts": facts}))
    if (folder / "model.json").exists():
        changed = difference(load_model(model, folder)["identity"], identity)
        if changed:
            raise ValueError(f"cannot reuse {folder}: {changed}. Set it back, or start over (fresh)")
        model.eval()
        return StageResult("dense", stage_accuracy(model, evaluate, folder), folder, 0.0, 0.0)
    epoch = folder / "epoch.safetensors"
    result = train(
        model,
        batches,
        loss_fn,
        config,
        checkpoint=epoch,
        facts=facts,
        progress=progress,
        label="fine-tune dense",
    )
    (folder / "accuracy.json").unlink(missing_ok=True)
    save_model(model, folder, {"identity": identity, "losses": result.losses, "seconds": result.seconds})
    epoch.unlink(missing_ok=True)
    return StageResult(
        "dense", stage_accuracy(model, evaluate, folder), folder, result.seconds, result.cpu_seconds
    )


def _folder_name(targets: Mapping[str, NM]) -> str:
    """Folder of a set of patterns: readable, and different for different layers of the same patterns."""
    names = "+".join(sorted({str(nm) for nm in targets.values()})) or "dense"
    exact = json.dumps({name: str(nm) for name, nm in targets.items()}, sort_keys=True)
    return f"{names.replace(':', 'of')}-{hashlib.sha256(exact.encode()).hexdigest()[:6]}"
