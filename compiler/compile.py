"""From a PyTorch model, or an integer network, to a `Program`, `PartitionedProgram` or `DynamicProgram`."""

from __future__ import annotations

import itertools
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

from torch import Tensor, nn

from algo.observers import Observer
from compiler.dynamic import DynamicProgram
from compiler.exported import Exported, export, module_path, source_line
from compiler.fake_quantise import FakeQuantised
from compiler.frontend import by_rows, import_whole
from compiler.graph import CompileError, Fold, Graph, Unfold
from compiler.host import HostOp, HostPart, host_part
from compiler.lower import Lowered, assemble, draft
from compiler.mixed import check_patterns
from compiler.network_io import share_arrays
from compiler.onnx_import import load_onnx, open_dimensions
from compiler.ops import QuantNetwork
from compiler.partition import HostStage, Partition, Segment, check_arch, describe_host, partition
from compiler.partitioned import PartitionedProgram
from compiler.passes import PASSES, run_passes
from compiler.program import ModelTensor, Program
from compiler.quantise import alike, quantise_together
from compiler.report import partition_rows
from compiler.scales import stored_name
from compiler.schedule import ORDERS, Order
from compiler.shapes import DynamicShapes, Sizes, argument_names, dynamic_shapes, input_shapes, resized, sizes_text
from compiler.steps import Constants
from hw.arch import Arch, get_arch

