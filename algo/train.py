"""A seeded training loop that can be stopped at any time and resumed to the same result, bit for bit.

Model, optimiser, average and random state go to one file after each epoch, and every `RunOptions.save_every` steps. A run that
is killed goes on from there; weights and curve are those of a run that was never stopped, on the same machine with the same
number of threads. One process or several (`algo.distributed`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from algo.checkpoint import difference, load_state, read_tensors, write_tensors
from algo.distributed import (
    Ahead,
    Parallel,
    Spread,
    all_ranks,
    barrier,
    from_main,
    is_main,
    mean_of_ranks,
    placed_like,
    rank,
    to_device,
    whole,
    world,
)
from algo.ema import EMA
from algo.logs import RunLog
from algo.optim import OPTIMIZERS, SCHEDULES, make_optimizer, schedule
from algo.settings import setting

__all__ = [
    "Batches",
    "LossFn",
    "NonFiniteLossError",
    "RunOptions",
    "StepFn",
    "TrainConfig",
    "TrainResult",
    "progress_bars",
    "train",
]

Batches: TypeAlias = Callable[[int], Sequence[Any]]
"""Gives the batches of an epoch (0, 1, ...): the same for the same number, as many in every epoch."""
LossFn: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar loss, a mean over the batch."""
StepFn: TypeAlias = Callable[[nn.Module, int, int], None]
"""Called before each step with (model, step, all steps)."""


