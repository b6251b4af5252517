"""The optimisers and learning-rate schedules that a configuration can name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from algo.step_adam import StepAdamW, masks_begun

if TYPE_CHECKING:
    from algo.train import TrainConfig

__all__ = ["OPTIMIZERS", "SCHEDULES", "make_optimizer", "schedule"]

Parameters: TypeAlias = list[nn.Parameter]


def _adamw(model: nn.Module, parameters: Parameters, config: TrainConfig) -> torch.optim.Optimizer:
    # fused: one pass over the weights, a sixth of the processor time of the default (measured on one core)
    fused = not any(isinstance(parameter, DTensor) for parameter in parameters)
    betas = (0.9, config.beta2)
    return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=fused)


def _sgd(model: nn.Module, parameters: Parameters, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, nesterov=config.momentum > 0
    )


def _step_adamw(model: nn.Module, parameters: Parameters, config: TrainConfig) -> torch.optim.Optimizer:
    betas = (0.9, config.beta2)
    return StepAdamW(parameters, lambda: masks_begun(model), lr=config.lr, betas=betas, weight_decay=config.weight_decay)


OPTIMIZERS: dict[str, Callable[[nn.Module, Parameters, TrainConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "step-adamw": _step_adamw,
}
"""How each optimiser is made; SGD is Nesterov's if it has momentum, step-adamw is the half of the method ``step``."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: max(0.0, 1 - share),
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * min(1.0, share))),
    "constant": lambda share: 1.0,
}
"""Factor of the learning rate after warm-up, by the share of the remaining steps that are done."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a configuration for the parameters of a model that are trained."""
    return OPTIMIZERS[config.optimizer](model, [p for p in model.parameters() if p.requires_grad], config)


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