__all__ = ["Host", "Measure", "Progress", "compile_model", "compile_network", "compile_networks", "float_boundary"]

Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("trace", "passes", "calibrate", "lower"), how far it is, and its end if that is
known."""

Host = Literal["allow", "forbid"]
"""Whether what the accelerator cannot do may run on the host."""

Measure = Callable[[Program], int]
"""Cycles of a program."""


def compile_model(
    model: nn.Module | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    arch: str | Arch = "sta1024",
    calibration: Iterable[Any] | None = None,
    dynamic: Any = None,
    host: Host = "allow",
    observer: str | Callable[[], Observer] = "mse",
    residual_bits: Literal[8, 16] = 8,
    bits16: str | Sequence[str] = (),
    smooth: float | None = None,
    bias_correction: bool = True,
    pipeline_depth: int = 1,
    reuse: bool = True,
    order: Order = "cost",
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> Program | PartitionedProgram | DynamicProgram:
    """Compile a PyTorch model: trace, partition, rewrite, quantise, lower.

    Parameters
    ----------
    model
        Any `nn.Module` that `torch.export` takes, or the path of an ONNX file; layers in sparse training count
        with their masked weights. A `FakeQuantised` brings its example inputs, calibration and options of quantisation with it.
    example_inputs
        A tensor, a tuple of positional arguments or a dict of keyword arguments; they fix the shapes of the
        program. An ONNX file without open dimensions needs none.
    arch
        Preset name or `Arch`.
    calibration
        Batches like `example_inputs` (other batch sizes and lengths are fine), from which scales are chosen.
        Without it the `example_inputs` serve, with a warning. Where a part runs on the host, they need the shapes
        of the `example_inputs`, but for what is ``dynamic``.
    dynamic
        Dimensions of inputs that vary, and what they may be: ``{"tokens": {0: (1, 8), 1: (16, 32, 64)}}`` by input, or a
        sequence in the order of the inputs; a `compiler.shapes.Dim` in several places is one number. Each combination is
        compiled; weights and scales are common to all. Calibration batches may have any of these shapes.
    host
        "allow": what the accelerator cannot do runs on the host as torch operators, with a warning if that is more
        work than the accelerator saves. "forbid": it is an error.
    observer, residual_bits, bits16, smooth, bias_correction
        See `compiler.quantise.quantise`.
    pipeline_depth, reuse, order
        See `compiler.lower.lower`.
    measure
        With ``order="cost"``, lower in every order and keep the program for which this is least, instead of the one that a
        coarse model prefers.
    progress
        Called as the stages go on.

    Returns
    -------
    Program, PartitionedProgram or DynamicProgram
        The second if the host has a part, the last if something is ``dynamic``. `inputs` and `outputs` are the model's own.

    Raises
    ------
    compiler.graph.CompileError
        An operator, dtype or shape that cannot be compiled, or, with ``host="forbid"``, not for the accelerator;
        names module path, source line, operator and shapes.
    TypeError, ValueError
        Not a module or no tensors; unknown arch; broken N:M pattern (names layer, row and group); bad
        options; a calibration batch of a shape that is not compiled.
    """
    target, report = get_arch(arch), progress or _silent
    if isinstance(model, FakeQuantised):
        if dynamic is not None:
            raise ValueError("a FakeQuantised was tuned for the shapes of its example_inputs: compile it without dynamic=")
        return _compile_trained(model, target, pipeline_depth=pipeline_depth, reuse=reuse, order=order, measure=measure,
                                progress=report)
    if host not in get_args(Host):
        raise ValueError(f"host must be one of {', '.join(get_args(Host))}, not {host!r}")
    options: dict[str, Any] = {
        "pipeline_depth": pipeline_depth, "reuse": reuse, "order": order, "measure": measure, "progress": report,
    }  # fmt: skip
    scales: dict[str, Any] = {
        "observer": observer, "residual_bits": residual_bits, "bits16": bits16, "smooth": smooth,
        "bias_correction": bias_correction,
    }  # fmt: skip
    if calibration is None:
        warnings.warn(
            "no calibration data: scales are chosen from the example inputs alone, which costs accuracy",
            stacklevel=2,
        )
    if dynamic is not None:
        shapes, variants = _variants(model, example_inputs, dynamic, target, host, calibration, report)
        programs = _compiled(variants, target, scales, options)
        return DynamicProgram(
            shapes=shapes, variants=tuple((variant.sizes, made) for variant, made in zip(variants, programs, strict=True))
        )
    report("trace", 0, 1)
    variant = _variant(model, example_inputs, target, host, report)
    batches = [variant.example] if calibration is None else calibration
    (program,) = _compiled([replace(variant, batches=batches)], target, scales, options)
    return program


@dataclass(frozen=True, eq=False, kw_only=True)
class _Variant:
    """A network for one set of shapes: its optimised graph, or its partition, and the calibration batches of these shapes."""

    sizes: Sizes
    example: Any
    exported: Exported
    graph: Graph
    found: Partition | None
    batches: Iterable[Any] = ()

    def parts(self, report: Progress | None = None) -> list[_Part]:
        """What is quantised and lowered by itself."""
        if self.found is None:
            return [_Part(graph=self.graph, batches=self.batches, values=[], exported=self.exported, stage=None)]
        values = float_boundary(self.found, self.batches, report)
        return [
            _Part(graph=stage.graph, batches=_segment_batches(stage, values), values=values, exported=self.exported, stage=stage)
            for stage in self.found.segments
        ]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Part:
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
        return {} if stage is None else {name: node for name, node in stage.inputs.items() if _by_rows(stage, name)}

    def inputs(self, network: QuantNetwork) -> list[ModelTensor]:
        if self.stage is None:
            return [_model_tensor(self.graph, network, name) for name in network.inputs]
        return [
            _model_tensor(self.graph, network, name, _outside(self.stage, name) + (".rows" if name in self.turned else ""))
            for name in network.inputs
        ]

    def outputs(self, network: QuantNetwork) -> list[ModelTensor]:
        pairs = zip(self.exported.outputs, self.graph.outputs, strict=True) if self.stage is None else self.stage.outputs
        return [
            replace(
                _model_tensor(self.graph, network, name, "" if self.stage is None else node.name),
                shape=tuple(node.meta["val"].shape),
            )
            for node, name in pairs
        ]


def _variant(model: Any, example: Any, target: Arch, host: Host, report: Progress, sizes: Sizes | None = None) -> _Variant:
    if isinstance(model, str | os.PathLike):
        model, example = load_onnx(model, example)
    exported = export(model, example)
    graph, found = _divided(exported, target, host, report)
    return _Variant(sizes=sizes or {}, example=example, exported=exported, graph=graph, found=found)


def _variants(
    model: Any, example: Any, dynamic: Any, target: Arch, host: Host, calibration: Iterable[Any] | None, report: Progress
) -> tuple[DynamicShapes, list[_Variant]]:
    """The network for every combination of sizes, each with the calibration batches of its shapes."""
    if isinstance(model, str | os.PathLike):
        example, names, shapes = _open_shapes(model, example, dynamic)
    elif not isinstance(model, nn.Module) or example is None:
        raise TypeError(f"compile takes a torch.nn.Module and example_inputs, not {type(model).__name__} and {example!r:.40}")
    else:
        names = argument_names(model, example)
        shapes = dynamic_shapes(dynamic, names)
    combinations = list(shapes.combinations())
    batches: list[list[Any]] = [[] for _ in combinations]
    for number, batch in enumerate(calibration or (), 1):
        try:
            sizes = shapes.sizes(input_shapes(batch, names, "the network"))
        except ValueError as error:
            raise ValueError(f"calibration batch {number}: {error}") from None
        batches[combinations.index(sizes)].append(batch)
    if calibration is not None and not any(batches):
        raise ValueError("compiling needs at least one calibration batch")
    made: list[_Variant] = []
    for number, (sizes, those) in enumerate(zip(combinations, batches, strict=True)):
        report("trace", number, len(combinations))
        given = resized(example, names, shapes, sizes)
        try:
            variant = _variant(model, given, target, host, report, sizes)
        except CompileError as error:
            raise CompileError(f"{_blamed(shapes, sizes, made)}: {error}", error.problems) from error
        made.append(replace(variant, batches=those if calibration is not None else [variant.example]))
    return shapes, made


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


def _blamed(shapes: DynamicShapes, sizes: Sizes, made: Sequence[_Variant]) -> str:
    """What of sizes that cannot be compiled is at fault: dimensions whose values have not been compiled before, else any."""
    new = [name for name, value in sizes.items() if all(variant.sizes[name] != value for variant in made)]
    found = {name: sizes[name] for name in new or sizes}
    return f"the network cannot have {sizes_text(found)} ({'; '.join(map(shapes.where, found))})"


def _compiled(
    variants: Sequence[_Variant], target: Arch, scales: dict[str, Any], options: dict[str, Any]
) -> list[Program | PartitionedProgram]:
    """The program of each variant; constants, and the scales of what has one name, are common to all."""
    report = options["progress"]
    parts = [variant.parts(report) for variant in variants]
    if any(variant.found is not None for variant in variants):
        check_patterns([part.graph for those in parts for part in those], scales["bits16"])
    networks = _quantised(variants, parts, scales, report)
    programs: list[list[Program]] = [[] for _ in variants]
    for number in range(max(map(len, parts))):
        having = [i for i, those in enumerate(parts) if len(those) > number]
        made = compile_networks(
            [networks[i][number] for i in having], target, **options,
            inputs=[parts[i][number].inputs(networks[i][number]) for i in having],
            outputs=[parts[i][number].outputs(networks[i][number]) for i in having],
        )  # fmt: skip
        for i, program in zip(having, made, strict=True):
            programs[i].append(program)
    values = [batch for those in parts for batch in those[0].values]
    results = [
        made[0] if variant.found is None else _partitioned(variant.found, those, made, values)
        for variant, those, made in zip(variants, parts, programs, strict=True)
    ]
    if isinstance(results[-1], PartitionedProgram) and (warning := results[-1].report().warning):
        warnings.warn(warning, stacklevel=4)
    return results


def _quantised(
    variants: Sequence[_Variant], parts: Sequence[Sequence[_Part]], scales: dict[str, Any], report: Progress
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


def _families(parts: Sequence[Sequence[_Part]]) -> list[list[int]]:
    """Variants that have the same operators, so that they can have the same scales."""
    families: list[list[int]] = []
    for i, those in enumerate(parts):
        for family in families:
            others = parts[family[0]]
            if len(those) == len(others) and all(alike(a.graph, b.graph) for a, b in zip(those, others, strict=True)):
                family.append(i)
                break
        else:
            families.append([i])
    return families


def _compile_trained(model: FakeQuantised, target: Arch, **options: Any) -> Program:
    """The program of a fine-tuned model, with the grids that it was tuned for."""
    graph = model.graph()
    check_arch(graph, target)
    network = model.network()
    part = _Part(graph=graph, batches=(), values=[], exported=model.exported, stage=None)
    return compile_network(network, target, inputs=part.inputs(network), outputs=part.outputs(network), **options)


def _divided(exported: Exported, target: Arch, host: Host, report: Progress) -> tuple[Graph, Partition | None]:
    """The optimised graph of a module that fits the accelerator as a whole; else its partition."""
    try:
        graph = import_whole(exported)
        for done, transformed in enumerate(run_passes(graph)):
            graph = transformed
            report("passes", done + 1, len(PASSES))
        check_arch(graph, target)
        return graph, None
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


def _partitioned(
    found: Partition, parts: Sequence[_Part], programs: Sequence[Program], values: list[dict[str, Tensor]]
) -> PartitionedProgram:
    """Host parts and programs in order; values: of all calibration batches."""
    exported = found.exported
    stages: list[HostPart | Program] = []
    work = iter(zip(parts, programs, strict=True))
    for stage in found.stages:
        if isinstance(stage, HostStage):
            stages.append(_host(found, stage))
            continue
        part, program = next(work)
        stages += [_turning(part.turned), program] if part.turned else [program]
    return PartitionedProgram(
        stages=tuple(stages),
        inputs=tuple(_argument(node.name, node.meta["val"]) for node in exported.inputs),
        outputs=tuple(node.name for node in exported.outputs),
        rows=partition_rows(found),
        meta={f"range.{node.name}": _range(node.name, values) for node in exported.inputs if not _is_float(node)},
    )


def _outside(stage: Segment, name: str) -> str:
    """The exported node that a network's input stands for."""
    node = stage.graph.nodes[name]
    return stage.inputs[node.inputs[0] if isinstance(node, Unfold) else name].name