class NonFiniteLossError(ValueError):
    """The loss or its gradient is not a number; the message has the step and the last good checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What decides the result of a training. ``seed`` starts torch's generator (dropout)."""

    epochs: int = setting(1, "passes over the data")
    lr: float = setting(5e-5, "highest learning rate")
    weight_decay: float = setting(0.01, "decoupled with adamw, added to the gradient with sgd")
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises, in [0, 1]")
    clip: float = setting(1.0, "bound of the gradient's norm; 0 does not bound it")
    seed: int = setting(0, "of everything that is random in training")
    optimizer: str = setting("adamw", "adamw, sgd (Nesterov), or step-adamw, which the method step takes instead of adamw")
    momentum: float = setting(0.9, "of sgd, in [0, 1)")
    beta2: float = setting(0.999, "of adamw and step-adamw: decay of the mean square of gradients, in [0, 1)")
    schedule: str = setting("linear", "after warm-up: linear or cosine to zero, or constant")
    amp: Literal["bf16", "fp16"] | None = setting(None, "mixed precision: bf16 or fp16 (loss scaled)")
    accumulate: int = setting(1, "batches whose gradients are averaged to one step")
    ema: float = setting(0.0, "decay of averaged weights, which then are the result; 0 does not average")

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"epochs must be an integer >= 1, not {self.epochs!r}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, not {self.lr!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], not {self.warmup!r}")
        if self.weight_decay < 0 or self.clip < 0:
            raise ValueError(f"weight_decay and clip must be >= 0, not {self.weight_decay!r} and {self.clip!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.amp not in (None, "bf16", "fp16"):
            raise ValueError(f"amp must be bf16, fp16 or nothing, not {self.amp!r}")
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(f"accumulate must be an integer >= 1, not {self.accumulate!r}")
        for name in ("momentum", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is kept, watched and spread. None of it changes the result (but for rounding with several processes)."""

    save_every: int = setting(0, "steps between checkpoints; 0: only at the end of an epoch")
    log: Path | None = setting(None, "folder of log.csv and TensorBoard events")
    log_every: int = setting(1, "steps between rows of the log")
    tensorboard: bool = setting(False, "TensorBoard events too; needs nmforge[logs]")
    parallel: Parallel = setting("ddp", "of several processes: ddp, or fsdp for a model too large for one")
    check_every: int = setting(100, "steps between comparisons of weights and masks of all processes")

    def __post_init__(self) -> None:
        if self.save_every < 0:
            raise ValueError(f"save_every must be >= 0, not {self.save_every!r}")
        if self.log_every < 1 or self.check_every < 1:
            raise ValueError(f"log_every and check_every must be >= 1, not {self.log_every!r} and {self.check_every!r}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be ddp or fsdp, not {self.parallel!r}")


@dataclass(frozen=True)
class TrainResult:
    """Mean loss of each epoch, and the wall and processor seconds that this call took (not those before a
    resume). ``resumed_at`` is the epoch, ``resumed_step`` the step it went on from; ``scores`` has what ``evaluate`` gave
    after each epoch."""

    losses: tuple[float, ...]
    seconds: float
    cpu_seconds: float
    resumed_at: int
    resumed_step: int = 0
    scores: tuple[float, ...] = ()


def train(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    config: TrainConfig,
    *,
    checkpoint: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    before_step: StepFn | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    run: RunOptions | None = None,
    progress: Progress | None = None,
    label: str = "training",
) -> TrainResult:
    """Train a model in place; it is in eval mode afterwards.

    Parameters
    ----------
    model
        Parameters with ``requires_grad`` are trained, on the device where they are.
    batches, loss_fn
        See `Batches` and `LossFn`. With several processes each takes its rows of a batch.
    checkpoint
        File written after each epoch and every ``run.save_every`` steps; if it is there already, training goes on from it.
    facts
        Anything else that decides the result (JSON values), compared on resume like the configuration.
    before_step
        A hook, for instance to freeze masks. With sharded weights it may look at weights but not change them.
    evaluate
        Gives a score of the model (averaged weights if ``config.ema``) after each epoch.
    run
        See `RunOptions`.
    progress
        Rich progress to show a bar in, see `progress_bars`.
    label
        The bar's name, and that of this stage in the log.

    Raises
    ------
    ValueError
        The checkpoint was made with another configuration (names the key), or epochs differ in length or are empty.
    NonFiniteLossError
        The loss or the gradient is not finite.
    RankMismatchError
        Processes hold different weights or masks.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    loop = _Loop(model, batches, loss_fn, config, run or RunOptions(), checkpoint, before_step, evaluate)
    loop.identity |= {"facts": dict(facts or {})}
    shown = progress if is_main() else None
    with torch.random.fork_rng(devices=_gpus(loop.device)), _bar(shown, label, config.epochs * loop.steps) as advance:
        torch.manual_seed(config.seed + 7919 * rank())
        first, first_step = loop.resume()
        if first_step:
            advance(first_step, loop.last_loss)
        loop.run(label, advance)
        loop.finish()
    seconds = (time.perf_counter() - started, time.process_time() - cpu_started)
    return TrainResult(tuple(loop.losses), *seconds, first, first_step, tuple(loop.scores))


def progress_bars(*, quiet: bool = False) -> Progress:
    """Bars on standard error, with counts, times and the loss; nothing if ``quiet``. Use as a context
    manager."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=Console(stderr=True), disable=quiet)


class _Loop:
    """A training and where it is: ``epoch`` whole epochs and ``batch`` batches of the next are done."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss_fn: LossFn,
        config: TrainConfig,
        run: RunOptions,
        checkpoint: Path | None,
        before_step: StepFn | None,
        evaluate: Callable[[nn.Module], float] | None,
    ) -> None:
        self.batches, self.loss_fn, self.before_step, self.evaluate = batches, loss_fn, before_step, evaluate
        self.config, self.options, self.checkpoint = config, run, checkpoint
        self.count = len(batches(0))
        if self.count == 0:
            raise ValueError("there are no batches to train on")
        self.steps = math.ceil(self.count / config.accumulate)
        self.identity: dict[str, Any] = asdict(config) | {"processes": world()}
        self.spread = Spread(model, run.parallel)
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(self.spread.work, config)
        self.factor = schedule(config, config.epochs * self.steps)
        self.scaler = torch.amp.GradScaler(self.device.type) if config.amp == "fp16" else None
        self.ema = EMA(self.spread.work, config.ema) if config.ema else None
        self.epoch, self.batch, self.total, self.last_loss = 0, 0, 0.0, 0.0
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.saved: tuple[int, int] | None = None
        self.log: RunLog | None = None
        self._rng: Tensor | None = None

    @property
    def step(self) -> int:
        """Optimiser steps that are done."""
        return self.epoch * self.steps + math.ceil(self.batch / self.config.accumulate)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, label: str, advance: Callable[[int, float], None]) -> None:
        """Train what is left."""
        options = self.options
        if options.log is not None and is_main():
            self.log = RunLog(options.log, label, step=self.step, tensorboard=options.tensorboard)
        try:
            for _ in range(self.epoch, self.config.epochs):
                self._run_epoch(advance)
        finally:
            if self.log is not None:
                self.log.close()

    def _run_epoch(self, advance: Callable[[int, float], None]) -> None:
        todo = self.batches(self.epoch)
        if len(todo) != self.count:
            raise ValueError(
                f"epoch {self.epoch} has {len(todo)} batches, epoch 0 has {self.count}: they must be as many"
            )
        if self._rng is not None:  # restored as late as this, in case batches() drew numbers
            torch.set_rng_state(self._rng)
            self._rng = None
        self.spread.called.train()
        rows = Ahead(todo, self.batch)
        for first in range(self.batch, self.count, self.config.accumulate):
            group = range(first, min(first + self.config.accumulate, self.count))
            advance(1, self._step(rows, group))
            if self.options.save_every and self.step % self.options.save_every == 0 and self.batch < self.count:
                self._save()
            if self.step % self.options.check_every == 0:
                self.spread.check()
        self._end_epoch()

    def _step(self, rows: Ahead, group: range) -> float:
        """One optimiser step on a group of batches; gives its mean loss."""
        if self.before_step is not None:
            with self.spread.gathered():
                self.before_step(self.spread.work, self.step, self.config.epochs * self.steps)
        value = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for number in group:
            batch, weight = rows.next()
            with self.spread.last_of_group(number == group[-1]):
                with self._precision():
                    loss = self.loss_fn(self.spread.called, to_device(batch, self.device))
                part = mean_of_ranks(loss.detach() * weight if weight != 1 else loss)
                if not math.isfinite(part):
                    self._refuse("loss", part, number)
                value += part
                self.total += part
                factor = weight / len(group)
                scaled = loss * factor if factor != 1 else loss
                (self.scaler.scale(scaled) if self.scaler is not None else scaled).backward()
        lr = self.config.lr * self.factor(self.step)
        norm = self._update(lr, group[-1])
        self.batch = group[-1] + 1
        self.last_loss = value / len(group)
        if self.log is not None and self.step % self.options.log_every == 0:
            self.log.row(epoch=self.epoch, step=self.step, loss=self.last_loss, lr=lr, grad_norm=norm)
        return self.last_loss

    def _update(self, lr: float, number: int) -> float:
        """Clip, step, average; gives the gradient's norm before clipping."""
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr
        parameters = [p for p in self.spread.work.parameters() if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.config.clip:
            norm = float(whole(nn.utils.clip_grad_norm_(parameters, self.config.clip)))
        else:
            norm = float(whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))
        if self.scaler is not None:  # it leaves out steps whose gradient overflowed, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            if not math.isfinite(norm):
                self._refuse("norm of the gradient", norm, number)
            self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.spread.work, self.step)
        return norm

    def _precision(self) -> AbstractContextManager[object]:
        if self.config.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16 if self.config.amp == "bf16" else torch.float16)

    def _refuse(self, what: str, value: float, number: int) -> None:
        kept = "no checkpoint was written yet"
        if self.saved is not None:
            kept = f"the last good checkpoint is {self.checkpoint}, after epoch {self.saved[0]}, step {self.saved[1]}"
        raise NonFiniteLossError(
            f"the {what} is {value} in epoch {self.epoch}, step {number // self.config.accumulate}: "
            f"lower lr (now {self.config.lr}); {kept}"
        )

    def _end_epoch(self) -> None:
        self.losses.append(self.total / self.count)
        if self.evaluate is not None:
            self.scores.append(self._score(self.evaluate))
        if self.log is not None:
            score = {"score": self.scores[-1]} if self.evaluate is not None else {}
            lr = self.optimizer.param_groups[0]["lr"]
            self.log.row(epoch=self.epoch, step=self.step, loss=self.losses[-1], lr=lr, **score)
        self.epoch, self.batch, self.total = self.epoch + 1, 0, 0.0
        self._save()

    def _score(self, evaluate: Callable[[nn.Module], float]) -> float:
        with self.ema.applied(self.spread.work) if self.ema is not None else nullcontext():
            model = self.spread.settle()
            was = torch.get_rng_state()
            score = float(evaluate(model.eval())) if is_main() else 0.0
            torch.set_rng_state(was)
        return float(from_main(score))

    def finish(self) -> None:
        """Leave the result in the caller's model."""
        self.spread.check()
        if self.ema is not None:
            self.ema.apply(self.spread.work)
        self.spread.settle().eval()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"model.{name}": value for name, value in self.spread.state().items()}
        counts: dict[str, dict[str, Any]] = {}  # what an optimiser keeps besides tensors
        for index, state in self.optimizer.state_dict()["state"].items():
            counts[str(index)] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
            tensors |= {f"optimizer.{index}.{name}": whole(value) for name, value in state.items() if isinstance(value, Tensor)}
        if self.ema is not None:
            tensors |= {f"ema.{name}": whole(value) for name, value in self.ema.mean.items()}
        for number, state in enumerate(all_ranks(torch.get_rng_state())):
            tensors[f"rng.{number}"] = state
        if self.device.type == "cuda":
            for number, state in enumerate(all_ranks(torch.cuda.get_rng_state(self.device))):
                tensors[f"gpu_rng.{number}"] = state
        place = {"epoch": self.epoch, "batch": self.batch, "total": self.total, "last_loss": self.last_loss}
        scaler = self.scaler.state_dict() if self.scaler is not None else {}
        rest = {"losses": self.losses, "scores": self.scores, "scaler": scaler, "counts": counts}
        write_tensors(self.checkpoint, tensors, {"identity": self.identity, **place, **rest})
        self.saved = (self.epoch, self.step - self.epoch * self.steps)

    def resume(self) -> tuple[int, int]:
        """Go on from the checkpoint if there is one; gives the epoch and the step."""
        if self.checkpoint is None or not from_main(self.checkpoint.exists()):
            return 0, 0
        tensors, facts = read_tensors(self.checkpoint)
        changed = difference(facts["identity"], self.identity)
        if changed:
            raise ValueError(f"cannot resume from {self.checkpoint}: {changed}. Set it back, or start over (fresh)")
        load_state(self.spread, _part(tensors, "model."), str(self.checkpoint))
        self._load_optimizer(_part(tensors, "optimizer."), facts.get("counts", {}))
        if self.ema is not None:
            for name, value in _part(tensors, "ema.").items():
                self.ema.mean[name].copy_(placed_like(value, self.ema.mean[name]))
        if self.scaler is not None:
            self.scaler.load_state_dict(facts["scaler"])
        self.losses, self.scores = list(facts["losses"]), list(facts.get("scores", []))
        if "epoch" in facts:
            self.epoch, self.batch = int(facts["epoch"]), int(facts["batch"])
            self.total, self.last_loss = float(facts["total"]), float(facts["last_loss"])
        else:  # of 0.1.0, which saved whole epochs
            self.epoch, self.last_loss, tensors["rng.0"] = len(self.losses), self.losses[-1], tensors["rng"]
        self.saved = (self.epoch, self.step - self.epoch * self.steps)
        torch.set_rng_state(tensors[f"rng.{rank()}"])
        self._rng = tensors[f"rng.{rank()}"]
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[f"gpu_rng.{rank()}"], self.device)
        barrier()
        return self.epoch, self.step

    def _load_optimizer(self, tensors: Mapping[str, Tensor], counts: Mapping[str, Mapping[str, Any]]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in counts.items()}
        for key, value in tensors.items():
            index, name = key.split(".")
            like = value.dim() and value.shape == parameters[int(index)].shape
            state.setdefault(int(index), {})[name] = placed_like(value, parameters[int(index)]) if like else value
        # The state dict carries the present param groups: only the moments are taken from the file.
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _gpus(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


class _bar:
    """A progress bar as a context manager; gives ``advance(steps, loss)``, which does nothing without a
    progress."""

    def __init__(self, progress: Progress | None, label: str, total: int) -> None:
        self.progress = progress
        self.task = progress.add_task(label, total=total, note="") if progress is not None else None

    def __enter__(self) -> Callable[[int, float], None]:
        return self._advance

    def __exit__(self, *error: object) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.stop_task(self.task)

    def _advance(self, steps: int, loss: float) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, advance=steps, note=f"loss {loss:.3f}")
