"""Which grid of patches each image is stored in (`compiler.placement.PatchPlacement`).

Tensors that one operator reads and writes row by row must lie alike; they form a class. A convolution may go from one grid to
another, at the price of more fetches, or of a copy of its input in the grid of its output. The grids are chosen for the
fewest cycles on a coarse model, class by class until nothing changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from math import prod

from compiler.ops import Attention, Conv, Linear, MatMul, MaxPool, Product, QuantNetwork, Rearrange, Transpose
from compiler.placement import PatchPlacement, Placement, RowPlacement
from compiler.windows import count_fetches, moves, row_moves
from hw.arch import Arch

__all__ = ["choose_grids", "copy_placement"]

Grid = tuple[int, int]
SWEEPS = 4
COPY = 48
"""Cycles that a copy of a few columns takes, about."""
CANDIDATES = 6
"""Grids with the fewest tiles that a class considers, besides those that others have."""


def choose_grids(network: QuantNetwork, arch: Arch) -> dict[str, tuple[int, int, int, int]]:
    """(height, width, patches from top to bottom, from left to right) of every image that is to lie in patches. Images that
    attention reads lie like sequences, line by line; so do single pixels, for which it is the same."""
    classes = _classes(network)
    fixed = {classes[name] for op in network.ops if isinstance(op, Attention) for name in (op.q, op.k, op.v, op.out)}
    fixed |= {classes[name] for op in network.ops if isinstance(op, Transpose | Product | MatMul) for name in (op.x, op.out)}
    fixed |= {classes[op.y] for op in network.ops if isinstance(op, Product | MatMul)}
    sizes: dict[str, tuple[int, int]] = {}
    for name, tensor in network.tensors.items():
        if tensor.image is not None and classes[name] not in fixed and tensor.image != (1, 1):
            sizes[classes[name]] = tensor.image
    if not sizes:
        return {}
    found = {size: _grids(size, arch.row_groups) for size in set(sizes.values())}
    shared = {grid for size, grids in found.items() for grid in grids[:2]}
    options = {
        name: list(dict.fromkeys([*found[size][:CANDIDATES], *(g for g in found[size] if g in shared)]))
        for name, size in sizes.items()
    }
    cost = _Cost(network, arch, classes)
    chosen = {name: grids[0] for name, grids in options.items()}
    for _ in range(SWEEPS):
        before = dict(chosen)
        for name, grids in options.items():
            chosen[name] = min(grids, key=lambda grid: cost.around(name, {**chosen, name: grid}))  # noqa: B023
        if chosen == before:
            break
    return {name: (*sizes[key], *chosen[key]) for name, key in classes.items() if key in chosen}


def copy_placement(op: Conv | MaxPool, network: QuantNetwork, source: Placement, out: Placement, arch: Arch) -> Placement | None:
    """The placement in which a copy of the input of a convolution or pooling makes it cheaper, copy included; None if the
    input is as good as it lies."""
    cost = _Cost(network, arch, {name: name for name in network.tensors})
    images = [network.tensors[name].image or (1, 1) for name in (op.x, op.out)]
    copied = _like(source, images[0], out, arch)
    if copied == source:
        return None
    inputs, outputs = (network.tensors[name].shape[2] for name in (op.x, op.out))
    each = inputs if isinstance(op, MaxPool) else cost.product(inputs // op.groups, inputs, outputs, op.pattern)
    now, then = (cost.count(place, out, op.window, images[0], images[1]) * each for place in (source, copied))
    return copied if then + cost.moved(source, copied) * inputs < now else None


def _like(source: Placement, image: tuple[int, int], out: Placement, arch: Arch) -> Placement:
    """Patches in the grid of the output, in which each kernel position takes one fetch."""
    grid = out.grid if isinstance(out, PatchPlacement) else (1, 1)
    return PatchPlacement(source.batch, *image, arch.rows, arch.row_groups, grid)


def _classes(network: QuantNetwork) -> dict[str, str]:
    """The first tensor of the class of each tensor: what an operator reads and writes row by row lies alike."""
    parent = {name: name for name in network.tensors}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for op in network.ops:
        if isinstance(op, Attention | Rearrange | Transpose | MatMul):
            continue
        same = [] if isinstance(op, Conv | MaxPool) or op.x is None else [op.x]
        same += [] if op.residual is None else [op.residual.tensor]
        for name in same:
            parent[root(op.out)] = root(name)
    return {name: root(name) for name in network.tensors}


def _grids(size: tuple[int, int], groups: int) -> list[Grid]:
    """Grids that fit the row groups, each as small as its patches allow: those with the fewest tiles first, of like ones the
    one with the squarest patches."""
    counts = [sorted({-(-length // patch) for patch in range(1, length + 1)}) for length in size]
    grids = [(y, x) for y in counts[0] for x in counts[1] if y * x <= groups]

    def order(grid: Grid) -> tuple[float, int, int]:
        patch = [-(-length // count) for length, count in zip(size, grid, strict=True)]
        return prod(patch) / (groups // prod(grid)), sum(patch), patch[0]  # flat patches: copies then move longer runs of rows

    return sorted(grids, key=order)


class _Cost:
    """Cycles of the operators at a class, about."""

    def __init__(self, network: QuantNetwork, arch: Arch, classes: dict[str, str]) -> None:
        self.network, self.arch, self.classes = network, arch, classes
        self.at: dict[str, list[Callable[[dict[str, Grid]], float]]] = defaultdict(list)
        for op in network.ops:
            if isinstance(op, Conv | MaxPool):
                for name in {classes[op.x], classes[op.out]}:
                    self.at[name].append(partial(self.windowed, op))
            elif isinstance(op, Linear):
                self.at[classes[op.out]].append(partial(self.linear, op))
            elif isinstance(op, Rearrange):
                for name in {classes[op.out], *(classes[part.tensor] for part in op.sources)}:
                    self.at[name].append(partial(self.rearranged, op))
        self.count, self.moved, self.copies = cache(self._count), cache(self._moved), cache(self._copies)

    def around(self, name: str, grids: dict[str, Grid]) -> float:
        """Of the operators that read or write a class."""
        return sum(cost(grids) for cost in self.at[name])

    def stored(self, name: str, grids: dict[str, Grid], batch: int | None = None) -> Placement:
        tensor, grid = self.network.tensors[name], grids.get(self.classes[name])
        batch = batch or tensor.shape[0]
        if grid is None or tensor.image is None:
            return RowPlacement(batch, tensor.shape[1], self.arch.rows)
        return PatchPlacement(batch, *tensor.image, self.arch.rows, self.arch.row_groups, grid)

    def windowed(self, op: Conv | MaxPool, grids: dict[str, Grid]) -> float:
        source, out = self.stored(op.x, grids), self.stored(op.out, grids)
        one = [self.stored(name, grids, 1) for name in (op.x, op.out)]
        images = [self.network.tensors[name].image or (1, 1) for name in (op.x, op.out)]
        inputs, outputs = (self.network.tensors[name].shape[2] for name in (op.x, op.out))
        each = inputs if isinstance(op, MaxPool) else self.product(inputs // op.groups, inputs, outputs, op.pattern)
        fetched = self.count(one[0], one[1], op.window, images[0], images[1]) * out.tiles / one[1].tiles
        if source.share != out.share:  # tiles of the output take rows of more tiles of the input, or of parts of them
            fetched *= max(1.0, out.share / source.share)
        copied = _like(source, images[0], out, self.arch)
        if copied == source:
            return fetched * each
        single = self.count(_like(one[0], images[0], one[1], self.arch), one[1], op.window, images[0], images[1])
        again = self.moved(source, copied) * inputs + single * out.tiles / one[1].tiles * each
        return min(fetched * each, again)

    def rearranged(self, op: Rearrange, grids: dict[str, Grid]) -> float:
        out = self.stored(op.out, grids)
        sources = [self.stored(part.tensor, grids) for part in op.sources]
        copies = (self.copies(op, i, source, out) * max(COPY, op.sources[i].width) for i, source in enumerate(sources))
        return sum(copies)

    def linear(self, op: Linear, grids: dict[str, Grid]) -> float:
        outputs, inputs = op.weight.shape
        return self.stored(op.out, grids).tiles * self.product(inputs, inputs, outputs, op.pattern)

    def product(self, inputs: int, loaded: int, outputs: int, pattern: object) -> float:
        """Cycles of one fetch: what it takes to load, to multiply or to hand on."""
        density = pattern.n / pattern.m if pattern is not None else 1.0  # type: ignore[attr-defined]
        tiles = -(-outputs // self.arch.lanes)
        return max(loaded, tiles * max(self.arch.lanes, inputs * density))

    def _moved(self, source: Placement, out: Placement) -> int:
        try:
            return len(moves(source, out, self.arch))
        except ValueError:
            return 1 << 30

    def _copies(self, op: Rearrange, number: int, source: Placement, out: Placement) -> int:
        """Of one source of a rearrangement."""
        part = op.sources[number]
        try:
            return len(row_moves(source, out, part.rows, part.to, self.arch))
        except ValueError:
            return 1 << 30

    def _count(
        self, source: Placement, out: Placement, window: object, image: tuple[int, int], out_image: tuple[int, int]
    ) -> int:
        try:
            return count_fetches(source, out, window, image, out_image, self.arch)  # type: ignore[arg-type]
        except ValueError:
            return 1 << 30