def _is_float(node: Any) -> bool:
    return bool(node.meta["val"].is_floating_point())


def _range(name: str, values: list[dict[str, Tensor]]) -> str:
    """Smallest and largest value of an input in the calibration data."""
    low, high = zip(*(batch[name].aminmax() for batch in values))
    return f"{int(min(low))} {int(max(high))}"


def _argument(name: str, value: Tensor) -> ModelTensor:
    return ModelTensor(name=name, tensor=name, shape=tuple(value.shape), dtype=str(value.dtype), scale=1.0)


def _host(found: Partition, stage: HostStage) -> HostPart:
    """A host stage: its inputs from outside it, and as outputs what others or the caller read."""
    inside = set(stage.nodes)
    read = {item for other in found.stages if other is not stage for item in _read_by(other)} | set(found.exported.outputs)
    below = dict.fromkeys(item for node in stage.nodes for item in node.all_input_nodes if item not in inside)
    inputs = [node for node in below if found.exported.constant(node) is None]
    return host_part(found.exported, stage.nodes, inputs, [node for node in stage.nodes if node in read])


def _read_by(stage: HostStage | Segment) -> list[Any]:
    if isinstance(stage, Segment):
        return list(stage.inputs.values())
    return [item for node in stage.nodes for item in node.all_input_nodes]


