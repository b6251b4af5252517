"""From a configuration to a trained, verified N:M model: dense first if wanted, then sparse, all of it resumable.

Under ``run.out``::

    config.yaml                         the whole configuration
    log.csv, tensorboard/               curves of all stages
    dense/                              the dense model, if there is a dense stage
    2of4-sr-ste/sparse/                 the finalised, verified model (of the method "dense": trained/sparse)
    result.json                         accuracies, seconds

Which method does what is `algo.sparsify`'s business: one that prunes at once is trained on with its masks fixed, one that trains
is trained, ``idp`` goes level by level.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from algo.checkpoint import difference, load_model, read_json, save_model, write_json
from algo.config import Config, RunConfig, dump, flat
from algo.distill import distillation
from algo.distributed import barrier, from_main, is_main, to_device, world
from algo.flips import FlipTracker, flips_plot
from algo.idp import IDPConfig, family_plot, family_table, run_idp
from algo.methods import METHODS
from algo.nm import NM
from algo.sparsify import finalize, mask_schedule, model_patterns, sparsify
from algo.tasks import Task
from algo.train import LossFn, RunOptions, StepFn, TrainConfig, TrainResult, train
from algo.verify import verify

__all__ = ["Outcome", "RunMismatchError", "run_recipe"]


class RunMismatchError(ValueError):
    """A folder holds a run of another configuration; the message names the key."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """The trained model in eval mode, its patterns by layer, and accuracies by stage. Seconds are of this call."""

    model: nn.Module
    folder: Path
    patterns: dict[str, NM]
    accuracy: dict[str, float]
    seconds: dict[str, float]
    resumed_step: int


def run_recipe(
    config: Config,
    task: Task,
    *,
    device: torch.device | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Train what a configuration says. The same call goes on where an earlier one was stopped.

    Parameters
    ----------
    task
        The configuration's task, loaded.
    device
        Where to train.
    fresh
        Forget what ``run.out`` holds of an earlier run.

    Raises
    ------
    RunMismatchError
        ``run.out`` holds a run of another configuration.
    ValueError
        Unknown method, no layer matches, weights that do not fit, or nothing to learn from.
    NonFiniteLossError
        See `algo.train.train`.
    """
    if config.distill is not None and config.dense is None and config.init is None:
        raise ValueError("distill needs a trained teacher: give a dense stage (dense.epochs=...) or init, or set distill to null")
    if config.method == "dense" and config.train is None:
        raise ValueError("method dense does nothing but train: give train.epochs")
    out = config.run.out
    _claim(out, config, fresh)
    model = task.model(config.seed, config.model).to(device or torch.device("cpu"))
    if config.init is not None:
        load_model(model, config.init)
    stages = _Stages(config, task, next(model.parameters()).device, progress)
    if config.dense is not None:
        stages.dense(model, config.dense, out / "dense")
    loss: LossFn = task.loss
    if config.distill is not None:
        loss = distillation(copy.deepcopy(model), task.logits, task.labels, config.distill)
    folder = out / _name(config)
    patterns = stages.sparse(model, loss, folder)
    stages.score("final", model)
    kept = read_json(out / "result.json") if (out / "result.json").is_file() else {"accuracy": {}, "seconds": {}}
    barrier()  # everyone has read it
    accuracy, seconds = kept["accuracy"] | stages.accuracy, kept["seconds"] | stages.seconds
    write_json(out / "result.json", {"accuracy": accuracy, "seconds": seconds, "folder": str(folder / "sparse")})
    barrier()
    return Outcome(model, folder / "sparse", patterns, accuracy, stages.seconds, stages.resumed_step)


