"""Per-layer comparison of float and integer arithmetic: which layers lose accuracy."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compiler.boundary import float_boundary
from compiler.calibrate import unmasked
from compiler.dynamic import DynamicProgram
from compiler.exported import Exported, export
from compiler.frontend import by_rows, import_whole
from compiler.graph import Fixed, Graph, Input, KeyMask
from compiler.partition import partition
from compiler.partitioned import PartitionedProgram
from compiler.passes import optimise
from compiler.program import Program
from sim import plots
from sim.model_io import dequantise_outputs, quantise_inputs
from sim.partitioned import run_stages
from sim.reference import dequantise, run_reference

__all__ = ["Comparison", "Layer", "compare"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One tensor of the network, in float and in integers.

    Members
    -------
    name, source, operator
        Of the fused operator that made it.
    sqnr
        Signal to quantisation noise, dB: ``10 log10(sum x^2 / sum (x - y)^2)``; inf where they are equal.
    cosine
        Of the two tensors as vectors; 1 where both are 0.
    error
        Largest difference, as a part of the largest float magnitude.
    """

    name: str
    source: str
    operator: str
    sqnr: float
    cosine: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """All layers in execution order; ``str(comparison)`` is a table that marks the worst."""

    layers: tuple[Layer, ...]

    def worst(self, count: int = 5) -> tuple[Layer, ...]:
        """Layers with the least SQNR, worst first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.sqnr)[:count])

    def plot(self, path: str | Path, *, count: int = 5) -> None:
        """Write the SQNR of every layer as a bar plot, SVG or PNG by the file's suffix; the ``count`` worst are named.

        Raises
        ------
        ValueError
            Another suffix.
        """
        file = Path(path)
        if file.suffix not in (".svg", ".png"):
            raise ValueError(f"a plot is written to .svg or .png, not to {file.name!r}")
        values = [max(min(layer.sqnr, 100.0), -100.0) for layer in self.layers]
        place = {id(layer): number for number, layer in enumerate(self.layers)}
        names = {place[id(layer)]: f"{layer.source or layer.name} ({layer.operator})" for layer in self.worst(count)}
        figure = plots.profile(values, names, label="signal to quantisation noise, dB")
        if file.suffix == ".png":
            file.write_bytes(plots.to_png(figure))
        else:
            file.write_text(plots.to_svg(figure), encoding="utf-8")

    def __str__(self) -> str:
        worst = {layer.name for layer in self.worst()}
        width = max(len(layer.source or layer.name) for layer in self.layers)
        lines = [f"{'layer':{width}}  {'operator':10}  {'SQNR/dB':>8}  {'cosine':>8}  {'error':>7}"]
        lines += [
            f"{layer.source or layer.name:{width}}  {layer.operator:10}  {layer.sqnr:8.2f}  {layer.cosine:8.5f}  "
            f"{layer.error:7.4f}{'  <- worst' if layer.name in worst else ''}"
            for layer in self.layers
        ]
        return "\n".join(lines)


@torch.no_grad()
def compare(program: Program | PartitionedProgram | DynamicProgram, model: nn.Module, inputs: Any) -> Comparison:
    """Run a model in float and its program in integers (by the reference), and compare every layer.

    Errors add up along the network, as they do in use. Layers of the host are not listed: they add none of their own. Rows of
    tokens that a padding mask leaves out do not count, as in calibration.

    Parameters
    ----------
    program
        What `compile_model` made of the model.
    model
        The same weights.
    inputs
        As for the model: a tensor, tensors in order, or a dict by name, of the shapes of the program.

    Raises
    ------
    ValueError
        A model that is not the program's, or inputs of another shape.
    """
    if isinstance(program, DynamicProgram):
        program = program.for_inputs(inputs)
    exported = export(model, inputs)
    layers = [layer for part in _parts(program, exported, inputs) for layer in _layers(*part)]
    if not layers:
        raise ValueError("the program has no operator of the model's graph: it was compiled from another model")
    return Comparison(tuple(layers))


Part = tuple[Graph, Program, dict[str, Tensor], Any]


def _parts(program: Program | PartitionedProgram, exported: Exported, inputs: Any) -> Iterator[Part]:
    """Graph, program, float inputs of the graph and inputs of the program, for each part of the accelerator."""
    values = exported.bind(inputs)
    if isinstance(program, Program):
        yield optimise(import_whole(exported)), program, values, values
        return
    found = partition(exported, program.arch)
    if len(found.segments) != len(program.programs):
        raise ValueError(f"the program has {len(program.programs)} parts, the model {len(found.segments)}: it is another one")
    taken: list[dict[str, Any]] = []

    def run(number: int, part: Program, given: dict[str, Any]) -> tuple[Any, ...]:
        taken.append(given)
        wanted = set(part.network.outputs)
        return dequantise_outputs(part, run_reference(part.network, quantise_inputs(part, given), keep=wanted.__contains__))

    run_stages(program, values, run)
    (boundary,) = float_boundary(found, [values])
    for segment, part, given in zip(found.segments, program.programs, taken, strict=True):
        floats = {}
        for name, node in segment.inputs.items():
            value, shape = boundary[node.name], segment.graph.nodes[name].shape
            floats[name] = value if tuple(value.shape) == shape else by_rows(value)
        yield segment.graph, part, floats, given


def _layers(graph: Graph, program: Program, floats: Mapping[str, Tensor], given: Any) -> Iterator[Layer]:
    network = program.network
    integers = run_reference(network, quantise_inputs(program, given))
    seen: dict[str, Tensor] = {}
    graph.run(dict(floats), observe=lambda node, operands, value: seen.__setitem__(node.name, value))
    rows = unmasked(graph, graph.bind(dict(floats)))
    for node in graph.nodes.values():
        if isinstance(node, Input | KeyMask | Fixed) or node.name not in network.tensors:
            continue
        got = dequantise(network, node.name, integers[node.name]).reshape(seen[node.name].shape)
        wanted = rows(seen[node.name])
        yield _layer(node.name, node.source, node.operator, wanted.double().numpy(), rows(got).double().numpy())


def _layer(name: str, source: str, operator: str, wanted: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> Layer:
    noise, signal = float(((wanted - got) ** 2).sum()), float((wanted**2).sum())
    norms = float(np.linalg.norm(wanted) * np.linalg.norm(got))
    with np.errstate(divide="ignore"):
        sqnr = float(10 * np.log10(signal / noise)) if noise and signal else (-np.inf if noise else np.inf)
    return Layer(
        name=name, source=source, operator=operator, sqnr=sqnr,
        cosine=float((wanted * got).sum()) / norms if norms else float(not noise),
        error=float(np.abs(wanted - got).max()) / max(float(np.abs(wanted).max()), 1e-30),
    )  # fmt: skip
