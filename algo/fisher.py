"""Group Fisher pruning: while a network trains, its least important channels go, one at a time.

    pruner = FisherPruner(model, images, target=0.5)
    for images, labels in loader:
        loss = criterion(model(images), labels)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        pruner.step()
        if pruner.done: break
    pruner.finish()                     # gates become surgery; then train the smaller network on

With a mask m on what the layers of a group read, the loss changes to second order by
``1/2 * sum over samples n of (dL_n/dm_c)^2`` when channel c goes (equations 2 and 3). A channel read in
several places has one mask: its derivatives are summed before they are squared (equation 4). One unit leaves
every ``interval`` iterations, the one with the least importance per saving (section 3.3); then all counts
start anew.

Ref: L. Liu et al., Group Fisher Pruning for Practical Network Compression, arXiv 2108.00708. Differences from
the authors' released code: groups need no names, whole groups of grouped convolutions and linear layers are
pruned too, and a group keeps at least ``minimum`` units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from algo.channel_cost import ChannelCost, Measure
from algo.channel_gates import ChannelGates, channel_axis
from algo.channels import ChannelGraph, ChannelGroup, channel_groups
from algo.count import ExampleInputs, count
from algo.surgery import check_surgery, prune_channels

__all__ = ["FisherPruner", "PrunedUnit"]


@dataclass(frozen=True)
class PrunedUnit:
    """One pruning: ``importance`` is per saving, ``remaining`` the fraction of the cost that is left."""

    iteration: int
    group: str
    unit: int
    importance: float
    remaining: float


class FisherPruner:
    """Prunes a network inside any training loop.

    Parameters
    ----------
    model
        Runs with gates on its layers' inputs until `finish` or `close`. If one call of it is one forward
        pass, its gradients may be accumulated over several passes.
    example_inputs
        See `channel_groups`; the batch must have at least one sample, of the size that costs are counted at.
    target
        Fraction of the cost to be left, 0 to 1.
    of
        What the target is of: ``"macs"``, ``"parameters"`` or ``"memory"`` (activations).
    normalise
        What importance is divided by: the saving of one of these, or None.
    interval
        Iterations from one pruning to the next; the paper's is 25 for classification, 10 for detection.
    units
        Units a pruning; the paper's is 1.
    minimum
        Units that every group keeps.
    tolerance
        How far the fraction may fall below the target: a unit that costs too much to be the last is passed
        over for the next best, if there is one that fits.
    exclude
        Globs of layers whose outputs stay.
    check
        Try surgery on a copy first (`check_surgery`): two forward passes.

    Members
    -------
    graph
        The groups.
    history
        Every `PrunedUnit`.
    iteration
        Calls of `step` so far.

    Raises
    ------
    UntraceableError
        The network cannot be recorded, or cannot run with fewer channels.
    ValueError
        An option out of range, no group to prune, or a target that cannot be reached.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        target: float = 0.5,
        of: Measure = "macs",
        normalise: Measure | None = "macs",
        interval: int = 25,
        units: int = 1,
        minimum: int = 1,
        tolerance: float = 0.01,
        exclude: Iterable[str] = (),
        check: bool = True,
    ) -> None:
        _check_options(
            target=target, tolerance=tolerance, interval=interval, units=units, minimum=minimum
        )
        self.model, self.target = model, target
        self.interval, self.units, self.minimum, self.tolerance = interval, units, minimum, tolerance
        self.graph = channel_groups(model, example_inputs)
        self.cost = ChannelCost(self.graph, of, extra=_other_macs(model, self.graph, example_inputs, of))
        self.saving = None if normalise is None else ChannelCost(self.graph, normalise)
        self._open = np.array([not _matches(group, tuple(exclude)) for group in self.graph.prunable])
        self._check_target()
        if check:
            check_surgery(model, self.graph, example_inputs)
        self.history: list[PrunedUnit] = []
        self.iteration = 0
        self._starts = np.cumsum([0, *(group.units for group in self.graph.prunable)])
        self._slots = self._input_slots()
        self._fisher = torch.zeros(int(self._starts[-1]))  # of the gradients' device and dtype once there are any
        self._scores: Tensor | None = None
        self.gates = ChannelGates(model, self.graph, watch=self._watch)
        self._handle = model.register_forward_pre_hook(lambda *_: self._flush())

    # -- what a training loop uses -------------------------------------------------------------------------

    @property
    def remaining(self) -> float:
        """Fraction of the cost that is left."""
        return self.cost.total(self._alive()) / self.cost.total(self.cost.units)

    @property
    def done(self) -> bool:
        """Whether the target is reached; `step` then does nothing."""
        return self.remaining <= self.target

    def step(self) -> list[PrunedUnit]:
        """Count one iteration, after its backward pass; prune if it is time.

        Returns
        -------
        list[PrunedUnit]
            What was pruned now, usually nothing or one unit.

        Raises
        ------
        RuntimeError
            No gradient has reached a gate, or it was not finite.
        """
        self._flush()
        self.iteration += 1
        if self.iteration % self.interval or self.done:
            return []
        if not torch.isfinite(self._fisher).all():
            raise RuntimeError("the loss's gradients are not finite: nothing can be said about importance")
        if not self._fisher.any():
            raise RuntimeError("no gradient has reached a layer: call backward() before step()")
        pruned: list[PrunedUnit] = []
        while len(pruned) < self.units and not self.done:
            pruned.append(self._prune_one())
        self.gates.update()
        self._fisher.zero_()
        return pruned

    def importance(self) -> dict[str, Tensor]:
        """Accumulated Fisher information by group, (units,), before it is divided by the saving."""
        self._flush()
        parts = self._fisher.cpu().split([group.units for group in self.graph.prunable])
        return {group.name: part.clone() for group, part in zip(self.graph.prunable, parts)}

    def finish(self, optimizer: Optimizer | None = None) -> nn.Module:
        """Take the gates off and remove the pruned channels, in place; see `prune_channels`."""
        self.close()
        gone = {name: (~alive).nonzero().flatten().tolist() for name, alive in self.gates.alive.items()}
        return prune_channels(
            self.model,
            self.graph,
            {name: units for name, units in gone.items() if units},
            optimizer=optimizer,
        )

    def close(self) -> None:
        """Take the gates off; the network is as it was, but for its training."""
        self.gates.remove()
        self._handle.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """What is needed to go on, as flat tensors; save it beside the weights of the unpruned shapes."""
        self._flush()
        alive = {f"alive.{name}": value.clone() for name, value in self.gates.alive.items()}
        return {"iteration": torch.tensor(self.iteration), "fisher": self._fisher.clone(), **alive}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`; ``history`` is not part of it.

        Raises
        ------
        ValueError
            Of another network.
        """
        own = self.state_dict()
        for name in sorted(set(own) | set(state)):
            if name not in own or name not in state or own[name].shape != state[name].shape:
                raise ValueError(f"this state is of another network: {name!r} does not fit")
        self.iteration = int(state["iteration"])
        self._fisher = state["fisher"].to(self._fisher.device)
        self.gates.update({name: state[f"alive.{name}"] for name in self.gates.alive})

    # -- scores --------------------------------------------------------------------------------------------

    def _input_slots(self) -> dict[str, Tensor]:
        """Layer -> int64 (inputs,): the unit that each input channel belongs to, the last slot for none."""
        slots = {
            name: torch.full((layer.inputs,), int(self._starts[-1]))
            for name, layer in self.graph.layers.items()
        }
        for start, group in zip(self._starts.tolist(), self.graph.prunable):
            for name, positions in group.inputs.items():
                numbers = torch.arange(start, start + group.units)[:, None].expand_as(positions)
                slots[name][positions] = numbers
        return slots

    def _watch(self, name: str, gated: Tensor) -> None:
        """When the gradient of a gated input comes, add its part of the derivative by the mask."""
        if not torch.is_grad_enabled():
            return
        gated.requires_grad_()  # also behind frozen layers, which would seem unimportant otherwise
        kept = gated.detach()
        axis = channel_axis(self.model.get_submodule(name), gated)
        samples = max(len(gated) // self.graph.layers[name].rows, 1)

        def add(gradient: Tensor) -> None:
            product = (kept * gradient).movedim(axis, -1)
            product = product.reshape(samples, -1, product.shape[-1]).sum(1)
            wide = torch.promote_types(product.dtype, torch.float32)
            if self._scores is None or len(self._scores) != samples:
                self._start(name, samples, product.new_zeros((), dtype=wide))
            assert self._scores is not None
            slots = self._slots[name] = self._slots[name].to(product.device)
            self._scores.index_add_(1, slots, product.to(self._scores.dtype))

        gated.register_hook(add)

    def _start(self, name: str, samples: int, like: Tensor) -> None:
        """Begin the sums of one forward pass: (samples, slots)."""
        if self._scores is not None:
            raise RuntimeError(
                f"layer {name!r} reads {samples} samples, others in this pass {len(self._scores)}"
            )
        self._scores = like.new_zeros(samples, int(self._starts[-1]) + 1)
        self._fisher = self._fisher.to(like)

    def _flush(self) -> None:
        """End one forward pass: square the sums and add up the samples."""
        if self._scores is not None:
            self._fisher += self._scores[:, :-1].square().sum(0)
            self._scores = None

    # -- choice --------------------------------------------------------------------------------------------

    def _alive(self) -> NDArray[np.int64]:
        return np.array([int(alive.sum()) for alive in self.gates.alive.values()])

    def _prune_one(self) -> PrunedUnit:
        """Switch off the unit of least importance per saving."""
        alive = self._alive()
        savings = np.ones(len(alive)) if self.saving is None else self.saving.savings(alive)
        savings = np.maximum(savings, 1e-12) / (1 if self.saving is None else self.saving.total(self.cost.units))
        scores = self._fisher.double().cpu() / torch.from_numpy(np.repeat(savings, self.cost.units))
        allowed = torch.from_numpy(np.repeat(self._allowed(alive), self.cost.units))
        scores[~(allowed & torch.cat(list(self.gates.alive.values())))] = torch.inf
        slot = int(scores.argmin())
        index = int(np.searchsorted(self._starts, slot, side="right")) - 1
        group, unit = self.graph.prunable[index], slot - int(self._starts[index])
        self.gates.alive[group.name][unit] = False
        self.history.append(
            PrunedUnit(self.iteration, group.name, unit, float(scores[slot]), self.remaining)
        )
        return self.history[-1]

    def _allowed(self, alive: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(groups,): which groups may lose a unit; of these, if there are any, those that fit the target."""
        allowed = self._open & (alive > self.minimum)
        left = self.cost.total(alive) - self.cost.savings(alive)
        fits = allowed & (left >= (self.target - self.tolerance) * self.cost.total(self.cost.units))
        return fits if fits.any() else allowed

    def _check_target(self) -> None:
        if not self._open.any():
            reasons = sorted({f"{group.name} ({group.kept})" for group in self.graph.groups if group.kept})
            raise ValueError(f"no channels can be pruned: {'; '.join(reasons[:4]) or 'all are excluded'}")
        units = self.cost.units
        least = np.where(self._open, np.minimum(units, self.minimum), units)
        fraction = self.cost.total(least) / self.cost.total(units)
        if fraction > self.target:
            raise ValueError(
                f"target must be at least {fraction:.3f}, what is left with {self.minimum} units in each "
                f"group, not {self.target!r}"
            )


def _check_options(*, target: float, tolerance: float, **counts: int) -> None:
    if not 0 < target <= 1:
        raise ValueError(f"target must be above 0 and at most 1, not {target!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, not {tolerance!r}")
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, not {value!r}")


def _matches(group: ChannelGroup, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for name in group.producers for glob in globs)


def _other_macs(model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs, of: Measure) -> float:
    """MACs a sample that belong to no layer, such as those of attention."""
    if of != "macs":
        return 0.0
    counted = count(model, inputs)
    return (counted.macs - sum(row.macs for row in counted.layers)) / graph.batch
