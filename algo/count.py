"""Count the parameters, multiply-accumulates and activations of a network on given inputs.

The conventions are those of I. Radosavovic et al., arXiv 2003.13678, and L. Liu et al., Group Fisher Pruning,
arXiv 2108.00708, table 1: MACs of convolutions, linear layers and matrix products; activations are the output
elements of convolutions. ResNet-50 on 224 x 224 pixels: 25,557,032, 4,089,184,256 and 11,113,984.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["CONVOLUTIONS", "LAYERS", "Count", "ExampleInputs", "LayerCount", "as_arguments", "count"]

ExampleInputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
LAYERS = (*CONVOLUTIONS, nn.Linear)
"""The modules that are counted, layer by layer."""


@dataclass(frozen=True)
class LayerCount:
    """One convolution or linear layer, summed over its calls. ``activations``: elements it gives."""

    layer: str
    kind: str
    parameters: int
    macs: int
    activations: int


@dataclass(frozen=True)
class Count:
    """What a network costs on the inputs it was counted with.

    Members
    -------
    parameters
        Of the whole module, tied ones once; buffers are none.
    macs
        Of convolutions, linear layers and matrix products, those of attention included.
    activations
        Output elements of convolutions.
    linear_activations
        Output elements of linear layers, which the papers leave out.
    layers
        Convolutions and linear layers in the order of their first call.
    """

    parameters: int
    macs: int
    activations: int
    linear_activations: int
    layers: tuple[LayerCount, ...]


def count(model: nn.Module, inputs: ExampleInputs) -> Count:
    """Count a network without computing anything: it runs on the meta device, in the mode it is in.

    Parameters
    ----------
    model
        Any module; it is not changed.
    inputs
        A tensor, a tuple of the positional arguments, or a dict of keyword arguments; batch 1 gives the
        figures of the papers.

    Raises
    ------
    Whatever the module raises on these inputs. A module whose code needs values runs on its own device.
    """
    args, kwargs = as_arguments(inputs)
    calls: dict[nn.Module, list[int]] = {}
    handles = [
        module.register_forward_hook(_recorder(calls))
        for module in model.modules()
        if isinstance(module, LAYERS)
    ]
    try:
        macs = _run(model, args, kwargs, calls)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    layers = tuple(_row(names[module], module, *totals) for module, totals in calls.items())
    return Count(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=macs,
        activations=sum(row.activations for row in layers if row.kind == "conv"),
        linear_activations=sum(row.activations for row in layers if row.kind == "linear"),
        layers=layers,
    )


def as_arguments(inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a tensor, a tuple or a dict; TypeError for anything else."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise TypeError(f"inputs must be a tensor, a tuple or a dict of them, not {type(inputs).__name__}")


def _recorder(calls: dict[nn.Module, list[int]]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that adds up MACs and output elements for each module."""

    def record(module: nn.Module, arguments: Any, output: Tensor) -> None:
        totals = calls.setdefault(module, [0, 0])
        totals[0] += _macs(module, arguments[0], output)
        totals[1] += output.numel()

    return record


def _macs(module: nn.Module, given: Tensor, output: Tensor) -> int:
    """Each output element takes one product per weight that it sees; transposed: each input element."""
    weight: Any = module.weight
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return (given if transposed else output).numel() * math.prod(weight.shape[1:])


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], calls: dict[nn.Module, list[int]]
) -> int:
    """Run the module once, on the meta device if its code lets it; the MACs of every product."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: value.detach().to("meta") for name, value in state.items()}
    meta_args, meta_kwargs = tree_map_only(Tensor, lambda value: value.to("meta"), (args, kwargs))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, state, meta_args, meta_kwargs)
    except (RuntimeError, NotImplementedError):  # code that asks for values; a real fault shows again
        calls.clear()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*args, **kwargs)
    return counter.get_total_flops() // 2


def _row(name: str, module: nn.Module, macs: int, activations: int) -> LayerCount:
    kind = "linear" if isinstance(module, nn.Linear) else "conv"
    own = sum(parameter.numel() for parameter in module.parameters())
    return LayerCount(name, kind, own, macs, activations)
