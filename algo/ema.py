"""A running mean of the weights, which is often a better model than the last weights.

The mean is of the dense weights; masks are computed from it as from any weights, so the averaged model obeys its pattern.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA:
    """Exponential moving average of the parameters that are trained.

    Parameters
    ----------
    model
        Whose parameters; the mean starts from their values.
    decay
        In (0, 1). Early on less is kept, ``(1 + t) / (10 + t)`` at step t, so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), not {decay!r}")
        self.decay = decay
        self.mean = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step number ``step`` (0, 1, ...)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            if name in self.mean:
                self.mean[name].lerp_(parameter.detach(), 1 - keep)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Give the model the mean as its weights."""
        for name, parameter in model.named_parameters():
            if name in self.mean:
                parameter.copy_(self.mean[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The mean as weights for a while."""
        kept = {name: p.detach().clone() for name, p in model.named_parameters() if name in self.mean}
        self.apply(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in kept:
                        parameter.copy_(kept[name])

    def load(self, mean: Mapping[str, Tensor]) -> None:
        """Take over a mean of the same parameters."""
        for name, value in self.mean.items():
            value.copy_(mean[name])
