"""Remove channels for good: a really smaller network that computes what the gated one computed.

A pruned network is an ordinary module: it trains, exports and saves. Its checkpoint is loaded with
`load_pruned`, which gives a freshly built network the checkpoint's shapes.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from algo.capture import UntraceableError, refusal
from algo.channel_gates import ChannelGates
from algo.channels import ChannelGraph, ChannelGroup
from algo.checkpoint import load_model, read_tensors
from algo.count import CONVOLUTIONS, ExampleInputs, as_arguments

__all__ = ["check_surgery", "load_pruned", "prune_channels", "resize"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def prune_channels(
    model: nn.Module,
    graph: ChannelGraph,
    removed: Mapping[str, Iterable[int]],
    *,
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """Remove units of channels from a network, in place.

    Parameters
    ----------
    model
        The network that ``graph`` was made of, unchanged in its shapes since.
    graph
        Of `channel_groups`.
    removed
        Group name, or the name of a layer whose outputs are one group -> units to remove, 0 to units - 1.
    optimizer
        Gets the smaller parameters, and its state of their shapes (momenta) is cut too, so that training can
        go on.

    Returns
    -------
    nn.Module
        ``model`` itself. Its smaller parameters are new objects, without gradients: make a new optimiser, or
        give ``optimizer``.

    Raises
    ------
    ValueError
        No such group or unit, a group that must stay, all units of a group, or a network that was changed.
    """
    _check_shapes(model, graph)
    chosen = [(graph.group(name), _units(graph.group(name), units)) for name, units in removed.items()]
    gone: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for group, units in chosen:
        for axis, positions in group.axes.items():
            gone[axis].append(positions[units].flatten())
    for (name, dim), parts in gone.items():
        keep = torch.ones(graph.shapes[name][dim], dtype=torch.bool)
        keep[torch.cat(parts)] = False
        _select(model, name, dim, keep.nonzero().flatten(), optimizer)
    for part in model.modules():
        _refresh(part)
    return model


def _check_shapes(model: nn.Module, graph: ChannelGraph) -> None:
    for name, shape in graph.shapes.items():
        value = _tensor(model, name)
        if value is None or tuple(value.shape) != shape:
            found = "missing" if value is None else str(tuple(value.shape))
            raise ValueError(f"{name} was {shape} when the network was traced, is now {found}: trace it again")


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    owner, _, own = name.rpartition(".")
    try:
        part = model.get_submodule(owner)
    except AttributeError:
        return None
    return part._parameters.get(own, part._buffers.get(own))


def _units(group: ChannelGroup, units: Iterable[int]) -> Tensor:
    """Units to remove, checked: int64."""
    wanted = sorted({int(unit) for unit in units})
    if group.kept is not None:
        raise ValueError(f"group {group.name!r} must stay: {group.kept}")
    if wanted and not 0 <= wanted[0] <= wanted[-1] < group.units:
        raise ValueError(f"group {group.name!r} has units 0 to {group.units - 1}, not {wanted}")
    if len(wanted) >= group.units:
        raise ValueError(f"group {group.name!r} must keep at least one of its {group.units} units")
    return torch.tensor(wanted, dtype=torch.int64)


def _select(model: nn.Module, name: str, dim: int, keep: Tensor, optimizer: Optimizer | None) -> None:
    """Keep some positions of one axis of a parameter or buffer, and of the optimiser's state for it."""
    value = _tensor(model, name)
    assert value is not None  # _check_shapes has seen it
    smaller = value.detach().index_select(dim, keep.to(value.device))
    if not isinstance(value, nn.Parameter):
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = smaller
        return
    # A new Parameter: autograd would remember the shape of the old one as long as any result of it lives.
    new = nn.Parameter(smaller, requires_grad=value.requires_grad)
    _replace(model, value, new)
    if optimizer is not None:
        _replace_in_optimizer(optimizer, value, new, dim, keep)


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another, wherever it is used."""
    for part in model.modules():
        for name, value in part._parameters.items():
            if value is old:
                part._parameters[name] = new


def _replace_in_optimizer(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, dim: int, keep: Tensor
) -> None:
    """Let an optimiser go on with a smaller parameter and the same part of its state."""
    for group in optimizer.param_groups:
        group["params"] = [new if item is old else item for item in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            key: item.index_select(dim, keep.to(item.device)) if _like(item, old) else item
            for key, item in state.items()
        }


def _like(item: Any, parameter: Tensor) -> bool:
    return isinstance(item, Tensor) and item.shape == parameter.shape


def _refresh(part: nn.Module) -> None:
    """Make a layer's attributes say what its tensors are."""
    module: Any = part
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(part, CONVOLUTIONS):
        transposed = isinstance(part, _TRANSPOSED)
        outputs, inputs = (1, 0) if transposed else (0, 1)
        stacked = weight.shape[outputs] // getattr(part, "kernels", 1)  # of a dynamic convolution, n kernels in one weight
        if module.groups > 1 and not transposed:  # whole groups went: each is as wide as before
            module.groups = stacked * module.groups // module.out_channels
        module.out_channels = stacked
        module.in_channels = weight.shape[inputs] * (1 if transposed else module.groups)
    elif isinstance(part, nn.Linear):
        part.out_features, part.in_features = weight.shape
    elif isinstance(part, nn.modules.batchnorm._NormBase):
        part.num_features = len(weight)
    elif isinstance(part, nn.PReLU):
        part.num_parameters = len(weight)
    elif isinstance(part, nn.Embedding):
        part.embedding_dim = weight.shape[1]


