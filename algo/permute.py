"""Reorder channels so that N:M pruning keeps more: the network computes what it did, but large weights no longer compete.

Channels that are coupled (`algo.channels`) move together, through every layer that makes or reads them, so outputs stay the same
but for the order of sums. The order is found by swaps: groups of M are paired at random, the best swap of one channel between
the two is made if it raises the sum of magnitudes that the mask keeps; all pairs of a round at once.

Ref: J. Pool and C. Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021: the objective, and swaps between stripes. They search
2:4 stripes exhaustively; this works for any N:M.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from algo.channels import ChannelGroup, channel_groups
from algo.count import ExampleInputs, as_arguments
from algo.layers import Pattern, match_patterns
from algo.mask import magnitude_mask, rows
from algo.modes import evaluating
from algo.nm import NM

__all__ = ["PermutedGroup", "permute_channels", "search_order"]


@dataclass(frozen=True)
class PermutedGroup:
    """A group of channels that was reordered: its name, layers that read it, and the share of their magnitude that masks keep
    before and after."""

    name: str
    consumers: tuple[str, ...]
    channels: int
    kept_before: float
    kept_after: float


def permute_channels(
    model: nn.Module,
    pattern: Pattern,
    example_inputs: ExampleInputs,
    *,
    exclude: Iterable[str] | None = None,
    seconds: float = 60.0,
    seed: int = 0,
) -> list[PermutedGroup]:
    """Reorder the channels of a dense model in place, before `sparsify`; one row for each group that can be reordered.

    Parameters
    ----------
    model
        Dense and traceable.
    pattern, exclude
        What `sparsify` will be called with.
    example_inputs
        See `algo.channels.channel_groups`.
    seconds
        Time for the search, shared among groups by their size. The search stops by itself when rounds bring nothing.
    seed
        Of the random pairs.

    Raises
    ------
    UntraceableError
        The model cannot be traced.
    ValueError
        No layer matches, ``seconds`` is not positive, or the outputs changed (the weights are put back).
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be > 0, not {seconds!r}")
    patterns = match_patterns(model, pattern, exclude=exclude)
    with evaluating(model):
        groups = [group for group in channel_groups(model, example_inputs).prunable if _readers(group, model, patterns)]
        sizes = {group.name: sum(m.numel() for m, _ in _readers(group, model, patterns)) for group in groups}
        generator, saved = torch.Generator().manual_seed(seed), _tensors(model, groups)
        before = _outputs(model, example_inputs)
        found = []
        for group in groups:
            share = seconds * sizes[group.name] / sum(sizes.values())
            found.append(_reorder(model, group, patterns, generator, share))
        _check_outputs(before, _outputs(model, example_inputs), saved)
    return found


def _readers(group: ChannelGroup, model: nn.Module, patterns: Mapping[str, NM]) -> list[tuple[Tensor, NM]]:
    """Magnitudes ``(rows, channels)``, channels in the order of the group's units, of each sparse layer that reads them.

    Layers that read other channels too, or several of a unit, are left out: they are reordered, but do not decide.
    """
    found = []
    for name in group.consumers:
        where = group.inputs[name]
        weight = cast(Tensor, model.get_submodule(name).weight).detach()
        matrix = rows(weight).abs().reshape(-1, weight.shape[1])
        if name in patterns and where.shape[1] == 1 and group.units == matrix.shape[1] > patterns[name].m:
            found.append((matrix[:, where[:, 0]].float(), patterns[name]))
    return found


