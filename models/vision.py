"""What the image networks share: building from a table of configurations, initial weights, loading."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.checks import check_options
from models.registry import register_model
from models.weights import load_weights, read_weights

__all__ = ["DropPath", "build_vision_model", "initialise_convolutions", "load_backbone", "register_vision_models"]

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


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
    kind: Callable[[Config], Model],
    config: Config,
    pretrained: bool | str | Path,
    overrides: dict[str, Any],
    *,
    rename: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]] = lambda state, own: dict(state),
    options: Collection[str] = (),
) -> Model:
    """Build ``kind(config)`` with some fields changed, and load weights from a path.

    Parameters
    ----------
    pretrained, overrides
        As `models.create_model`. A configuration with a ``backbone`` has the option ``backbone_weights``, too: a path to the
        weights of its classifier (see `load_backbone`).
    rename
        Gets the file's state dict and the model's own, and gives the file's under our names.
    options
        Overrides that are no fields of the configuration and that the caller sees to.

    Raises
    ------
    ValueError
        Unknown override, weights that do not fit, or ``pretrained=True``: no package carries weights.
    """
    known = [field.name for field in fields(config)]  # type: ignore[arg-type]
    extra = [*options, *(["backbone_weights"] if "backbone" in known else [])]
    check_options(name, overrides, [*extra, *known])
    if pretrained is True:
        raise ValueError(f"no installable package carries weights of {name}: give pretrained= a path")
    backbone_weights = overrides.get("backbone_weights")
    if pretrained is not False and backbone_weights is not None:
        raise ValueError("give pretrained or backbone_weights, not both: the first has those of the backbone, too")
    model = kind(replace(config, **{key: value for key, value in overrides.items() if key in known}))  # type: ignore[type-var]
    if pretrained is not False:
        load_weights(model, rename(read_weights(pretrained), model.state_dict()), name=name, where=pretrained)
    if backbone_weights is not None:
        load_backbone(model, backbone_weights, name=name)
    return model


def register_vision_models(
    kind: Callable[[Config], Model],
    configs: Mapping[str, Config],
    summaries: Mapping[str, str],
    *,
    build: Callable[..., nn.Module] = build_vision_model,
    **options: Any,
) -> None:
    """Register a builder for each name in ``summaries``, which are their docstrings: ``kind(configs[name])``, by ``build``, which
    takes what `build_vision_model` does, and gets the options."""

    def register(name: str, summary: str) -> None:
        def builder(*, pretrained: bool | str | Path = False, **overrides: Any) -> nn.Module:
            return build(name, kind, configs[name], pretrained, overrides, **options)

        builder.__name__, builder.__doc__, builder.__module__ = name, summary, kind.__module__
        register_model(builder)

    for name, summary in summaries.items():
        register(name, summary)


def load_backbone(model: nn.Module, path: str | Path, *, name: str) -> None:
    """Load the weights of a classifier, trained on ImageNet for example, into ``model.backbone``; the rest stays as it is.

    Raises
    ------
    FileNotFoundError, ValueError
        See `read_weights` and `check_fit`.
    """
    backbone = model.backbone
    state = backbone.of_classifier(read_weights(path))  # type: ignore[operator, union-attr]
    load_weights(backbone, state, name=f"the backbone of {name}", where=path)  # type: ignore[arg-type]