def float_boundary(found: Partition, batches: Iterable[Any], report: Progress | None = None) -> list[dict[str, Tensor]]:
    """What goes to the accelerator in float, by exported name, for each batch of the module's inputs."""
    exported = found.exported
    needed = {node for stage in found.segments for node in stage.inputs.values()}
    wanted = {node.name for node in needed} | {node.name for node in exported.inputs}
    for node in reversed(exported.operators):
        if node in needed:
            needed.update(node.all_input_nodes)
    live = [node for node in exported.operators if node in needed and exported.constant(node) is None]
    whole = host_part(exported, live, exported.inputs, [])
    result = []
    for done, batch in enumerate(batches, 1):
        seen: dict[str, Tensor] = {}

        def observe(name: str, value: Any, seen: dict[str, Tensor] = seen) -> None:
            if name in wanted:
                seen[name] = value

        inputs = exported.bind(batch)
        whole.run(inputs, observe=observe)
        result.append({**{name: value for name, value in inputs.items() if name in wanted}, **seen})
        if report is not None:
            report("calibrate", done, None)
    return result


def _segment_batches(stage: Segment, values: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {
            name: by_rows(batch[node.name]) if _by_rows(stage, name) else batch[node.name]
            for name, node in stage.inputs.items()
        }
        for batch in values
    ]


