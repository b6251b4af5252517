"""Run a partitioned program: programs on an engine, host parts in torch, one after the other."""

import time
from collections.abc import Callable
from typing import Any

import torch

from compiler.host import HostPart
from compiler.partitioned import PartitionedProgram
from compiler.program import ModelTensor, Program

__all__ = ["bind_inputs", "run_stages"]


def run_stages(
    program: PartitionedProgram, inputs: Any, run: Callable[[int, Program, dict[str, Any]], tuple[Any, ...]]
) -> tuple[tuple[torch.Tensor, ...], float]:
    """The outputs, and the seconds that the host parts took.

    Parameters
    ----------
    inputs
        The model's: a tensor, tensors in order, or a dict by name.
    run
        Called with each program's stage and inputs by name; gives its outputs in order.

    Raises
    ------
    ValueError
        Wrong number, names, shapes or dtypes of inputs; a host operator fails.
    """
    values: dict[str, Any] = bind_inputs(program.inputs, inputs)
    seconds = 0.0
    for number, stage in enumerate(program.stages):
        if isinstance(stage, HostPart):
            start = time.monotonic()
            values |= stage.run(values)
            seconds += time.monotonic() - start
        else:
            made = run(number, stage, {spec.name: values[spec.name] for spec in stage.inputs})
            values |= {spec.name: value for spec, value in zip(stage.outputs, made, strict=True)}
    return tuple(values[name] for name in program.outputs), seconds


def bind_inputs(specs: tuple[ModelTensor, ...], inputs: Any) -> dict[str, torch.Tensor]:
    """Tensors by name, checked."""
    names = [spec.name for spec in specs]
    if isinstance(inputs, dict):
        if set(inputs) != set(names):
            raise ValueError(f"the program's inputs are {', '.join(names)}, not {', '.join(map(str, inputs)) or 'none'}")
        given = inputs
    else:
        values = [inputs] if hasattr(inputs, "dtype") else list(inputs)
        if len(values) != len(specs):
            raise ValueError(f"the program takes {len(specs)} inputs ({', '.join(names)}), not {len(values)}")
        given = dict(zip(names, values, strict=True))
    result = {}
    for spec in specs:
        value = torch.as_tensor(given[spec.name])
        if str(value.dtype) != spec.dtype or tuple(value.shape) != spec.shape:
            found = f"{value.dtype} {tuple(value.shape)}"
            raise ValueError(f"input {spec.name!r} must be {spec.dtype} {spec.shape}, not {found}".replace("torch.", ""))
        result[spec.name] = value
    return result
