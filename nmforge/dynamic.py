"""Dimensions that vary, from the command line: by the names that a network's kind or an ONNX file gives them, or by input."""

from __future__ import annotations

import re
from collections.abc import Mapping

from compiler.dynamic import DynamicProgram
from compiler.partitioned import PartitionedProgram
from compiler.program import Program
from compiler.shapes import Dim
from nmforge.errors import BadInputError, unknown

__all__ = ["Places", "chosen", "dynamic_dims"]

Places = Mapping[str, Mapping[str, int]]
"""Where a named dimension is: input and number of the dimension there."""


def dynamic_dims(wanted: Mapping[str, tuple[int, ...]], known: Places) -> dict[str, dict[int, Dim]] | None:
    """What `nmforge.compile` takes as ``dynamic``; None if nothing varies.

    Parameters
    ----------
    wanted
        Values by the name of a known dimension, or by ``input:number``.

    Raises
    ------
    BadInputError
        Another name.
    """
    found: dict[str, dict[int, Dim]] = {}
    for name, values in wanted.items():
        given, colon, axis = name.rpartition(":")
        if name not in known and not (colon and axis.isdecimal()):
            raise unknown("dimension of --dynamic", name, [*known, "INPUT:NUMBER"])
        dim = Dim(re.sub(r"\W", "_", name), values)
        for place, number in known.get(name, {given: int(axis)} if colon else {}).items():
            if number in found.setdefault(place, {}):
                raise BadInputError(f"--dynamic names dimension {number} of {place} twice")
            found[place][number] = dim
    return found or None


def chosen(
    program: Program | PartitionedProgram | DynamicProgram, sizes: Mapping[str, int]
) -> tuple[dict[str, int], Program | PartitionedProgram]:
    """Sizes, all of them, and the program for them: those not given are the largest.

    Raises
    ------
    BadInputError
        Sizes for a program of fixed shapes, or that it does not have.
    """
    if not isinstance(program, DynamicProgram):
        if sizes:
            raise BadInputError("the program has fixed shapes: --shape is for those compiled with --dynamic")
        return {}, program
    whole = {**program.variants[-1][0], **sizes}
    try:
        return whole, program.at(**whole)
    except ValueError as error:
        raise BadInputError(f"--shape: {error}") from None