class _Stages:
    """The stages of one run and what came of them."""

    def __init__(self, config: Config, task: Task, device: torch.device, progress: Progress | None) -> None:
        self.config, self.task, self.device, self.progress = config, task, device, progress
        own = {item.name: getattr(config.run, item.name) for item in fields(RunOptions)}
        self.run = RunOptions(**own | {"log": config.run.log or config.run.out})
        self.facts = {"task": task.name, "seed": config.seed, **task.facts}
        self.accuracy: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.resumed_step = 0

    def score(self, name: str, model: nn.Module) -> float:
        """Evaluate, once for all processes."""
        self.accuracy[name] = self._evaluate(model)
        return self.accuracy[name]

    def _evaluate(self, model: nn.Module) -> float:
        accuracy = float(from_main(self.task.evaluate(model) if is_main() else 0.0))
        model.eval()
        return accuracy

    def dense(self, model: nn.Module, config: TrainConfig, folder: Path) -> None:
        """Train dense, or take the finished model."""
        if from_main((folder / "model.json").is_file()):
            self.accuracy["dense"] = float(load_model(model, folder)["accuracy"])
            model.eval()
            return
        self._train("dense", model, self.task.loss, config, folder / "step.safetensors", None)
        accuracy = self.score("dense", model)
        save_model(model, folder, {"accuracy": accuracy, "facts": self.facts})
        _forget(folder / "step.safetensors")

    def sparse(self, model: nn.Module, loss: LossFn, folder: Path) -> dict[str, NM]:
        """Make the model sparse, finalise, verify and keep it; gives the patterns."""
        config = self.config
        if from_main((folder / "sparse" / "model.json").is_file()):
            load_model(model, folder / "sparse")
            model.eval()
            return model_patterns(model)
        if config.method == "idp":
            self._idp(model, loss, folder)
        elif config.method == "dense":
            self._train("trained", model, loss, config.train, folder / "step.safetensors", None)
        else:
            self._one_method(model, loss, folder / "step.safetensors")
        patterns = finalize(model)
        model.eval()
        verify(model, patterns)
        save_model(model, folder / "sparse", self.facts | {"method": config.method})
        _forget(folder / "step.safetensors")
        return patterns

    def _one_method(self, model: nn.Module, loss: LossFn, checkpoint: Path) -> None:
        config = self.config
        known = METHODS.get(config.method)
        if config.train is None and known is not None and known.kind == "training":
            raise ValueError(f"method {config.method} works while the model trains: give train.epochs")
        if config.method == "s-ste" and config.options.freeze and config.run.parallel == "fsdp" and world() > 1:
            raise ValueError(
                "method s-ste changes weights when its masks are fixed, which sharded weights do not keep: "
                "set options.freeze to 0, or run.parallel to ddp"
            )
        # What prunes at once is held while training goes on.
        hold = config.train is not None
        sparsify(model, self._pattern(), method=config.method, hold=hold, **self._options())  # type: ignore[arg-type]
        if config.train is not None:
            tracker = self._tracker(model)
            self._train(_name(config), model, loss, config.train, checkpoint, _hook(config.options.freeze, tracker, config.run))
            if tracker is not None:
                flips_plot(tracker.rows, config.run.out / "flips.png")

    def _tracker(self, model: nn.Module) -> FlipTracker | None:
        run = self.config.run
        if not run.flips_every or not is_main() or (run.parallel == "fsdp" and world() > 1):
            return None
        return FlipTracker(model, run.out / "flips.csv")

    def _idp(self, model: nn.Module, loss: LossFn, folder: Path) -> None:
        config = self.config
        if config.train is None:
            raise ValueError("method idp works while the model trains: give train.epochs")
        given: dict[str, Any] = {} if config.options.decay is None else {"decay": config.options.decay}
        levels = IDPConfig(
            train=self._seeded(config.train, 1), freeze=config.options.freeze, schedule=config.options.levels,
            levels="all" if config.options.family else "halving", budget=config.options.budget, floor=config.options.floor,
            inherit=config.options.inherit, **given,
        )  # fmt: skip

        def on_level(level: Any) -> None:
            self.accuracy[level.name] = level.accuracy
            self.seconds[level.name] = round(level.training.seconds, 2) if level.training else 0.0

        done = run_idp(
            model, self._pattern(), self.task.batches, loss, levels, exclude=config.exclude or None, out_dir=folder,
            facts=self.facts, evaluate=self._evaluate, on_level=on_level,
            calibration=self._samples() if levels.inherit == "second-order" else None, progress=self.progress, run=self.run,
        )  # fmt: skip
        if is_main() and done:
            rows = family_table(model, done, value_bits=32)
            write_json(folder / "family.json", {"levels": [asdict(row) for row in rows]})
            family_plot(rows, folder / "family.png", dense_accuracy=self.accuracy.get("dense"))

    def _train(
        self, name: str, model: nn.Module, loss: LossFn, config: TrainConfig | None, checkpoint: Path, hook: StepFn | None
    ) -> TrainResult:
        if config is None:
            raise ValueError("there is nothing to train: give train.epochs")
        own = self._seeded(config, 0 if name == "dense" else 1)  # the sparse stage draws other numbers than the dense one
        result = train(
            model, self.task.batches, loss, own, checkpoint=checkpoint, facts=self.facts, before_step=hook,
            evaluate=self.task.evaluate, run=self.run, progress=self.progress, label=name,
        )  # fmt: skip
        self.seconds[name] = round(result.seconds, 2)
        self.resumed_step = result.resumed_step
        return result

    def _pattern(self) -> str | dict[str, str]:
        """One pattern is for the task's layers; of another model than the task's, for all but its head."""
        pattern = self.config.pattern
        return {self.task.layers: pattern} if isinstance(pattern, str) and self.config.model is None else pattern

    def _seeded(self, config: TrainConfig, stage: int) -> TrainConfig:
        own = replace(config, seed=config.seed + self.config.seed + stage)
        step = stage and self.config.method == "step" and config.optimizer == "adamw"
        return replace(own, optimizer="step-adamw") if step else own

    def _options(self) -> dict[str, Any]:
        """What `sparsify` takes besides the pattern."""
        config = self.config
        given = {name: getattr(config.options, name) for name in ("decay", "end", "precondition")}
        options = {name: value for name, value in given.items() if value is not None} | {"exclude": config.exclude or None}
        if config.method in METHODS and METHODS[config.method].kind == "calibrated":
            options["calibration"] = self._samples()
        return options

    def _samples(self) -> list[tuple[Tensor, ...]]:
        """Calibration data: the first training batches."""
        batches = self.task.batches(0)
        count = min(self.config.options.calibration, len(batches))
        return [self.task.inputs(to_device(batches[number], self.device)) for number in range(count)]


