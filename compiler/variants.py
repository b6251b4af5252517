"""A network for one set of shapes or several: exported, divided and optimised for each, quantised for all together.

Each set of shapes is a trace of its own, so that what depends on them (sliced positions, causal masks, means, the module's own
Python) is what the module does there. What has one name and module in all of them has one scale.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from compiler.boundary import Progress, comes_as_heads, float_boundary, model_tensor, outside, segment_batches
from compiler.exported import Exported, export
from compiler.frontend import import_whole
from compiler.graph import CompileError, Graph
from compiler.network_io import share_arrays
from compiler.onnx_import import load_onnx, open_dimensions
from compiler.ops import QuantNetwork
from compiler.partition import Partition, Segment, describe_host, fitted, partition
from compiler.passes import PASSES, run_passes
from compiler.program import ModelTensor
from compiler.quantise import alike, quantise_together
from compiler.shapes import DynamicShapes, Sizes, argument_names, dynamic_shapes, input_shapes, resized, sizes_text
from hw.arch import Arch

__all__ = ["Host", "Part", "Variant", "make_variant", "make_variants", "quantised"]

Host = Literal["allow", "forbid"]
"""Whether what the accelerator cannot do may run on the host."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Variant:
    """A network for one set of shapes: its optimised graph, or its partition, and the calibration batches of these shapes."""

    sizes: Sizes
    example: Any
    exported: Exported
    graph: Graph
    found: Partition | None
    batches: Iterable[Any] = ()

    def parts(self, report: Progress | None = None) -> list[Part]:
        """What is quantised and lowered by itself."""
        if self.found is None:
            return [Part(graph=self.graph, batches=self.batches, values=[], exported=self.exported, stage=None)]
        values = float_boundary(self.found, self.batches, report)
        return [
            Part(graph=stage.graph, batches=segment_batches(stage, values), values=values, exported=self.exported, stage=stage)
            for stage in self.found.segments
        ]


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """A graph for one program; stage: of a partition, and values: what is at its boundary, batch by batch."""

    graph: Graph
    batches: Iterable[Any]
    values: list[dict[str, Tensor]]
    exported: Exported
    stage: Segment | None

    @property
    def turned(self) -> dict[str, Any]:
        """Inputs that come as heads and are needed as rows, by the graph's name."""
        stage = self.stage
        return {} if stage is None else {name: node for name, node in stage.inputs.items() if comes_as_heads(stage, name)}

    def inputs(self, network: QuantNetwork) -> list[ModelTensor]:
        if self.stage is None:
            return [model_tensor(self.graph, network, name) for name in network.inputs]
        return [
            model_tensor(self.graph, network, name, outside(self.stage, name) + (".rows" if name in self.turned else ""))
            for name in network.inputs
        ]

    def outputs(self, network: QuantNetwork) -> list[ModelTensor]:
        pairs = zip(self.exported.outputs, self.graph.outputs, strict=True) if self.stage is None else self.stage.outputs
        return [
            replace(
                model_tensor(self.graph, network, name, "" if self.stage is None else node.name),
                shape=tuple(node.meta["val"].shape),
            )
            for node, name in pairs
        ]


def make_variant(model: Any, example: Any, target: Arch, host: Host, report: Progress, sizes: Sizes | None = None) -> Variant:
    if isinstance(model, str | os.PathLike):
        model, example = load_onnx(model, example)
    exported = export(model, example)
    graph, found = _divided(exported, target, host, report)
    return Variant(sizes=sizes or {}, example=example, exported=exported, graph=graph, found=found)


