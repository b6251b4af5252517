"""From a PyTorch model, or an integer network, to a `Program`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import nn

from algo.quantize import Method
from compiler.frontend import trace
from compiler.graph import Graph
from compiler.lower import Lowered, lower
from compiler.ops import QuantNetwork
from compiler.passes import PASSES, run_passes
from compiler.program import ModelTensor, Program
from compiler.quantise import quantise
from compiler.schedule import ORDERS, Order
from hw.arch import Arch, get_arch

__all__ = ["Measure", "Progress", "compile_model", "compile_network"]

Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("trace", "passes", "calibrate", "lower"), how far it is, and its end if that is
known."""

Measure = Callable[[Program], int]
"""Cycles of a program."""


def compile_model(
    model: nn.Module,
    example_inputs: Any,
    *,
    arch: str | Arch = "sta1024",
    calibration: Iterable[Any] | None = None,
    observer: Method = "mse",
    residual_bits: Literal[8, 16] = 8,
    pipeline_depth: int = 1,
    reuse: bool = True,
    order: Order = "cost",
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> Program:
    """Compile a PyTorch model: trace, rewrite, quantise, lower.

    Parameters
    ----------
    model
        Any `nn.Module` of supported operators; layers in sparse training count with their masked weights.
    example_inputs
        A tensor, a tuple of positional arguments or a dict of keyword arguments; they fix the shapes of the
        program.
    arch
        Preset name or `Arch`.
    calibration
        Batches like `example_inputs` (other batch sizes and lengths are fine), from which scales are chosen.
        Without it the `example_inputs` serve, with a warning.
    observer, residual_bits
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
    Program
        Its `inputs` and `outputs` are the model's own.

    Raises
    ------
    compiler.graph.CompileError
        An operator, dtype or shape that cannot be compiled; names module path, operator and shapes.
    TypeError, ValueError
        Not a module or no tensors; unknown arch; broken N:M pattern (names layer, row and group); bad
        options.
    """
    target, report = get_arch(arch), progress or _silent
    report("trace", 0, 1)
    graph = trace(model, example_inputs)
    for done, transformed in enumerate(run_passes(graph)):
        graph = transformed
        report("passes", done + 1, len(PASSES))
    if calibration is None:
        warnings.warn(
            "no calibration data: scales are chosen from the example inputs alone, which costs accuracy",
            stacklevel=2,
        )
        calibration = [example_inputs]
    network = quantise(
        graph,
        calibration,
        activation_observer=observer,
        residual_bits=residual_bits,
        progress=lambda done, total: report("calibrate", done, total),
    )
    return compile_network(
        network,
        target,
        pipeline_depth=pipeline_depth,
        reuse=reuse,
        order=order,
        measure=measure,
        progress=report,
        inputs=[_model_tensor(graph, network, name) for name in network.inputs],
        outputs=[_model_tensor(graph, network, name) for name in network.outputs],
    )


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


def _model_tensor(graph: Graph, network: QuantNetwork, name: str) -> ModelTensor:
    """An input or output as the model has it: data are float32, masks have the dtype of the example."""
    node, tensor = graph.nodes[name], network.tensors[name]
    return ModelTensor(
        name=name,
        tensor=name,
        shape=tuple(node.shape),
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
