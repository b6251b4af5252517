"""Find the channels of a network that can only be pruned together.

A residual sum ties the outputs of all convolutions that it adds; a depth-wise convolution ties its outputs to
its inputs; a grouped convolution loses whole groups; a concatenation puts channels one after the other; a
layer used twice ties what it reads. A *unit* is a smallest set of channels that can go; a *group* is all
units that touch the same layers in the same way.

Ref: L. Liu et al., Group Fisher Pruning, arXiv 2108.00708, section 3.2 and algorithm 1 (layer grouping by a
search for parents). Here channels are tied one by one along a recorded graph, which finds the same groups and
those of parts of a layer too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from algo.capture import capture
from algo.channel_rules import rule_of
from algo.count import ExampleInputs, as_arguments
from algo.coupling import Classes, Ids
from algo.propagation import Call, Propagation
from algo.sparsify import pattern_of

__all__ = ["ChannelGraph", "ChannelGroup", "Layer", "channel_groups"]


@dataclass(frozen=True)
class ChannelGroup:
    """Units that touch the same layers in the same way.

    Members
    -------
    name
        The first layer whose outputs they are.
    units
        How many there are.
    producers, consumers
        Layers whose outputs and whose inputs they are, in order of use.
    axes
        Parameter or buffer name and dimension -> int64 (units, k): the positions that go with each unit.
    inputs
        Consumer -> int64 (units, k): the input channels of each unit.
    outputs
        Producer -> int64 (units, k): the output channels of each unit.
    kept
        Why the group must stay, or None if it can be pruned.
    """

    name: str
    units: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    axes: Mapping[tuple[str, int], Tensor]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    kept: str | None


@dataclass(frozen=True)
class Layer:
    """Sizes of a convolution or linear layer, its calls summed.

    ``positions``: places of the output (transposed: input) a sample; ``output_positions``: of the output;
    ``rows``: rows of the input's first axis a sample.
    """

    name: str
    inputs: int
    outputs: int
    groups: int
    kernel: int
    positions: float
    output_positions: float
    rows: int


@dataclass(frozen=True)
class ChannelGraph:
    """What `channel_groups` found.

    Members
    -------
    groups
        All groups in order of first use; those that must stay have ``kept``.
    layers
        Convolutions and linear layers by name.
    shapes
        Shapes of all parameters and buffers when they were traced, by name; tied ones once.
    parameters
        The names in ``shapes`` that are parameters.
    batch
        Samples in the example inputs.
    """

    groups: tuple[ChannelGroup, ...]
    layers: Mapping[str, Layer]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    batch: int

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups that can be pruned."""
        return tuple(group for group in self.groups if group.kept is None)

    def group(self, name: str) -> ChannelGroup:
        """The group of that name, or the one that holds that layer's outputs.

        Raises
        ------
        ValueError
            There is none, or there are several.
        """
        named = [group for group in self.groups if group.name == name]
        found = named or [group for group in self.groups if name in group.producers]
        if len(found) != 1:
            known = ", ".join(group.name for group in self.groups[:6])
            raise ValueError(
                f"{'several groups are' if found else 'no group is'} named {name!r}: there are {known}"
            )
        return found[0]


def channel_groups(model: nn.Module, example_inputs: ExampleInputs) -> ChannelGraph:
    """Find the groups of coupled channels of a network.

    Parameters
    ----------
    model
        Recorded in the mode it is in: parts that run only in training are seen in training mode only.
    example_inputs
        A tensor, a tuple of the positional arguments, or a dict of keyword arguments. The first axis of the
        first tensor is the batch; every layer's input must have a multiple of it as its first axis.

    Returns
    -------
    ChannelGraph
        Every channel that a convolution or linear layer gives is in some group.

    Raises
    ------
    UntraceableError
        The module cannot be recorded; names module and line.
    ValueError
        A layer is N:M sparse already: prune channels first.
    TypeError
        Not a module, or inputs of another kind.
    """
    program = capture(model, example_inputs)
    _refuse_sparse(model)
    batch = _batch(example_inputs)
    shapes, sources = _sources(model, program)
    walk = Propagation(model, sources, shapes, rule_of)
    walk.run(program.graph)
    _keep_odd_rows(walk, batch)
    classes = walk.coupling.solve()
    layers = _layers(walk.calls, batch)
    groups = _groups(walk, classes, list(layers))
    parameters = {name for name in shapes if _is_parameter(model, name)}
    return ChannelGraph(groups, layers, shapes, frozenset(parameters), batch)


def _refuse_sparse(model: nn.Module) -> None:
    for name, part in model.named_modules():
        pattern = pattern_of(part)
        if pattern is not None:
            raise ValueError(
                f"layer {name!r} is {pattern} sparse already, and its groups would be torn: prune channels "
                "first, then sparsify()"
            )
        if parametrize.is_parametrized(part):
            raise ValueError(f"layer {name!r} is parametrised: remove its parametrisations first")