def make_variants(
    model: Any, example: Any, dynamic: Any, target: Arch, host: Host, calibration: Iterable[Any] | None, report: Progress
) -> tuple[DynamicShapes, list[Variant]]:
    """The network for every combination of sizes, each with the calibration batches of its shapes."""
    if isinstance(model, str | os.PathLike):
        example, names, shapes = _open_shapes(model, example, dynamic)
    elif not isinstance(model, nn.Module) or example is None:
        raise TypeError(f"compile takes a torch.nn.Module and example_inputs, not {type(model).__name__} and {example!r:.40}")
    else:
        names = argument_names(model, example)
        shapes = dynamic_shapes(dynamic, names)
    combinations = list(shapes.combinations())
    batches = None if calibration is None else _sorted(calibration, shapes, combinations, names)
    own = shapes.sizes(input_shapes(example, names, "the network"), nearest=True)
    made: dict[int, Variant] = {}
    for number in sorted(range(len(combinations)), key=lambda number: len(combinations[number].items() - own.items())):
        sizes = combinations[number]  # the example's first, then one dimension at a time: a failure shows which is at fault
        report("trace", len(made), len(combinations))
        given = resized(example, names, shapes, sizes)
        try:
            variant = make_variant(model, given, target, host, report, sizes)
        except CompileError as error:
            raise CompileError(f"{_blamed(shapes, sizes, list(made.values()))}: {error}", error.problems) from error
        those = [_Batch(variant.example)] if batches is None else batches[number]
        made[number] = replace(variant, batches=[_checked(variant, batch) for batch in those])
    return shapes, [made[number] for number in range(len(combinations))]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Inputs, and what is wrong with their sizes."""

    inputs: Any
    problem: str = ""


def _sorted(
    calibration: Iterable[Any], shapes: DynamicShapes, combinations: Sequence[Sizes], names: Sequence[str]
) -> list[list[_Batch]]:
    """Calibration batches by combination of sizes; those of other sizes are with the nearest."""
    batches: list[list[_Batch]] = [[] for _ in combinations]
    for number, batch in enumerate(calibration, 1):
        where, problem = f"calibration batch {number}", ""
        try:
            given = input_shapes(batch, names, "the network")
            sizes = shapes.sizes(given, nearest=True)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        try:
            shapes.sizes(given)
        except ValueError as error:
            problem = f"{where}: {error}"
        batches[combinations.index(sizes)].append(_Batch(batch, problem))
    if not any(batches):
        raise ValueError("compiling needs at least one calibration batch")
    return batches


def _checked(variant: Variant, batch: _Batch) -> Any:
    """The inputs of a batch. Those of sizes that are not compiled serve if the graph takes them, as for a network of fixed
    shapes."""
    if batch.problem:
        try:
            if variant.found is not None:
                raise ValueError
            variant.graph.run(batch.inputs)
        except (RuntimeError, ValueError, IndexError):
            raise ValueError(f"{batch.problem}, and its operators depend on it") from None
    return batch.inputs


def _open_shapes(
    model: str | os.PathLike[str], example: Any, dynamic: Any
) -> tuple[dict[str, Tensor], list[str], DynamicShapes]:
    """Example inputs of an ONNX file whose open dimensions vary, their names, and the dimensions."""
    dims = open_dimensions(model)
    shapes = dynamic_shapes(dynamic, list(dims))
    for name, axis, dim in shapes.places:
        if axis not in dims[name]:
            raise CompileError(
                f"dimension {axis} of input {name!r} ({dim.name}) is fixed in {os.fspath(model)}, and its operators may rest on "
                "that: export the model with this dimension open"
            )
    sizes: dict[str, dict[int, int]] = {}
    for name, axis, dim in shapes.places:
        sizes.setdefault(name, {})[axis] = dim.values[0]
    return load_onnx(model, example, sizes=sizes)[1], list(dims), shapes


def _blamed(shapes: DynamicShapes, sizes: Sizes, made: Sequence[Variant]) -> str:
    """What of sizes that cannot be compiled is at fault: dimensions whose values have not been compiled before, else any."""
    new = [name for name, value in sizes.items() if all(variant.sizes[name] != value for variant in made)]
    found = {name: sizes[name] for name in new or sizes}
    return f"the network cannot have {sizes_text(found)} ({'; '.join(map(shapes.where, found))})"


def _divided(exported: Exported, target: Arch, host: Host, report: Progress) -> tuple[Graph, Partition | None]:
    """The optimised graph of a module that fits the accelerator as a whole; else its partition."""
    try:
        graph = import_whole(exported)
        for done, transformed in enumerate(run_passes(graph)):
            graph = transformed
            report("passes", done + 1, len(PASSES))
        return fitted(graph, target), None
    except CompileError as error:
        found, whole = partition(exported, target), error
    report("passes", len(PASSES), len(PASSES))
    for node in exported.outputs:
        if exported.constant(node) is not None:
            raise CompileError(f"output {node.name!r} does not depend on an input: leave it out of the module's results")
    if not found.segments:
        raise CompileError(f"nothing of the module is work for the accelerator: {whole}") from whole
    if host == "forbid":
        raise CompileError(_forbidden(found))
    return Graph({}, ()), found


def _forbidden(found: Partition, shown: int = 5) -> str:
    nodes = [node for node in found.host if node.target is not operator.getitem]
    lines = [describe_host(node, found.reasons[node.name]) for node in nodes[:shown]]
    more = [f"... and {len(nodes) - shown} more"] if len(nodes) > shown else []
    return "\n  ".join([
        'host="forbid", but the accelerator cannot do all of it: compile with host="allow", or take these operators out of '
        "the module and do them before or after it:", *lines, *more,
    ])  # fmt: skip


def quantised(
    variants: Sequence[Variant], parts: Sequence[Sequence[Part]], scales: dict[str, Any], report: Progress
) -> list[list[QuantNetwork]]:
    """The integer network of each part of each variant."""
    networks: list[list[QuantNetwork]] = [[] for _ in variants]
    for family in _families(parts):
        if len(variants) > 1 and not any(variants[i].batches for i in family):
            raise ValueError(
                f"no calibration batch has the shapes of {sizes_text(variants[family[0]].sizes)}, where the network has other "
                "operators than for the other shapes: give a batch of these"
            )
        for number, part in enumerate(parts[family[0]]):
            made = quantise_together(
                [(parts[i][number].graph, parts[i][number].batches) for i in family], wide=part.stage is not None, **scales,
                progress=None if part.stage is not None else lambda done, total: report("calibrate", done, total),
            )  # fmt: skip
            for i, network in zip(family, made, strict=True):
                networks[i].append(network)
    return networks if len(variants) == 1 else share_arrays(networks)


def _families(parts: Sequence[Sequence[Part]]) -> list[list[int]]:
    """Variants that have the same operators, so that they can have the same scales."""
    families: list[list[int]] = []
    for i, those in enumerate(parts):
        for family in families:
            others = parts[family[0]]
            same = [part.stage is None for part in those] == [part.stage is None for part in others]
            if same and all(alike(a.graph, b.graph) for a, b in zip(those, others, strict=True)):
                family.append(i)
                break
        else:
            families.append([i])
    return families
