"""Switch channels off without changing a network: hooks that multiply what each layer reads by 0 or 1.

Ref: L. Liu et al., Group Fisher Pruning, arXiv 2108.00708, section 3.1: a mask on the input channels of every
convolution and linear layer, shared by the layers of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algo.channels import ChannelGraph

__all__ = ["ChannelGates", "channel_axis"]

Watch = Callable[[str, Tensor], None]


class ChannelGates:
    """Gates on the inputs of all layers that read prunable channels.

    Parameters
    ----------
    model
        The network that the graph was made of; it runs with the gates until `remove`.
    watch
        Called with the layer's name and its gated input, each time a layer runs.

    Members
    -------
    alive
        Group name -> bool (units,): True is on.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, watch: Watch | None = None) -> None:
        self.graph = graph
        self.watch = watch
        self.alive = {group.name: torch.ones(group.units, dtype=torch.bool) for group in graph.prunable}
        self._masks: dict[str, Tensor] = {}
        readers = {name for group in graph.prunable for name in group.consumers}
        self._handles = [
            model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name in graph.layers
            if name in readers
        ]
        self.update()

    def update(self, alive: Mapping[str, Tensor] | None = None) -> None:
        """Take over which units are on: after ``alive`` was changed in place, or from a mapping."""
        for name, value in (alive or {}).items():
            self.alive[name] = value.clone()
        self._masks = {}
        for group in self.graph.prunable:
            off = ~self.alive[group.name]
            for name, positions in group.inputs.items():
                size = self.graph.layers[name].inputs
                mask = self._masks.setdefault(name, torch.ones(size))
                mask[positions[off].flatten()] = 0

    def remove(self) -> None:
        """Take the gates off the network."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Callable[..., tuple[Any, dict[str, Any]]]:
        def gate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            given = args[0] if args else kwargs["input"]
            gated = given * self._mask(name, module, given)
            if self.watch is not None:
                self.watch(name, gated)
            return (gated, *args[1:]), {key: value for key, value in kwargs.items() if key != "input"}

        return gate

    def _mask(self, name: str, module: nn.Module, given: Tensor) -> Tensor:
        """The mask of a layer, shaped for its input; moved to its device once."""
        mask = self._masks[name]
        if mask.device != given.device or mask.dtype != given.dtype:
            mask = mask.to(given.device, given.dtype)
            if not given.is_meta:  # a network that is counted, not run
                self._masks[name] = mask
        shape = [1] * given.ndim
        shape[channel_axis(module, given)] = -1
        return mask.view(shape)


def channel_axis(module: nn.Module, given: Tensor) -> int:
    """Which axis of a layer's input holds its channels: the last of a Linear, else the second."""
    return given.ndim - 1 if isinstance(module, nn.Linear) else 1
