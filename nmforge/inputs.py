"""Inputs of a program from a file or a seed, and its outputs to a file."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from compiler.partitioned import PartitionedProgram
from compiler.program import ModelTensor, Program
from nmforge.errors import BadInputError

__all__ = ["check_outputs", "random_inputs", "read_inputs", "write_outputs"]

Arrays = dict[str, NDArray[Any]]

_SUFFIXES = (".npz", ".safetensors")


def read_inputs(path: Path) -> Arrays:
    """Arrays by name from a ``.npz`` or ``.safetensors`` file.

    Raises
    ------
    BadInputError
        Another suffix, or a damaged file.
    FileNotFoundError
    """
    if path.suffix not in _SUFFIXES:
        raise BadInputError(f"inputs are read from {' or '.join(_SUFFIXES)}, not from {path.name!r}")
    if not path.is_file():
        raise BadInputError(f"no inputs at {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (SafetensorError, ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise BadInputError(f"{path} cannot be read: {error}") from None


def check_outputs(path: Path) -> None:
    """Raise `BadInputError` for a name that `write_outputs` does not know: before the work, not after it."""
    if path.suffix not in _SUFFIXES:
        raise BadInputError(f"outputs are written to {' or '.join(_SUFFIXES)}, not to {path.name!r}")
    if not path.resolve().parent.is_dir():
        raise BadInputError(f"the folder of {path} does not exist")


def write_outputs(path: Path, outputs: Arrays) -> None:
    """Write arrays by name, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        if path.suffix == ".safetensors":
            save_file({name: np.ascontiguousarray(array) for name, array in outputs.items()}, temporary)
        else:
            np.savez(temporary, **outputs)  # type: ignore[arg-type]
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def random_inputs(program: Program | PartitionedProgram, seed: int) -> Arrays:
    """Inputs that use the whole range of every input tensor; masks leave a random number of leading keys in.

    Of a partitioned program: normal numbers, integers in the range of the calibration data.
    """
    generator = np.random.default_rng(seed)
    if isinstance(program, PartitionedProgram):
        return {spec.name: _like_calibration(spec, program, generator) for spec in program.inputs}
    return {spec.name: _random(spec, program, generator) for spec in program.inputs}


def _like_calibration(spec: ModelTensor, program: PartitionedProgram, generator: np.random.Generator) -> NDArray[Any]:
    dtype = spec.dtype.removeprefix("torch.")
    if f"range.{spec.name}" not in program.meta:
        return generator.standard_normal(spec.shape).astype(dtype)
    low, high = map(int, program.meta[f"range.{spec.name}"].split())
    return generator.integers(low, high + 1, spec.shape).astype(dtype)


def _random(spec: ModelTensor, program: Program, generator: np.random.Generator) -> NDArray[Any]:
    info = program.tensor(spec.tensor)
    if spec.kind == "keymask":
        batch, _, keys = info.shape
        kept = np.arange(keys) < generator.integers(1, keys + 1, (batch, 1))
        return (kept != spec.inverted).astype(spec.dtype.removeprefix("torch.").replace("keymask", "int8")).reshape(spec.shape)
    limits = np.iinfo(info.dtype)
    integers = generator.integers(limits.min, limits.max + 1, spec.shape)
    if spec.dtype in ("int8", "int16"):
        return integers.astype(spec.dtype)
    return (integers * spec.scale).astype(spec.dtype.removeprefix("torch."))
