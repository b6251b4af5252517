"""What a network would cost with some of its channels gone, without building it.

Ref: L. Liu et al., Group Fisher Pruning, arXiv 2108.00708, section 3.3: the saving of one channel is that of
the layers that read it plus that of the layers that give it, with the channels that are left at the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from algo.channels import ChannelGraph

__all__ = ["ChannelCost", "Measure"]

Measure: TypeAlias = Literal["macs", "parameters", "memory"]
"""``memory`` is the output elements of convolutions and linear layers, a sample."""


class ChannelCost:
    """Cost as a function of how many units each prunable group has left.

    Parameters
    ----------
    graph
        Of `channel_groups`.
    measure
        ``"macs"``, ``"parameters"`` or ``"memory"``, of one sample.
    extra
        A cost that pruning does not touch, such as attention's matrix products.
    """

    def __init__(self, graph: ChannelGraph, measure: Measure, *, extra: float = 0) -> None:
        if measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {', '.join(get_args(Measure))}, not {measure!r}")
        self.measure = measure
        self.extra = extra
        self.units = np.array([group.units for group in graph.prunable])
        layers = graph.layers.values()
        self._positions = np.array([layer.positions * layer.kernel for layer in layers])
        self._written = np.array([layer.output_positions for layer in layers])
        self._groups = np.array([layer.groups for layer in layers])
        self._inputs = np.array([layer.inputs for layer in layers])
        self._outputs = np.array([layer.outputs for layer in layers])
        self._input_units = _per_unit(graph, {name: i for i, name in enumerate(graph.layers)}, "inputs")
        self._output_units = _per_unit(graph, {name: i for i, name in enumerate(graph.layers)}, "outputs")
        self._shapes, self._axis_units = _parameters(graph)

    def total(self, alive: NDArray[np.int64]) -> float:
        """Cost with ``alive[g]`` units left in each prunable group, int64 (groups,)."""
        return float(self._totals(alive[None])[0])

    def savings(self, alive: NDArray[np.int64]) -> NDArray[np.float64]:
        """What one unit less of each group would save now: float64 (groups,)."""
        fewer = alive[None] - np.eye(len(alive), dtype=np.int64)
        return self.total(alive) - self._totals(fewer)

    def _totals(self, alive: NDArray[np.int64]) -> NDArray[np.float64]:
        """Costs of many choices at once: (choices, groups) -> (choices,)."""
        gone = self.units - alive
        if self.measure == "parameters":
            sizes = self._shapes - np.einsum("cg,gpd->cpd", gone, self._axis_units)
            return self.extra + sizes.prod(2).sum(1).astype(np.float64)
        inputs = self._inputs - gone @ self._input_units
        outputs = self._outputs - gone @ self._output_units
        if self.measure == "memory":
            return self.extra + outputs @ self._written
        # a grouped layer loses whole groups: each channel left still meets as many
        fan = np.where(self._groups > 1, self._outputs // self._groups, outputs)
        return self.extra + (inputs * fan) @ self._positions


def _per_unit(
    graph: ChannelGraph, index: Mapping[str, int], side: Literal["inputs", "outputs"]
) -> NDArray[np.int64]:
    """(groups, layers): input or output channels that a unit of a group has in a layer."""
    table = np.zeros((len(graph.prunable), len(index)), np.int64)
    for row, group in enumerate(graph.prunable):
        for name, positions in (group.inputs if side == "inputs" else group.outputs).items():
            table[row, index[name]] = positions.shape[1]
    return table


def _parameters(graph: ChannelGraph) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shapes of all parameters, padded with ones (parameters, rank), and what a unit takes from each axis."""
    names = [name for name in graph.shapes if name in graph.parameters]
    rank = max((len(graph.shapes[name]) for name in names), default=1) or 1
    shapes = np.array([[*graph.shapes[name], *[1] * (rank - len(graph.shapes[name]))] for name in names])
    units = np.zeros((len(graph.prunable), len(names), rank), np.int64)
    index = {name: i for i, name in enumerate(names)}
    for row, group in enumerate(graph.prunable):
        for (name, dim), positions in group.axes.items():
            if name in index:
                units[row, index[name], dim] = positions.shape[1]
    return shapes.reshape(len(names), rank), units