def _batch(example_inputs: ExampleInputs) -> int:
    args, kwargs = as_arguments(example_inputs)
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor) and item.ndim]
    if not tensors:
        raise TypeError("example_inputs must hold at least one tensor with a batch axis")
    return len(tensors[0])


def _is_parameter(model: nn.Module, name: str) -> bool:
    owner, _, own = name.rpartition(".")
    return own in model.get_submodule(owner)._parameters


def _sources(
    model: nn.Module, program: ExportedProgram
) -> tuple[dict[str, tuple[int, ...]], dict[fx.Node, str]]:
    """Shapes of all parameters and buffers by name, and which placeholder is which; tied tensors have one
    name."""
    names: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    canonical: dict[str, str] = {}
    for name, value in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        canonical[name] = names.setdefault(id(value), name)
        shapes[canonical[name]] = tuple(value.shape)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    sources = {
        nodes[spec.arg.name]: canonical[str(spec.target)]
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }
    return shapes, sources


def _keep_odd_rows(walk: Propagation, batch: int) -> None:
    """Keep what a layer reads if its rows cannot be assigned to samples."""
    first = {call.layer: call.rows for call in reversed(walk.calls)}
    for call in walk.calls:
        if call.rows % batch:
            reason = f"{call.layer} reads {call.rows} rows, no multiple of {batch} samples"
            walk.coupling.keep(call.inputs, reason)
        if call.rows != first[call.layer]:
            reason = f"{call.layer} reads {first[call.layer]} rows at first and {call.rows} later"
            walk.coupling.keep(call.inputs, reason)


def _layers(calls: Iterable[Call], batch: int) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for call in calls:
        old = layers.get(call.layer)
        layers[call.layer] = Layer(
            name=call.layer,
            inputs=len(call.inputs),
            outputs=len(call.outputs),
            groups=call.groups,
            kernel=call.kernel,
            positions=(old.positions if old else 0) + call.positions / batch,
            output_positions=(old.output_positions if old else 0) + call.output_positions / batch,
            rows=max(call.rows // batch, 1),
        )
    return layers


# -- from classes of channels to groups ------------------------------------------------------------------------


def _groups(walk: Propagation, classes: Classes, order: list[str]) -> tuple[ChannelGroup, ...]:
    """Collect classes of one signature; a class without any output channel is no unit."""
    tables: dict[tuple[str, Any], Ids] = {("axis", key): classes.of[ids] for key, ids in walk.axes.items()}
    for call in walk.calls:
        tables["input", call.layer] = classes.of[call.inputs]
        tables["output", call.layer] = classes.of[call.outputs]
    signatures: dict[int, list[tuple[Any, int]]] = defaultdict(list)
    for key, table in tables.items():
        numbers, counts = np.unique(table, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist()):
            signatures[number].append((key, count))
    alike: dict[Any, list[int]] = defaultdict(list)
    for number in sorted(signatures):
        signature = signatures[number]
        kinds = {kind for (kind, _), _ in signature}
        if "output" in kinds:
            kept = classes.kept.get(number)
            kept = kept or (None if "input" in kinds else "nothing reads them")
            alike[kept, tuple(signature)].append(number)
    found = [
        _group(kept, [key for key, _ in signature], numbers, tables, order)
        for (kept, signature), numbers in alike.items()
    ]
    return _named(sorted(found, key=lambda group: order.index(group.name)))


def _group(
    kept: str | None, keys: list[Any], numbers: list[int], tables: Mapping[Any, Ids], order: list[str]
) -> ChannelGroup:
    where = {key: _positions(tables[key], numbers) for key in keys}
    inputs = {name: where[kind, name] for kind, name in keys if kind == "input"}
    outputs = {name: where[kind, name] for kind, name in keys if kind == "output"}
    producers = tuple(sorted(outputs, key=order.index))
    return ChannelGroup(
        name=producers[0],
        units=len(numbers),
        producers=producers,
        consumers=tuple(sorted(inputs, key=order.index)),
        axes={name: where[kind, name] for kind, name in keys if kind == "axis"},
        inputs=inputs,
        outputs=outputs,
        kept=kept,
    )


def _positions(table: Ids, numbers: list[int]) -> Tensor:
    """int64 (units, k): where each class is in an axis, in rising order."""
    order = np.argsort(table, kind="stable")
    start = np.searchsorted(table[order], numbers)
    count = int((table == numbers[0]).sum())
    return torch.from_numpy(order[start[:, None] + np.arange(count)].astype(np.int64))


def _named(groups: list[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Give groups of parts of one layer different names: ``conv``, ``conv#2``."""
    seen: Counter[str] = Counter()
    result = []
    for group in groups:
        seen[group.name] += 1
        count = seen[group.name]
        name = group.name if count == 1 else f"{group.name}#{count}"
        result.append(ChannelGroup(**{**group.__dict__, "name": name}))
    return tuple(result)
