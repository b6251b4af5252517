"""Which dimensions of a network's inputs may vary, and what they may be.

A dimension has a list of values: for each combination of values a program is compiled (`compiler.dynamic`), so that an
input pays for its own length alone. No length between two listed ones is padded or guessed: it is refused by name.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compiler.graph import named_inputs

__all__ = [
    "Axes", "Dim", "DynamicShapes", "Sizes", "argument_names", "dynamic_shapes", "input_shapes", "resized", "sizes_text",
]

Sizes = dict[str, int]
"""A value for each dimension, by name."""

Axes = Mapping[int, "Dim | Iterable[int]"]
"""What the dimensions of one input may be, by number."""


@dataclass(frozen=True)
class Dim:
    """A dimension that varies: the same `Dim` in several places is one and the same number everywhere.

    Parameters
    ----------
    name
        A Python identifier, for messages and ``DynamicProgram.at``.
    values
        What it may be, such as ``(16, 32, 64)`` or ``range(16, 129, 16)``; sorted and distinct afterwards.

    Raises
    ------
    TypeError, ValueError
        No name, or values that are no whole numbers from 1 on.
    """

    name: str
    values: tuple[int, ...]

    def __init__(self, name: str, values: Iterable[int]) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"a Dim needs a Python identifier as its name, not {name!r}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", _values(values, f"Dim {name!r}"))


def _values(values: Any, where: str) -> tuple[int, ...]:
    """Sorted, distinct, checked."""
    advice = "list them, such as (16, 32, 64) or range(16, 129, 16): each is compiled"
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{where} must have the values that it may be, not {values!r}: {advice}")
    found = list(values)
    for value in found:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where} may be whole numbers from 1 on, not {value!r}: {advice}")
    if not found:
        raise ValueError(f"{where} has no value: {advice}")
    return tuple(sorted(set(found)))


@dataclass(frozen=True)
class DynamicShapes:
    """The dimensions that vary, and where they are: (input, number of the dimension there, its `Dim`)."""

    places: tuple[tuple[str, int, Dim], ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        """Each one once, in the order of the inputs."""
        return tuple(dict.fromkeys(dim for _, _, dim in self.places))

    def combinations(self) -> Iterator[Sizes]:
        """All sizes, the smallest first."""
        names = [dim.name for dim in self.dims]
        for values in itertools.product(*(dim.values for dim in self.dims)):
            yield dict(zip(names, values, strict=True))

    def sizes(self, shapes: Mapping[str, Sequence[int]], *, nearest: bool = False) -> Sizes:
        """The sizes that inputs of these shapes have; ``nearest``: for other values, the next larger or the largest.

        Raises
        ------
        ValueError
            Too few dimensions, a value that is not compiled, or two values of one dimension; names input, dimension, value and
            what is allowed.
        """
        found: dict[str, tuple[int, str]] = {}
        limits = {dim.name: dim.values for dim in self.dims}
        for name, axis, dim in self.places:
            shape, where = tuple(shapes[name]), f"input {name!r}, dimension {axis}"
            if axis >= len(shape):
                raise ValueError(f"{where} ({dim.name}) is missing: its shape is {shape}")
            if shape[axis] not in dim.values and not nearest:
                raise ValueError(f"{where} is {shape[axis]}, but {dim.name} may be {_listed(dim.values)} in this program")
            value, first = found.setdefault(dim.name, (shape[axis], where))
            if value != shape[axis]:
                raise ValueError(f"{where} is {shape[axis]}, but {first} is {value}: both are {dim.name}")
        return {name: next((v for v in limits[name] if v >= value), limits[name][-1]) for name, (value, _) in found.items()}

    def check(self, sizes: Mapping[str, int]) -> Sizes:
        """A value for every dimension, in order.

        Raises
        ------
        ValueError
            An unknown or missing dimension, or a value that is not compiled.
        """
        names = [dim.name for dim in self.dims]
        if set(sizes) != set(names):
            raise ValueError(f"the program's dimensions are {', '.join(names)}, not {', '.join(map(str, sizes)) or 'none'}")
        for dim in self.dims:
            if sizes[dim.name] not in dim.values:
                raise ValueError(f"{dim.name} may be {_listed(dim.values)} in this program, not {sizes[dim.name]!r}")
        return {name: sizes[name] for name in names}

    def where(self, name: str) -> str:
        """Where a dimension is, for messages."""
        return ", ".join(f"input {given!r} dimension {axis}" for given, axis, dim in self.places if dim.name == name)


def _listed(values: Sequence[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, values[:-1])), str(values[-1])]))


def sizes_text(sizes: Mapping[str, int]) -> str:
    """``batch = 1, n = 32``."""
    return ", ".join(f"{name} = {value}" for name, value in sizes.items())


def dynamic_shapes(dynamic: Any, names: Sequence[str]) -> DynamicShapes:
    """Read what `nf.compile` takes as ``dynamic``.

    Parameters
    ----------
    dynamic
        ``{"tokens": {0: (1, 8), 1: n}}`` by input, or a sequence in the order of the inputs, with None for those that do not
        vary. Values are a `Dim`, or numbers; the same numbers for the same dimension of several inputs are one dimension (of
        the length of tokens and mask, say).
    names
        Of the inputs, in order.

    Raises
    ------
    TypeError, ValueError
        An unknown input, no dimension at all, two `Dim` of one name.
    """
    if not isinstance(dynamic, Mapping):
        if isinstance(dynamic, str | bytes) or not isinstance(dynamic, Sequence) or len(dynamic) > len(names):
            known = ", ".join(names)
            raise TypeError(f"dynamic must be a dict by input ({known}) or a sequence of their dimensions, not {dynamic!r}")
        dynamic = {name: axes for name, axes in zip(names, dynamic, strict=False) if axes is not None}
    unknown = [name for name in dynamic if name not in names]
    if unknown:
        raise ValueError(f"dynamic names {unknown[0]!r}, but the inputs are {', '.join(names)}")
    shared: dict[tuple[int, tuple[int, ...]], Dim] = {}
    places = [
        (name, *_place(name, axis, values, shared))
        for name in names if name in dynamic for axis, values in sorted(_axes(name, dynamic[name]).items())
    ]  # fmt: skip
    if not places:
        raise ValueError("dynamic names no dimension: leave it out, or give some, such as {'tokens': {1: (16, 32, 64)}}")
    by_name: dict[str, Dim] = {}
    for _, _, dim in places:
        if by_name.setdefault(dim.name, dim) != dim:
            raise ValueError(f"two dimensions are called {dim.name!r}, with {dim.values} and {by_name[dim.name].values}")
    return DynamicShapes(tuple(places))


def _axes(name: str, axes: Any) -> dict[int, Any]:
    if not isinstance(axes, Mapping) or any(not isinstance(axis, int) or isinstance(axis, bool) or axis < 0 for axis in axes):
        raise TypeError(f"dynamic[{name!r}] must have the numbers of dimensions as keys, such as {{1: (16, 32)}}, not {axes!r}")
    return dict(axes)


def _place(name: str, axis: int, values: Any, shared: dict[tuple[int, tuple[int, ...]], Dim]) -> tuple[int, Dim]:
    """A dimension and its `Dim`: the given one, or one for all inputs with these values there."""
    if isinstance(values, Dim):
        return axis, values
    listed = _values(values, f"input {name!r}, dimension {axis},")
    return axis, shared.setdefault((axis, listed), Dim(f"{name}_{axis}", listed))


def argument_names(module: nn.Module, example_inputs: Any) -> list[str]:
    """What `torch.export` calls the arguments that a module gets as example inputs."""
    if isinstance(example_inputs, Mapping):
        return list(example_inputs)
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{number}" for number in range(len(given) - len(names))]
        elif parameter.kind is not parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return names[: len(given)]


def resized(example_inputs: Any, names: Sequence[str], shapes: DynamicShapes, sizes: Sizes) -> Any:
    """Example inputs of other sizes, in the form that they had: cut, or repeated from the start."""
    given = _in_order(example_inputs)
    values = dict(zip(names, given, strict=True))
    for name, axis, dim in shapes.places:
        value = values[name]
        if not isinstance(value, Tensor) or axis >= value.ndim or not value.shape[axis]:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"input {name!r} has no dimension {axis} ({dim.name}) in example_inputs: {found}")
        values[name] = value.index_select(axis, torch.arange(sizes[dim.name]) % value.shape[axis])
    if isinstance(example_inputs, Mapping):
        return values
    return values[names[0]] if isinstance(example_inputs, Tensor) else tuple(values.values())


def input_shapes(inputs: Any, names: Sequence[str], whose: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a tensor or an array, of several in order, or of a dict of them; errors as `named_inputs`."""
    given = named_inputs(names, (inputs,) if isinstance(inputs, np.ndarray) else inputs, whose)
    return {name: tuple(np.shape(value)) for name, value in given.items()}


def _in_order(inputs: Any) -> tuple[Any, ...]:
    if isinstance(inputs, Mapping):
        return tuple(inputs.values())
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