def _tensors(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every tensor that groups reach, and a copy of it."""
    names = {name for group in groups for name, _ in group.axes}
    return {name: (value := _tensor(model, name), value.detach().clone()) for name in names}


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, own = name.rpartition(".")
    value = getattr(model.get_submodule(owner), own)
    return value.data if isinstance(value, nn.Parameter) else value


@torch.no_grad()
def _reorder(
    model: nn.Module, group: ChannelGroup, patterns: Mapping[str, NM], generator: torch.Generator, seconds: float
) -> PermutedGroup:
    readers = _readers(group, model, patterns)
    order = search_order(readers, generator=generator, seconds=seconds)
    before = _kept(readers, torch.arange(group.units))
    for (name, axis), where in group.axes.items():
        value = _tensor(model, name)
        taken = value.index_select(axis, where[order].flatten().to(value.device))
        value.index_copy_(axis, where.flatten().to(value.device), taken)
    return PermutedGroup(group.name, group.consumers, group.units, before, _kept(readers, order))


def _kept(readers: Sequence[tuple[Tensor, NM]], order: Tensor) -> float:
    """Share of the magnitude that masks keep."""
    kept = sum((m[:, order] * magnitude_mask(m[:, order], nm)).sum().item() for m, nm in readers)
    return kept / max(sum(m.sum().item() for m, _ in readers), 1e-30)


@torch.no_grad()
def search_order(
    readers: Sequence[tuple[Tensor, NM]], *, generator: torch.Generator, seconds: float, patience: int = 30
) -> Tensor:
    """An order of channels that keeps more magnitude.

    Parameters
    ----------
    readers
        Magnitudes ``(rows, channels)`` of layers that read the channels, with their patterns.
    seconds, patience
        Stop after that time, or that many rounds one after another without a gain.

    Returns
    -------
    Tensor
        int64 ``(channels,)``: new channel i is old channel ``order[i]``.
    """
    channels = readers[0][0].shape[1]
    order, stop, idle = torch.arange(channels), time.perf_counter() + seconds, 0
    while idle < patience and time.perf_counter() < stop:
        # Pairs of groups of one layer's M; layers with another M follow by their own gain
        size = readers[int(torch.randint(len(readers), (), generator=generator))][1].m
        count = channels // size // 2
        if not count:
            break
        pairs = torch.randperm(channels // size, generator=generator)[: 2 * count].reshape(2, count)
        slots = pairs[..., None] * size + torch.arange(size)  # (2, pairs, size): positions in the order
        gain = sum((_gains(m, nm, order, slots) for m, nm in readers if nm.m == size), torch.zeros(count, size, size))
        if any(nm.m != size for _, nm in readers):
            order, won = _try_one(readers, order, slots, gain)
        else:
            order, won = _swap(order, slots, gain)
        idle = 0 if won else idle + 1
    return order


def _gains(magnitudes: Tensor, nm: NM, order: Tensor, slots: Tensor) -> Tensor:
    """Gain ``(pairs, M, M)`` of kept magnitude by swapping element i of the first group with element j of the second."""
    sides = [magnitudes[:, order[side]].permute(1, 2, 0) for side in slots]  # (pairs, M, rows) each
    gain = torch.zeros(len(sides[0]), nm.m, nm.m)
    for here, other, flip in ((sides[0], sides[1], False), (sides[1], sides[0], True)):
        ranked = here.sort(dim=1, descending=True)
        place = ranked.indices.argsort(dim=1)
        total = ranked.values[:, : nm.n].sum(1, keepdim=True)
        last, spare = ranked.values[:, nm.n - 1: nm.n], ranked.values[:, nm.n: nm.n + 1] if nm.n < nm.m else torch.zeros(())
        inside = place < nm.n
        rest = torch.where(inside, total - here, total - last)  # the N - 1 largest of the others
        bar = torch.where(inside, spare, last)  # the next of the others
        for i in range(nm.m):
            after = rest[:, i: i + 1] + torch.maximum(other, bar[:, i: i + 1])  # (pairs, M of other, rows)
            change = (after - total).sum(2)
            if flip:
                gain[:, :, i] += change
            else:
                gain[:, i] += change
    return gain


def _swap(order: Tensor, slots: Tensor, gain: Tensor) -> tuple[Tensor, bool]:
    """Make the best swap of each pair that gains."""
    best, where = gain.flatten(1).max(1)
    wins = best > 1e-6 * best.abs().max().clamp(min=1e-30)
    if not wins.any():
        return order, False
    size = slots.shape[2]
    first = slots[0][wins].gather(1, (where[wins] // size)[:, None])[:, 0]
    second = slots[1][wins].gather(1, (where[wins] % size)[:, None])[:, 0]
    new = order.clone()
    new[first], new[second] = order[second], order[first]
    return new, True


def _try_one(readers: Sequence[tuple[Tensor, NM]], order: Tensor, slots: Tensor, gain: Tensor) -> tuple[Tensor, bool]:
    """With patterns of several M a swap changes other groups too: make the round's swaps only if all layers together gain."""
    new, won = _swap(order, slots, gain)
    if won and _kept(readers, new) > _kept(readers, order):
        return new, True
    return order, False


def _outputs(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    args, kwargs = as_arguments(example_inputs)
    with torch.no_grad():
        result = model(*args, **kwargs)
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _check_outputs(before: list[Tensor], after: list[Tensor], saved: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for old, new in zip(before, after, strict=True):
        scale = old.abs().max().item() if old.numel() else 0.0
        if old.numel() and (old - new).abs().max().item() > 1e-3 * scale + 1e-6:
            with torch.no_grad():
                for value, copy in saved.values():
                    value.copy_(copy)
            raise ValueError("reordering channels changed the outputs: the network depends on their order in a way that tracing "
                             "did not see; its weights are as they were. Please report it")