def _hook(freeze: float, tracker: FlipTracker | None, run: RunConfig) -> StepFn:
    """Tell methods with a schedule how far training is, count flips, and fix masks for the last part."""

    masks = mask_schedule(freeze)

    def before_step(model: nn.Module, step: int, steps: int) -> None:
        masks(model, step, steps)
        if tracker is not None and step % run.flips_every == 0:
            tracker.update(step)

    return before_step


def _name(config: Config) -> str:
    """A stage's and folder's name, such as ``2of4-sr-ste``."""
    if config.method == "dense":
        return "trained"
    patterns = {config.pattern} if isinstance(config.pattern, str) else set(config.pattern.values())
    return "+".join(sorted(patterns)).replace(":", "of") + f"-{config.method}"


def _claim(out: Path, config: Config, fresh: bool) -> None:
    """Make the folder this configuration's; refuse one of another."""
    wanted = flat(config) | {"processes": world(), "parallel": config.run.parallel if world() > 1 else "none"}
    file = out / "run.json"
    changed: str | None = None
    if is_main():
        if fresh:
            shutil.rmtree(out, ignore_errors=True)
        changed = difference(read_json(file), wanted) if file.is_file() else None
        if changed is None:
            write_json(file, wanted)
            (out / "config.yaml").write_text(dump(config), encoding="utf-8")
    changed = from_main(changed)
    if changed:
        raise RunMismatchError(f"{out} holds another run: {changed}. Set it back, take another run.out, or start over (--fresh)")


def _forget(file: Path) -> None:
    barrier()
    if is_main():
        file.unlink(missing_ok=True)
