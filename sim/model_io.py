"""Between the tensors of the user's model and the integer tensors of the network."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compiler.graph import windows
from compiler.program import ModelTensor, Program, input_names

__all__ = ["Inputs", "dequantise_outputs", "quantise_inputs"]

Inputs = torch.Tensor | NDArray[Any] | Sequence[Any] | Mapping[str, Any]
"""One tensor, tensors in the program's order, or tensors by name."""

_INTEGER = ("int8", "int16", "keymask")  # dtypes of inputs that are the network's own


def quantise_inputs(program: Program, inputs: Inputs) -> dict[str, NDArray[np.integer]]:
    """Integer arrays by the network's names, for `Program.memory_image`.

    Raises
    ------
    ValueError
        Wrong number, names, shape or dtype; the message names the input, what came and what is expected.
    """
    given = _by_name(program.inputs, inputs)
    return {spec.tensor: _quantise(spec, given[spec.name], program) for spec in program.inputs}


def _by_name(specs: tuple[ModelTensor, ...], inputs: Inputs) -> dict[str, Any]:
    names = input_names(specs)
    if isinstance(inputs, Mapping):
        if set(inputs) != set(names):
            raise ValueError(f"the program's inputs are {_list(names)}, not {_list(inputs)}")
        return dict(inputs)
    values = [inputs] if isinstance(inputs, (torch.Tensor, np.ndarray)) else list(inputs)
    if len(values) != len(names):
        raise ValueError(f"the program takes {len(names)} inputs ({_list(names)}), not {len(values)}")
    return dict(zip(names, values, strict=True))


def _list(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _quantise(spec: ModelTensor, value: Any, program: Program) -> NDArray[np.integer]:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    expected = spec.dtype.removeprefix("torch.")
    kinds = "iub" if expected in _INTEGER else None
    if (array.dtype.kind not in kinds) if kinds else (array.dtype.name != expected):
        wanted = "an integer type" if kinds else expected
        raise ValueError(f"input {spec.name!r} must be of {wanted}, not {array.dtype.name}")
    if array.shape != tuple(spec.shape):
        raise ValueError(f"input {spec.name!r} must have the shape {tuple(spec.shape)}, not {array.shape}")
    info = program.tensor(spec.tensor)
    if spec.kind == "keymask":
        return ((array != 0) != spec.inverted).astype(np.int8).reshape(info.shape)
    if kinds:
        integers: NDArray[np.integer] = array.reshape(info.shape)
        return integers
    if not np.isfinite(array).all():
        raise ValueError(f"input {spec.name!r} must be finite")
    limits = np.iinfo(info.dtype)
    levels = np.clip(np.rint(array.astype(np.float64) / spec.scale), limits.min, limits.max)
    return (levels if spec.image is None else _windows(levels, spec.image)).astype(info.dtype).reshape(info.shape)


def _windows(image: NDArray[np.float64], sizes: tuple[int, ...]) -> NDArray[np.float64]:
    """`ModelTensor.image`: an image or line as rows (batch, windows, kernel positions * channels)."""
    return windows(torch.from_numpy(image), *((sizes[i], sizes[i + 1]) for i in range(0, 10, 2))).numpy()


def dequantise_outputs(
    program: Program, tensors: Mapping[str, NDArray[np.integer]]
) -> tuple[torch.Tensor | NDArray[np.integer], ...]:
    """The model's outputs, in order: real values as torch tensors, or the integers themselves if they are the network's own."""
    return tuple(_dequantise(spec, tensors[spec.tensor]) for spec in program.outputs)


def _dequantise(spec: ModelTensor, values: NDArray[np.integer]) -> torch.Tensor | NDArray[np.integer]:
    if spec.dtype in _INTEGER:
        return values.reshape(spec.shape)
    if spec.image is not None:
        values = np.moveaxis(values, 1, 2)
    dtype = getattr(torch, spec.dtype.removeprefix("torch."))
    return torch.from_numpy(values.astype(np.float64) * spec.scale).to(dtype).reshape(spec.shape)
