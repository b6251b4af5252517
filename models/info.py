"""What is known of a registered model besides its code: family, paper, inputs, and the figures that others published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Input", "ModelInfo", "Published", "image"]

Quantity = Literal["parameters", "macs", "activations"]


@dataclass(frozen=True)
class Input:
    """One argument of a model's ``forward``: its name, shape and kind."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def tensor(self, device: torch.device | str = "meta") -> Tensor:
        """Zeros of that shape; without storage on the meta device."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def image(channels: int, height: int, width: int | None = None) -> tuple[Input, ...]:
    """The inputs of an image network: one square image, or one of ``height`` x ``width`` pixels."""
    return (Input("images", (1, channels, height, height if width is None else width)),)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures of one source for one model.

    Members
    -------
    source
        Who says so: a page, a paper's table, or a package by which it was counted.
    parameters, macs, activations
        As printed (11.7 M is 11_700_000); None: not given. Conventions are those of `algo.count`.
    within
        Largest relative difference that the source's rounding or way of counting explains; 0: equal to the unit.
    note
        Where the difference comes from.
    """

    source: str
    parameters: int | None = None
    macs: int | None = None
    activations: int | None = None
    within: float = 0.0
    note: str = ""

    def figures(self) -> Iterator[tuple[Quantity, int]]:
        """The quantities that the source gives."""
        quantities: tuple[Quantity, ...] = ("parameters", "macs", "activations")
        for quantity in quantities:
            value = getattr(self, quantity)
            if value is not None:
                yield quantity, value


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A registered model's family, its paper (arXiv number), example inputs of batch 1, and published figures.

    ``counted`` gives the part of a model that runs on ``inputs``, where ``forward`` itself asks for more than tensors (boxes,
    points); None: the model. ``reconstruction``: the paper has no public code, the network is built from its abstract.
    """

    family: str
    paper: str | None = None
    inputs: tuple[Input, ...] = ()
    published: tuple[Published, ...] = ()
    counted: Callable[[nn.Module], nn.Module] | None = None
    reconstruction: bool = False
    note: str = ""
