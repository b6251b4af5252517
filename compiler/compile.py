"""From a PyTorch model, or an integer network, to a `Program` or `PartitionedProgram`."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from algo.observers import Observer
from compiler.exported import Exported, export, module_path, source_line
from compiler.fake_quantise import FakeQuantised
from compiler.frontend import by_rows, import_whole
from compiler.graph import CompileError, Fold, Graph, Unfold
from compiler.host import HostOp, HostPart, host_part
from compiler.lower import Lowered, lower
from compiler.mixed import check_patterns
from compiler.onnx_import import load_onnx
from compiler.ops import QuantNetwork
from compiler.partition import HostStage, Partition, Segment, check_arch, describe_host, partition
from compiler.partitioned import PartitionedProgram
from compiler.passes import PASSES, run_passes
from compiler.program import ModelTensor, Program
from compiler.quantise import quantise
from compiler.report import partition_rows
from compiler.scales import stored_name
from compiler.schedule import ORDERS, Order
from hw.arch import Arch, get_arch

__all__ = ["Host", "Measure", "Progress", "compile_model", "compile_network", "float_boundary"]

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
) -> Program | PartitionedProgram:
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
        of the `example_inputs`.
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
    Program or PartitionedProgram
        The latter if the host has a part. Its `inputs` and `outputs` are the model's own.

    Raises
    ------
    compiler.graph.CompileError
        An operator, dtype or shape that cannot be compiled, or, with ``host="forbid"``, not for the accelerator;
        names module path, source line, operator and shapes.
    TypeError, ValueError
        Not a module or no tensors; unknown arch; broken N:M pattern (names layer, row and group); bad
        options.
    """
    target, report = get_arch(arch), progress or _silent
    if isinstance(model, FakeQuantised):
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
    report("trace", 0, 1)
    if isinstance(model, str | os.PathLike):
        model, example_inputs = load_onnx(model, example_inputs)
    exported = export(model, example_inputs)
    graph, found = _divided(exported, target, host, report)
    if calibration is None:
        warnings.warn(
            "no calibration data: scales are chosen from the example inputs alone, which costs accuracy",
            stacklevel=2,
        )
        calibration = [example_inputs]
    if found is not None:
        return _compile_partition(found, target, calibration, scales, options)
    network = quantise(graph, calibration, progress=lambda done, total: report("calibrate", done, total), **scales)
    return _compile_whole(graph, network, exported, target, options)


def _compile_trained(model: FakeQuantised, target: Arch, **options: Any) -> Program:
    """The program of a fine-tuned model, with the grids that it was tuned for."""
    graph = model.graph()
    check_arch(graph, target)
    return _compile_whole(graph, model.network(), model.exported, target, options)


def _compile_whole(graph: Graph, network: QuantNetwork, exported: Exported, target: Arch, options: dict[str, Any]) -> Program:
    return compile_network(
        network,
        target,
        inputs=[_model_tensor(graph, network, name) for name in network.inputs],
        outputs=[
            replace(_model_tensor(graph, network, name), shape=tuple(node.meta["val"].shape))
            for name, node in zip(graph.outputs, exported.outputs, strict=True)
        ],
        **options,
    )


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


def _compile_partition(
    found: Partition, target: Arch, calibration: Iterable[Any], scales: dict[str, Any], options: dict[str, Any]
) -> PartitionedProgram:
    exported, report = found.exported, options["progress"]
    check_patterns([stage.graph for stage in found.segments], scales["bits16"])
    values = float_boundary(found, calibration, report)
    stages: list[HostPart | Program] = []
    for stage in found.stages:
        if isinstance(stage, HostStage):
            stages.append(_host(found, stage))
            continue
        network = quantise(stage.graph, _segment_batches(stage, values), wide=True, **scales)
        turned = {name: node for name, node in stage.inputs.items() if _by_rows(stage, name)}
        if turned:
            stages.append(_turning(turned))
        stages.append(compile_network(
            network, target, **options,
            inputs=[
                _model_tensor(stage.graph, network, name, _outside(stage, name) + (".rows" if name in turned else ""))
                for name in network.inputs
            ],
            outputs=[
                replace(_model_tensor(stage.graph, network, name, node.name), shape=tuple(node.meta["val"].shape))
                for node, name in stage.outputs
            ],
        ))  # fmt: skip
    program = PartitionedProgram(
        stages=tuple(stages),
        inputs=tuple(_argument(node.name, node.meta["val"]) for node in exported.inputs),
        outputs=tuple(node.name for node in exported.outputs),
        rows=partition_rows(found),
        meta={f"range.{node.name}": _range(node.name, values) for node in exported.inputs if not _is_float(node)},
    )  # fmt: skip
    warning = program.report().warning
    if warning:
        warnings.warn(warning, stacklevel=4)
    return program


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
    if not result:
        raise ValueError("compiling needs at least one calibration batch")
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
    target, report = get_arch(arch), progress or _silent
    report("lower", 0, 1)
    orders = ORDERS if measure is not None and order == "cost" else (order,)
    lowered = lower(network, target, pipeline_depth=pipeline_depth, reuse=reuse, orders=orders)
    programs = [_program(network, target, form, inputs, outputs) for form in lowered]
    report("lower", 1, 1)
    return programs[0] if measure is None or len(programs) == 1 else min(programs, key=measure)


def _program(
    network: QuantNetwork,
    target: Arch,
    lowered: Lowered,
    inputs: Sequence[ModelTensor] | None,
    outputs: Sequence[ModelTensor] | None,
) -> Program:
    return Program(
        arch=target,
        code=lowered.code,
        code_address=0,
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
