"""Walk a recorded graph and tie channels that belong together.

A value of the graph has at most one axis of prunable channels (`Channels`). A rule takes an operator's node
and gives the channels of its result (`algo.channel_rules`). Operators without a rule, and uses that a rule
does not understand, keep what they touch, with the operator and its line as the reason: an unknown operator
never leads to a wrong network.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload

from algo.capture import module_path, where
from algo.coupling import Coupling, Ids

__all__ = ["Call", "Channels", "Propagation", "Rule", "because", "shape_of"]

Rule = Callable[["Propagation", fx.Node, dict[str, Any]], Any]
"""Channels of an operator's result (None, or a list for several results), from its node and bound arguments."""


@dataclass(frozen=True)
class Channels:
    """Channel numbers along one axis of a value; a flattened axis repeats them."""

    axis: int
    ids: Ids


@dataclass(frozen=True)
class Call:
    """One call of a convolution or linear layer: the channels that it reads and gives, and its sizes.

    ``positions`` counts the places each output channel (transposed: input channel) is computed at, all
    samples together; ``rows`` is the length of the input's first axis.
    """

    layer: str
    weight: str
    inputs: Ids
    outputs: Ids
    groups: int
    kernel: int
    positions: int
    output_positions: int
    rows: int


class Propagation:
    """Walks a graph in order and couples channels.

    Parameters
    ----------
    model
        The module that was recorded.
    sources
        Names of the parameters and buffers behind the graph's placeholders; a tied tensor has one name.
    shapes
        Shapes by those names.
    rule_of
        The rule of an operator, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: dict[fx.Node, str],
        shapes: dict[str, tuple[int, ...]],
        rule_of: Callable[[OpOverload], Rule | None],
    ) -> None:
        self.model = model
        self.sources = sources
        self.shapes = shapes
        self.rule_of = rule_of
        self.coupling = Coupling()
        self.axes: dict[tuple[str, int], Ids] = {}
        self.calls: list[Call] = []
        self.values: dict[fx.Node, Any] = {}  # Channels, None, or a list of them
        self.modules = {id(part): name for name, part in reversed(list(model.named_modules()))}

    def run(self, graph: fx.Graph) -> None:
        """Visit every node."""
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                for item in node.all_input_nodes:
                    self.refuse([item], "the network's result")

    # -- what rules use ------------------------------------------------------------------------------------

    def axis(self, name: str, dim: int) -> Ids:
        """Channel numbers of one axis of a parameter or buffer."""
        if (name, dim) not in self.axes:
            self.axes[name, dim] = self.coupling.new(self.shapes[name][dim])
        return self.axes[name, dim]

    def channels(self, node: Any) -> Channels | None:
        """Channels of an operand; None if it has none or is no node."""
        found = self.values.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Channels) else None

    def refuse(self, nodes: Sequence[fx.Node], reason: str) -> None:
        """Keep all channels of these values, and every axis of these parameters."""
        for node in nodes:
            if node in self.sources:
                name = self.sources[node]
                for dim in range(len(self.shapes[name])):
                    self.coupling.keep(self.axis(name, dim), reason)
            found = self.values.get(node)
            for item in found if isinstance(found, list) else [found]:
                if isinstance(item, Channels):
                    self.coupling.keep(item.ids, reason)

    def give_up(self, node: fx.Node, why: str = "mixes them") -> None:
        """Keep all operands of an operator that does not go together with pruning."""
        self.refuse(node.all_input_nodes, because(node, why))

    def join_vector(self, item: Any, channels: Channels, reason: str) -> None:
        """Tie a vector operand such as a bias to the channels; a vector that is no parameter keeps them."""
        if not isinstance(item, fx.Node):
            return
        if item in self.sources:
            self.coupling.join(self.axis(self.sources[item], 0), channels.ids)
        else:
            self.coupling.keep(channels.ids, reason)

    def join_channels(self, node: fx.Node, ids: Ids, reason: str) -> None:
        """Tie the channels of a value, on axis 1, to others; a value without them keeps those."""
        found = self.channels(node)
        if found is not None and found.axis == 1 and len(found.ids) == len(ids):
            self.coupling.join(found.ids, ids)
        else:
            self.refuse([node], reason)
            self.coupling.keep(ids, reason)

    # -- the walk ------------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node) -> Channels | None:
        """A parameter with one axis of more than one element has channels from the start."""
        if node not in self.sources:
            return None
        name = self.sources[node]
        large = [dim for dim, size in enumerate(self.shapes[name]) if size > 1]
        return Channels(large[0], self.axis(name, large[0])) if len(large) == 1 else None

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            found = self.values.get(node.args[0])  # type: ignore[arg-type]
            return found[node.args[1]] if isinstance(found, list) else None  # type: ignore[index]
        if not any(
            self.values.get(item) is not None or item in self.sources for item in node.all_input_nodes
        ):
            return None
        if not isinstance(node.target, OpOverload):
            if isinstance(node.meta.get("val"), Tensor | tuple | list):
                self.give_up(node)
            return None
        rule = self.rule_of(node.target)
        if rule is not None:
            return rule(self, node, _bound(node))
        if node.meta.get("val") is not None:
            self.give_up(node)
        return None


def _bound(node: fx.Node) -> dict[str, Any]:
    """Arguments by their names in the operator's schema, defaults included."""
    arguments: Any = node.target._schema.arguments  # type: ignore[union-attr]
    named = {
        argument.name: argument.default_value for argument in arguments if argument.has_default_value()
    }
    named.update({argument.name: value for argument, value in zip(arguments, node.args, strict=False)})
    return named | dict(node.kwargs)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value."""
    return tuple(int(size) for size in node.meta["val"].shape)


def because(node: fx.Node, why: str) -> str:
    """A reason to keep channels: the operator, what it does, and where in the code and in the network."""
    name = str(node.target).removeprefix("aten.").split(".")[0]
    line, path = where(node), module_path(node)
    return f"{name} {why}" + (f", {line}" if line else "") + (f" in {path}" if path else "")
