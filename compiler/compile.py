"""From a PyTorch model, or an integer network, to a `Program`, `PartitionedProgram` or `DynamicProgram`."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, get_args

from torch import Tensor, nn

from algo.observers import Observer
from compiler.boundary import Progress, argument, own_tensors, turning
from compiler.dynamic import DynamicProgram
from compiler.fake_quantise import FakeQuantised
from compiler.host import HostPart, host_part
from compiler.lower import Lowered, assemble, draft
from compiler.mixed import check_patterns
from compiler.ops import QuantNetwork
from compiler.partition import HostStage, Partition, Segment, check_arch
from compiler.partitioned import PartitionedProgram
from compiler.program import ModelTensor, Program
from compiler.report import partition_rows
from compiler.schedule import ORDERS, Order
from compiler.steps import Constants
from compiler.variants import Host, Part, Variant, make_variant, make_variants, quantised
from hw.arch import Arch, get_arch

__all__ = ["Host", "Measure", "Progress", "compile_model", "compile_network", "compile_networks"]

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
    shapes = None
    if dynamic is None:
        report("trace", 0, 1)
        variant = make_variant(model, example_inputs, target, host, report)
        variants = [replace(variant, batches=[variant.example] if calibration is None else calibration)]
    else:
        shapes, variants = make_variants(model, example_inputs, dynamic, target, host, calibration, report)
    if calibration is None:
        warnings.warn(
            "no calibration data: scales are chosen from the example inputs alone, which costs accuracy",
            stacklevel=2,
        )
    programs = _compiled(variants, target, scales, options)
    if shapes is None:
        return programs[0]
    return DynamicProgram(
        shapes=shapes, variants=tuple((variant.sizes, made) for variant, made in zip(variants, programs, strict=True))
    )


def _compiled(
    variants: Sequence[Variant], target: Arch, scales: dict[str, Any], options: dict[str, Any]
) -> list[Program | PartitionedProgram]:
    """The program of each variant; constants, and the scales of what has one name, are common to all."""
    report = options["progress"]
    parts = [variant.parts(report) for variant in variants]
    if any(variant.found is not None for variant in variants):
        check_patterns([part.graph for those in parts for part in those], scales["bits16"])
    networks = quantised(variants, parts, scales, report)
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


def _compile_trained(model: FakeQuantised, target: Arch, **options: Any) -> Program:
    """The program of a fine-tuned model, with the grids that it was tuned for."""
    graph = model.graph()
    check_arch(graph, target)
    network = model.network()
    part = Part(graph=graph, batches=(), values=[], exported=model.exported, stage=None)
    return compile_network(network, target, inputs=part.inputs(network), outputs=part.outputs(network), **options)


def _partitioned(
    found: Partition, parts: Sequence[Part], programs: Sequence[Program], values: list[dict[str, Tensor]]
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
        stages += [turning(part.turned), program] if part.turned else [program]
    return PartitionedProgram(
        stages=tuple(stages),
        inputs=tuple(argument(node.name, node.meta["val"]) for node in exported.inputs),
        outputs=tuple(node.name for node in exported.outputs),
        rows=partition_rows(found),
        meta={f"range.{node.name}": _range(node.name, values) for node in exported.inputs if not _is_float(node)},
    )


def _is_float(node: Any) -> bool:
    return bool(node.meta["val"].is_floating_point())


def _range(name: str, values: list[dict[str, Tensor]]) -> str:
    """Smallest and largest value of an input in the calibration data."""
    low, high = zip(*(batch[name].aminmax() for batch in values))
    return f"{int(min(low))} {int(max(high))}"


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
    if measure is not None:
        for number, made in enumerate(drafts):
            if len(made.orders) > 1:
                cycles = [measure(program(number, order, 0, made.code_bytes(order))) for order in range(len(made.orders))]
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
        inputs=tuple(inputs) if inputs is not None else own_tensors(network, network.inputs),
        outputs=tuple(outputs) if outputs is not None else own_tensors(network, network.outputs),
        network=network,
        meta=dict(network.meta),
    )


def _silent(stage: str, done: int, total: int | None) -> None:
    """No progress wanted."""
