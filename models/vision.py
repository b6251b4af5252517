"""What the image networks share: building from a table of configurations, initial weights, loading."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.weights import read_weights

__all__ = ["DropPath", "build_vision_model", "check_images", "check_positive", "initialise_convolutions"]

Config = TypeVar("Config")


def check_positive(config: Any, *, zero: Collection[str] = ()) -> None:
    """Refuse a whole number, or a tuple of them, below 1 in a configuration; None and other kinds pass.

    The fields named in ``zero`` may be 0.

    Raises
    ------
    ValueError
        Names the field.
    """
    for field in fields(config):
        value, least = getattr(config, field.name), 0 if field.name in zero else 1
        whole = "int" in str(field.type)
        for item in value if isinstance(value, tuple) else (value,):
            if whole and item is not None and (not isinstance(item, int) or item < least):
                raise ValueError(f"{field.name} must hold integers >= {least}, not {value!r}")
        if value == ():
            raise ValueError(f"{field.name} must not be empty")


def check_images(x: Tensor, channels: int) -> None:
    """Refuse what is not a batch of images with so many channels.

    Raises
    ------
    ValueError
        Shows both shapes.
    """
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"images must be (B, {channels}, H, W), not {tuple(x.shape)}")


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
    known = [field.name for field in fields(config)]  # type: ignore[arg-type]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}: it has {', '.join(known)}")
    if pretrained is True:
        raise ValueError(f"no installable package carries weights of {name}: give pretrained= a path")
    model = kind(replace(config, **overrides))  # type: ignore[type-var]
    if pretrained is not False:
        try:
            model.load_state_dict(rename(read_weights(pretrained), model.state_dict()))
        except RuntimeError as error:
            raise ValueError(f"the weights in {pretrained} do not fit {name}: {error}") from None
    return model
