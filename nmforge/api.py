"""What the façade adds to the parts it collects."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, overload

from torch import nn

from algo.nm import NM
from algo.sparsify import model_patterns
from algo.verify import verify as verify_patterns
from compiler.compile import compile_model
from compiler.dynamic import DynamicProgram
from compiler.partitioned import PartitionedProgram
from compiler.program import Program
from sim.cxx import ToolMissingError
from sim.cycle import run_cycles

__all__ = ["compile", "verify"]


@overload
def compile(*args: Any, dynamic: None = None, **options: Any) -> Program | PartitionedProgram: ...


@overload
def compile(*args: Any, dynamic: object, **options: Any) -> Program | PartitionedProgram | DynamicProgram: ...


@functools.wraps(compile_model)
def compile(*args: Any, **options: Any) -> Program | PartitionedProgram | DynamicProgram:
    return compile_model(*args, **{"measure": _cycles, **options})


def _cycles(program: Program) -> int:
    """Exact cycles where there is a C++ compiler for the cycle engine, else nothing to choose by."""
    try:
        return run_cycles(program).cycles
    except ToolMissingError:
        return 0


def verify(model: nn.Module, patterns: Mapping[str, NM] | None = None) -> None:
    """Check that every sparse layer of a model obeys its pattern.

    Parameters
    ----------
    patterns
        Patterns by layer name; by default those that the model's layers were given.

    Raises
    ------
    PatternViolation
        Names layer, row and group of the first violation.
    ValueError
        No layer with that name, or no sparse layer at all.
    """
    found = model_patterns(model) if patterns is None else patterns
    if not found:
        raise ValueError("the model has no sparse layer: call sparsify() first, or give patterns")
    verify_patterns(model, found)
