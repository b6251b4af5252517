"""`nmforge simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np

from compiler.listing import bound_of
from compiler.program import Program, load
from nmforge.console import progress_bars, reporter
from nmforge.errors import unknown
from nmforge.inputs import check_outputs, random_inputs, read_inputs, write_outputs
from sim.memory import MemoryModel
from sim.simulate import Engine, Run, simulate
from sim.trace import Trace

__all__ = ["run_program"]

_LABELS = {"reference": "integer reference", "isa": "ISA engine, instructions", "verilator": "RTL, cycles"}


def run_program(
    file: Path,
    *,
    engine: str,
    inputs: Path | None,
    outputs: Path | None,
    check: bool,
    memory: MemoryModel,
    trace: Trace | None,
    seed: int,
) -> tuple[Program, Run]:
    """Load a program, run it on inputs from a file or a seed, and write its outputs."""
    if engine not in get_args(Engine):
        raise unknown("engine", engine, get_args(Engine))
    if outputs is not None:
        check_outputs(outputs)
    program = load(file)
    values = read_inputs(inputs) if inputs is not None else random_inputs(program, seed)
    totals = {"verilator": bound_of(program.instructions, program.arch).cycles}
    with progress_bars() as progress:
        run = simulate(
            program, values, engine=engine, check=check, memory=memory, trace=trace,  # type: ignore[arg-type]
            progress=reporter(progress, _LABELS, totals),
        )  # fmt: skip
    if outputs is not None:
        write_outputs(outputs, {spec.name: _array(value) for spec, value in zip(program.outputs, run.outputs, strict=True)})
    return program, run


def _array(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value)