def _by_rows(stage: Segment, name: str) -> bool:
    """Whether a graph's input is an exported tensor of heads, turned."""
    node = stage.graph.nodes[name]
    return (getattr(node, "given", None) or node.shape) != tuple(stage.inputs[name].meta["val"].shape)


def _turning(turned: Mapping[str, Any]) -> HostPart:
    """A host part that turns heads into rows."""
    ops = []
    for node in turned.values():
        name, reference = node.name, {"ref": node.name}
        common: dict[str, Any] = {"kwargs": {}, "source": module_path(node), "line": source_line(node)}
        ops += [
            HostOp(name=f"{name}.turned", target="aten.transpose.int", args=[reference, 1, 2], **common),
            HostOp(name=f"{name}.rows", target="aten.flatten.using_ints", args=[{"ref": f"{name}.turned"}, 2], **common),
        ]
    names = [node.name for node in turned.values()]
    return HostPart(ops=tuple(ops), constants={}, inputs=tuple(names), outputs=tuple(f"{name}.rows" for name in names))


def compile_network(
    network: QuantNetwork,
    arch: str | Arch = "sta1024",
    *,
    pipeline_depth: int = 1,
    reuse: bool = True,
    order: Order = "cost",
    measure: Measure | None = None,
    inputs: Sequence[ModelTensor] | None = None,
    outputs: Sequence[ModelTensor] | None = None,
    progress: Progress | None = None,
) -> Program:
    """Back end only: lower an integer network.

    Parameters
    ----------
    network
        See `compiler.ops`.
    arch
        Preset name or `Arch`.
    pipeline_depth, reuse, order
        See `compiler.lower.lower`. ``reuse=False`` keeps every tensor in memory to the end of the run.
    measure
        See `compile_model`.
    inputs, outputs
        What the user's model calls its inputs and outputs; by default the network's own tensors.
    progress
        Called with the stage "lower".

    Raises
    ------
    LoweringError, PatternError, PlanError
        See `compiler.lower.lower`.
    """
    (program,) = compile_networks(
        [network], arch, pipeline_depth=pipeline_depth, reuse=reuse, order=order, measure=measure,
        inputs=None if inputs is None else [inputs], outputs=None if outputs is None else [outputs], progress=progress,
    )  # fmt: skip
    return program