def check_surgery(
    model: nn.Module, graph: ChannelGraph, example_inputs: ExampleInputs, *, tolerance: float = 1e-3
) -> None:
    """Try surgery on a copy: without one unit of each group it must give what the gated network gives.

    This finds what a recorded graph cannot show, such as channel counts written into the code.

    Parameters
    ----------
    tolerance
        Largest difference, relative to the largest output.

    Raises
    ------
    UntraceableError
        The smaller network fails, naming its own error, or gives something else.
    """
    trial = copy.deepcopy(model).eval()
    removed = {group.name: [group.units // 2] for group in graph.prunable if group.units > 1}
    gates = ChannelGates(trial, graph)
    for name, units in removed.items():
        gates.alive[name][units] = False
    gates.update()
    expected = _outputs(trial, example_inputs)
    gates.remove()
    prune_channels(trial, graph, removed)
    try:
        found = _outputs(trial, example_inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        raise refusal(trial, error, what="fixes a size and cannot run with fewer channels") from error
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape or not _close(ours, theirs, tolerance):
            raise UntraceableError(
                f"{type(model).__name__} does not compute the same with fewer channels: its code depends on "
                "how many there are"
            )


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether values differ by at most ``tolerance`` times the largest; what is not finite is left out."""
    finite = theirs.isfinite()
    ours, theirs = ours[finite], theirs[finite]
    return not len(theirs) or bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@torch.no_grad()
def _outputs(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """Floating-point results of a run."""
    args, kwargs = as_arguments(example_inputs)
    args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    leaves = tree_leaves(model(*args, **kwargs))
    return [item for item in leaves if isinstance(item, Tensor) and item.is_floating_point() and item.numel()]


@torch.no_grad()
def resize(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Give a network smaller tensors, in place, so that a pruned network's state dict fits it; values are
    meaningless until that is loaded.

    Parameters
    ----------
    shapes
        By the names of ``model.state_dict()``.

    Raises
    ------
    ValueError
        Other names, another number of axes, or an axis that would grow.
    """
    own = model.state_dict(keep_vars=True)
    odd = sorted(set(own) ^ set(shapes))
    if odd:
        raise ValueError(f"not a pruned form of this network: only one of them has {odd[0]!r}")
    for name, value in own.items():
        shape = tuple(shapes[name])
        if len(shape) != value.ndim or any(new > old for new, old in zip(shape, value.shape)):
            raise ValueError(
                f"not a pruned form of this network: {name} is {tuple(value.shape)} here, {shape} there"
            )
        if shape == tuple(value.shape):
            continue
        smaller = value.detach()[tuple(slice(0, size) for size in shape)].clone()
        if isinstance(value, nn.Parameter):
            _replace(model, value, nn.Parameter(smaller, requires_grad=value.requires_grad))
        else:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = smaller
    for part in model.modules():
        _refresh(part)
    return model


def load_pruned(model: nn.Module, folder: Path | str) -> dict[str, Any]:
    """Load what `algo.checkpoint.save_model` wrote of a pruned network into a freshly built one, in place.

    Returns
    -------
    dict
        The facts given to ``save_model``.

    Raises
    ------
    FileNotFoundError, ValueError
        As `algo.checkpoint.load_model` and `resize`.
    """
    tensors, _ = read_tensors(Path(folder) / "model.safetensors")
    resize(model, {name: tuple(value.shape) for name, value in tensors.items()})
    return load_model(model, Path(folder))
