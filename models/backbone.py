"""Backbones of detectors and segmenters: networks that give one feature map per stage, finest first.

A backbone is a module with ``channels`` and ``strides``, one number per map, and ``forward``: images (B, 3, H, W) -> that many
maps (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])). `register_backbone` adds another family under its name.

Shapes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import resnet
from models.huggingface import rename_backbone

__all__ = ["Backbone", "FrozenBatchNorm2d", "ResNetBackbone", "build_backbone", "freeze_batch_norm", "register_backbone"]


@runtime_checkable
class Backbone(Protocol):
    """What a detector needs of its backbone."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self, images: Tensor) -> list[Tensor]: ...

    def of_classifier(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the backbone out of that of the classifier of its family, for `models.vision.load_backbone`."""
        ...


class FrozenBatchNorm2d(nn.Module):
    """Batch norm that neither learns nor measures: all it has are buffers, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Buffer(torch.ones(channels))
        self.bias = nn.Buffer(torch.zeros(channels))
        self.running_mean = nn.Buffer(torch.zeros(channels))
        self.running_var = nn.Buffer(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every `nn.BatchNorm2d` below a module by a `FrozenBatchNorm2d` with its values, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps).to(child.weight.device)
            frozen.load_state_dict({key: value for key, value in child.state_dict().items() if key != "num_batches_tracked"})
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)
    return module


class ResNetBackbone(nn.Module):
    """Stages of a ResNet or ResNeXt; key names are torchvision's, without ``fc``.

    Parameters
    ----------
    stages
        Which stages give a map, ascending, of 1 (stride 4) to 4 (stride 32).
    frozen_norm
        `FrozenBatchNorm2d` in place of batch norm: for weights that were trained before. From random weights it must be False.
    frozen_stages
        How many stages do not learn, the stem counted as the first; DETR trains pretrained backbones with 2.
    """

    def __init__(
        self, config: resnet.ResNetConfig, *, stages: Sequence[int] = (2, 3, 4), frozen_norm: bool = True, frozen_stages: int = 0
    ) -> None:
        super().__init__()
        last = len(config.blocks)
        if not stages or list(stages) != sorted(set(stages)) or not all(1 <= stage <= last for stage in stages):
            raise ValueError(f"stages must ascend within 1 to {last}, not {tuple(stages)}")
        if not 0 <= frozen_stages <= last + 1:
            raise ValueError(f"frozen_stages must be in 0 to {last + 1}, not {frozen_stages!r}")
        self.stages = tuple(stages)
        self.channels = tuple(config.width * (4 if config.bottleneck else 1) << stage - 1 for stage in self.stages)
        self.strides = tuple(4 << stage - 1 for stage in self.stages)
        for name, child in resnet.ResNet(config).named_children():
            if name not in ("avgpool", "fc") and name not in {f"layer{stage + 1}" for stage in range(stages[-1], last)}:
                self.add_module(name, child)
        if frozen_norm:
            freeze_batch_norm(self)
        for number in range(frozen_stages):
            for part in (f"layer{number}",) if number else ("conv1", "bn1"):
                self.get_submodule(part).requires_grad_(False)

    def stage(self, number: int) -> nn.Module:
        """The blocks of a stage, counted from 1."""
        return self.get_submodule(f"layer{number}")

    def of_classifier(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Names of torchvision, timm and Hugging Face; without classes, later stages and what frozen norms do not have."""
        own, last = self.state_dict(), self.stages[-1]
        left = ("fc.", "classifier.", *(f"layer{stage}." for stage in range(last + 1, 5)))
        renamed = {rename_backbone(name.removeprefix("resnet.")): value for name, value in state.items()}
        counters = {name for name in renamed if name.endswith(".num_batches_tracked")} - own.keys()
        return {name: value for name, value in renamed.items() if not name.startswith(left) and name not in counters}

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = images, []
        for part in ("conv1", "bn1", "relu", "maxpool"):
            x = self.get_submodule(part)(x)
        for number in range(1, self.stages[-1] + 1):
            x = self.stage(number)(x)
            if number in self.stages:
                maps.append(x)
        return maps


Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
_builders: dict[str, Callable[..., nn.Module]] = {}


def register_backbone(*names: str) -> Callable[[Builder], Builder]:
    """Record a function ``(name, *, stages, width, frozen_norm, frozen_stages)`` that builds the backbones of these names.

    ``width`` is None for the published one; what a family cannot do it refuses with a ValueError.
    """

    def record(builder: Builder) -> Builder:
        for name in names:
            if name in _builders:
                raise ValueError(f"a backbone named {name!r} is already registered")
            _builders[name] = builder
        return builder

    return record


def build_backbone(name: str, **options: Any) -> nn.Module:
    """Build a backbone by its name; see `register_backbone` for the options.

    Raises
    ------
    ValueError
        Unknown name; the message offers near ones.
    """
    if name not in _builders:
        near = difflib.get_close_matches(name, _builders, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(_builders))}"
        raise ValueError(f"unknown backbone {name!r}: {hint}")
    return _builders[name](name, **options)


@register_backbone(*resnet.CONFIGS)
def _resnet(
    name: str, *, stages: Sequence[int], width: int | None = None, frozen_norm: bool = True, frozen_stages: int = 0
) -> nn.Module:
    config = resnet.CONFIGS[name]
    if width is not None:
        config = replace(config, width=width)
    return ResNetBackbone(config, stages=stages, frozen_norm=frozen_norm, frozen_stages=frozen_stages)
