"""What the image networks share: building from a table of configurations, initial weights, loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.checks import check_options
from models.weights import load_weights, read_weights

__all__ = ["DropPath", "build_vision_model", "initialise_convolutions"]

Config = TypeVar("Config")


class DropPath(nn.Module):
    """In training, a residual branch is left out for a random share ``rate`` of the samples; the others are scaled up.

    Ref: G. Huang et al., Deep Networks with Stochastic Depth, arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        keep = torch.rand(len(x), *(1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


def initialise_convolutions(model: nn.Module) -> None:
    """Normal weights that keep the variance of gradients (fan out) in convolutions; ones and zeros in norms.

    Ref: K. He et al., arXiv 1502.01852, eq. 14.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def build_vision_model(
    name: str,
    kind: Callable[[Config], nn.Module],
    config: Config,
    pretrained: bool | str | Path,
    overrides: dict[str, Any],
    *,
    rename: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]] = lambda state, own: dict(state),
) -> nn.Module:
    """Build ``kind(config)`` with some fields changed, and load weights from a path.

    ``rename`` gets the file's state dict and the model's own, and gives the file's under our names.

    Raises
    ------
    ValueError
        Unknown override, weights that do not fit, or ``pretrained=True``: no package carries weights.
    """
    check_options(name, overrides, (field.name for field in fields(config)))  # type: ignore[arg-type]
    if pretrained is True:
        raise ValueError(f"no installable package carries weights of {name}: give pretrained= a path")
    model = kind(replace(config, **overrides))  # type: ignore[type-var]
    if pretrained is not False:
        load_weights(model, rename(read_weights(pretrained), model.state_dict()), name=name, where=pretrained)
    return model
