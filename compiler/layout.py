"""Index maps of reshapes, transposes and slices, as exact values.

A `Layout` says which element of a contiguous tensor each element of a view is. Each dimension of the view is
a product of *atoms* (size, stride), slowest first, strides counted in elements of the base. Any chain of
view, permute, select and narrow is one Layout, so two chains that do the same are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

__all__ = ["Layout", "LayoutError"]

Atom = tuple[int, int]
Dim = tuple[Atom, ...]


class LayoutError(ValueError):
    """A rearrangement that atoms cannot express."""


@dataclass(frozen=True)
class Layout:
    """Map from a view's index to the base's flat index; ``offset`` is that of the view's first element."""

    dims: tuple[Dim, ...]
    offset: int = 0

    @classmethod
    def contiguous(cls, shape: tuple[int, ...]) -> Layout:
        """The base itself."""
        strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
        return cls(tuple(_joined([(size, stride)]) for size, stride in zip(shape, strides, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(size for size, _ in dim) for dim in self.dims)

    @property
    def atoms(self) -> Dim:
        """All atoms, slowest first, joined where they run on: the map without the view's shape."""
        return _joined([atom for dim in self.dims for atom in dim])

    def is_contiguous(self) -> bool:
        """Whether the view is the base in its own order, from its first element on, whatever the shape."""
        return self.offset == 0 and self.atoms == _joined([(prod(self.shape), 1)])

    def reshape(self, shape: tuple[int, ...]) -> Layout:
        """View of the same elements in the same order with another shape (no -1).

        Raises
        ------
        LayoutError
            A dimension would need a part of an atom.
        """
        if prod(shape) != prod(self.shape):
            raise LayoutError(f"{self.shape} has not as many elements as {shape}")
        left = list(self.atoms)
        dims: list[Dim] = []
        for size in reversed(shape):
            taken: list[Atom] = []
            while size > 1:
                count, stride = left.pop()
                step = _common(size, count)
                if step != count:
                    left.append((count // step, stride * step))
                taken.insert(0, (step, stride))
                size //= step
            dims.insert(0, _joined(taken))
        return Layout(tuple(dims), self.offset)

    def permute(self, order: tuple[int, ...]) -> Layout:
        return Layout(tuple(self.dims[i] for i in order), self.offset)

    def select(self, dim: int, index: int) -> Layout:
        """Drop a dimension by taking one index of it."""
        dims = self.dims[:dim] + self.dims[dim + 1 :]
        return Layout(dims, self.offset + _at(self.dims[dim], index))

    def narrow(self, dim: int, start: int, length: int) -> Layout:
        """Take ``length`` consecutive indices of a dimension."""
        atoms = self.dims[dim]
        if length == prod(size for size, _ in atoms):
            return self
        if length < 1:
            raise LayoutError("a layout has no empty slices")
        part: list[Atom] = []
        if length > 1:
            inner = prod(size for size, _ in atoms[1:])
            if start % inner or length % inner:
                raise LayoutError(f"a slice of {length} from {start} cuts through atoms {atoms}")
            part = [(length // inner, atoms[0][1]), *atoms[1:]]
        dims = (*self.dims[:dim], _joined(part), *self.dims[dim + 1 :])
        return Layout(dims, self.offset + _at(atoms, start))

    def expand(self, dim: int, size: int) -> Layout:
        """Repeat a dimension of size 1."""
        if self.dims[dim]:
            raise LayoutError(f"only a dimension of size 1 can be expanded, not {self.shape[dim]}")
        return Layout((*self.dims[:dim], ((size, 0),) if size > 1 else (), *self.dims[dim + 1 :]), self.offset)

    def repeat(self, dim: int, count: int) -> Layout:
        """Show each index of a dimension ``count`` times in a row."""
        dims = (*self.dims[:dim], _joined([*self.dims[dim], (count, 0)]), *self.dims[dim + 1 :])
        return Layout(dims, self.offset)

    def compose(self, inner: Layout) -> Layout:
        """The map of this view of ``inner``, straight to ``inner``'s base.

        Raises
        ------
        LayoutError
            The two together are no product of atoms.
        """
        places = _places(inner.atoms)
        _check_carry([atom for dim in self.dims for atom in dim], self.offset, places)
        dims = tuple(
            _joined([piece for atom in dim for piece in _through(atom, places)]) for dim in self.dims
        )
        offset = inner.offset + sum(self.offset // low % size * stride for size, stride, low in places)
        return Layout(dims, offset)

    def apply(self, base: Tensor) -> Tensor:
        """The view of a tensor."""
        flat = base.contiguous().flatten()
        atoms = [atom for dim in self.dims for atom in dim]
        sizes, strides = [size for size, _ in atoms], [stride for _, stride in atoms]
        return torch.as_strided(flat, sizes, strides, flat.storage_offset() + self.offset).reshape(self.shape)

    def inverse(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The base of ``shape`` whose view a tensor is.

        Raises
        ------
        LayoutError
            The view does not show each element of the base once.
        """
        size = prod(shape)
        index = self.apply(torch.arange(size).reshape(shape)).flatten()
        if len(index) != size or len(index.unique()) != size:
            raise LayoutError(f"{self.shape} does not show each element of {shape} once")
        return torch.empty(size, dtype=view.dtype).index_copy_(0, index, view.flatten()).reshape(shape)


def _joined(atoms: list[Atom]) -> Dim:
    """Drop atoms of size 1 and join neighbours that run on: the one canonical form of a dimension."""
    result: list[Atom] = []
    for size, stride in atoms:
        if size == 1:
            continue
        if result and result[-1][1] == size * stride:
            result[-1] = (result[-1][0] * size, stride)
        else:
            result.append((size, stride))
    return tuple(result)


def _common(wanted: int, count: int) -> int:
    """How much of an atom of ``count`` a dimension of ``wanted`` takes: all of one of the two."""
    if wanted % count == 0:
        return count
    if count % wanted == 0:
        return wanted
    raise LayoutError(f"a dimension of {wanted} does not divide an atom of {count}")


def _at(atoms: Dim, index: int) -> int:
    """Offset of an index of a dimension."""
    offset = 0
    for size, stride in reversed(atoms):
        offset += index % size * stride
        index //= size
    return offset


def _places(atoms: Dim) -> list[tuple[int, int, int]]:
    """(size, stride, place value in the view's own flat index) of each atom, fastest first."""
    result, low = [], 1
    for size, stride in reversed(atoms):
        result.append((size, stride, low))
        low *= size
    return result


def _check_carry(atoms: list[Atom], offset: int, places: list[tuple[int, int, int]]) -> None:
    """Steps of a view must not run from one index of an outer place into the next: from an offset within a place, all its
    steps there must end in it."""
    for size, _, low in places:
        reach = offset // low % size
        for count, step in atoms:
            if low <= step < low * size:
                reach += min(count - 1, size * low // step - 1) * (step // low)
        if reach >= size:
            raise LayoutError(f"a slice from {offset} runs over the end of an atom of {size} at place {low}")


def _through(atom: Atom, places: list[tuple[int, int, int]]) -> list[Atom]:
    """An atom over the flat index of a view, as atoms over the view's base, slowest first."""
    count, step = atom
    if step == 0:
        return [atom]
    pieces: list[Atom] = []
    for size, stride, low in places:
        if count == 1:
            break
        if step >= low * size:
            continue
        if step % low or size % (step // low):
            raise LayoutError(f"a step of {step} does not divide an atom of {size} at place {low}")
        skip = step // low
        room = size // skip
        taken = min(count, room)
        if count % taken or (taken < count and taken != room):
            raise LayoutError(f"a run of {count} does not divide an atom of {size}")
        pieces.insert(0, (taken, stride * skip))
        count //= taken
        step = low * size
    if count != 1:
        raise LayoutError("a view reaches beyond its base")
    return pieces
