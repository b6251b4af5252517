"""STEP's optimiser: AdamW that stops updating its second moment once masks begin.

The second moment of masked, straight-through gradients is noisy and makes Adam fail where SGD would not; so it is estimated
while the network is still dense (the precondition phase), and kept from then on.

Ref: STEP, Y. Lu et al., arXiv 2302.01172, algorithm 1 and (AutoSwitch) algorithm 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from algo.methods import StepMask

__all__ = ["AutoSwitch", "StepAdamW", "masks_begun"]


def masks_begun(model: nn.Module) -> bool:
    """Whether the precondition phase of a model made sparse by ``method="step"`` is over."""
    return any(isinstance(module, StepMask) and not module.is_dense for module in model.modules())


class StepAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, whose second moment stays as it is from the first step at which ``begun()`` is true.

    Parameters
    ----------
    params
        As of any torch optimiser.
    begun
        Says whether masks have begun, for instance ``lambda: masks_begun(model)``.
    lr, betas, eps, weight_decay
        As of `torch.optim.AdamW`.

    Raises
    ------
    ValueError
        A value out of range.
    """

    def __init__(
        self, params: Iterable[Any], begun: Callable[[], bool], *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.01,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr, eps, weight_decay must be >= 0 and betas in [0, 1), not {lr}, {eps}, {weight_decay}, {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._begun = begun
        self.change = 0.0  #: mean absolute change of the second moment in the latest step, 0 once it is kept

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what ``closure`` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        keep, moved, count = self._begun(), 0.0, 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    moved += self._update(parameter, group, keep)
                    count += parameter.numel()
        self.change = moved / count if count and not keep else 0.0
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], keep: bool) -> float:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"], state["second_steps"] = 0, 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        gradient, moved = cast(Tensor, parameter.grad), 0.0
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        if not keep or not state["second_steps"]:  # masks from the first step on: there is no second moment yet
            change = (gradient.square() - state["exp_avg_sq"]) * (1 - beta2)
            state["exp_avg_sq"].add_(change)
            state["second_steps"] += 1
            moved = change.abs().sum().item()
        second = (state["exp_avg_sq"] / (1 - beta2 ** state["second_steps"])).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], second, value=-group["lr"] / (1 - beta1 ** state["step"]))
        return moved


class AutoSwitch:
    """Decides when the second moment is known: its mean change over the last 1 / (1 - beta2) steps is below ``eps``.

    Parameters
    ----------
    eps
        Threshold, by default Adam's ``eps``.
    beta2
        Of the optimiser; sets the window.
    earliest, latest
        Bounds of the switch in steps.
    """

    def __init__(self, *, eps: float = 1e-8, beta2: float = 0.999, earliest: int = 1, latest: int | None = None) -> None:
        if latest is not None and latest < earliest:
            raise ValueError(f"latest must be >= earliest ({earliest}), not {latest}")
        self.eps, self.earliest, self.latest = eps, earliest, latest
        self._changes: deque[float] = deque(maxlen=max(1, round(1 / (1 - beta2))))
        self._step = 0

    def __call__(self, change: float) -> bool:
        """Take `StepAdamW.change` of a step; True once masks should begin."""
        self._step += 1
        self._changes.append(change)
        full = len(self._changes) == self._changes.maxlen
        settled = full and sum(self._changes) / len(self._changes) < self.eps
        return self._step >= self.earliest and (settled or (self.latest is not None and self._step >= self.latest))