def compile_networks(
    networks: Sequence[QuantNetwork],
    arch: str | Arch = "sta1024",
    *,
    pipeline_depth: int = 1,
    reuse: bool = True,
    order: Order = "cost",
    measure: Measure | None = None,
    inputs: Sequence[Sequence[ModelTensor]] | None = None,
    outputs: Sequence[Sequence[ModelTensor]] | None = None,
    progress: Progress | None = None,
) -> list[Program]:
    """`compile_network` several networks for one memory: equal constants lie there once, for all, behind the code of each."""
    target, report = get_arch(arch), progress or _silent
    orders = ORDERS if measure is not None and order == "cost" else (order,)
    constants, drafts = Constants(target), []
    for done, network in enumerate(networks):
        report("lower", done, len(networks))
        drafts.append(draft(network, target, constants, pipeline_depth=pipeline_depth, orders=orders))
    image = constants.image

    @cache
    def program(number: int, order: int, code_address: int, constants_address: int) -> Program:
        lowered = assemble(drafts[number], order, constants=image, constants_address=constants_address, reuse=reuse)
        return _program(
            networks[number], target, lowered, code_address,
            None if inputs is None else inputs[number], None if outputs is None else outputs[number],
        )  # fmt: skip

    best = [0] * len(networks)
    if measure is not None and len(orders) > 1:
        for number, made in enumerate(drafts):
            cycles = [measure(program(number, order, 0, made.code_bytes(order))) for order in range(len(orders))]
            best[number] = cycles.index(min(cycles))
    starts = [0, *itertools.accumulate(made.code_bytes(order) for made, order in zip(drafts, best, strict=True))]
    result = [program(number, order, starts[number], starts[-1]) for number, order in enumerate(best)]
    report("lower", len(networks), len(networks))
    return result


def _program(
    network: QuantNetwork,
    target: Arch,
    lowered: Lowered,
    code_address: int,
    inputs: Sequence[ModelTensor] | None,
    outputs: Sequence[ModelTensor] | None,
) -> Program:
    return Program(
        arch=target,
        code=lowered.code,
        code_address=code_address,
        constants=lowered.constants,
        constants_address=lowered.constants_address,
        memory_bytes=lowered.memory_bytes,
        tensors=lowered.tensors,
        operators=lowered.operators,
        masks=lowered.masks,
        inputs=tuple(inputs) if inputs is not None else _own_tensors(network, network.inputs),
        outputs=tuple(outputs) if outputs is not None else _own_tensors(network, network.outputs),
        network=network,
        meta=dict(network.meta),
    )


def _silent(stage: str, done: int, total: int | None) -> None:
    """No progress wanted."""


def _model_tensor(graph: Graph, network: QuantNetwork, name: str, outside: str = "") -> ModelTensor:
    """An input or output as the model has it, by the name that it has outside: data are float32, masks have the dtype of
    the example."""
    node, tensor = graph.nodes[name], network.tensors[stored_name(graph, name)]
    image: tuple[int, ...] | None = None
    if isinstance(node, Unfold):
        image = (*node.out_size, *node.kernel, *node.stride, *node.padding, *node.dilation)
        node = graph.nodes[node.inputs[0]]
    elif isinstance(node, Fold):
        image = node.size
    return ModelTensor(
        name=outside or node.name,
        tensor=tensor.name,
        image=image,
        shape=tuple(getattr(node, "given", None) or node.shape),
        dtype=str(getattr(node, "dtype", "torch.float32")),
        scale=tensor.scale,
        kind="keymask" if tensor.dtype == "keymask" else "activation",
        inverted=tensor.dtype == "keymask" and network.meta.get(f"keep.{name}") == "0",
    )


def _own_tensors(network: QuantNetwork, names: Sequence[str]) -> tuple[ModelTensor, ...]:
    """The network's integer tensors themselves as the model's."""
    tensors = [network.tensors[name] for name in names]
    return tuple(
        ModelTensor(
            name=tensor.name,
            tensor=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            scale=float(tensor.scale),
            kind="keymask" if tensor.dtype == "keymask" else "activation",
        )
        for tensor in tensors
    )
