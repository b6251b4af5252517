"""Calibration: run the fused float graph on data and watch every value that needs a scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algo.observers import Observer, observer_factory
from compiler.graph import CompileError, Convolution, Graph, Input, KeyMask, Linear, Node, Pointwise

__all__ = ["Calibration", "Progress", "calibrate", "calibrate_together", "unmasked"]

Progress = Callable[[int, "int | None"], None]
"""Called after each calibration batch with the batches done and the number of batches, if known."""

_SAMPLE = 1 << 16
"""Numbers that are remembered of one value."""


class _Watched:
    """What is remembered of one value ``(..., C)``: an observer, the range of each channel, some rows."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.low = self.high = torch.empty(0)
        self.rows = torch.empty(0)

    def update(self, values: Tensor) -> None:
        self.observer.update(values)
        rows = values.reshape(-1, values.shape[-1])
        if len(self.rows) and self.rows.shape[-1] != rows.shape[-1]:  # as many columns as tokens: channels mean nothing
            rows, self.rows = rows.reshape(-1, 1), self.rows.reshape(-1, 1)
            self.low, self.high = self.low.min().view(1), self.high.max().view(1)
        low, high = rows.aminmax(dim=0)
        if len(self.rows):
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        self.low, self.high = low, high
        limit = max(64, _SAMPLE // rows.shape[-1])
        self.rows = torch.cat([self.rows.reshape(-1, rows.shape[-1]), rows[:: -(-len(rows) * 4 // limit)]])
        if len(self.rows) > 2 * limit:
            self.rows = self.rows[::2]


class Calibration:
    """Ranges of the values of a graph, by node and stage: "product", "sum", "function" or "out"."""

    def __init__(self, make: Callable[[], Observer]) -> None:
        self._make = make
        self._peaks: dict[tuple[str, str], float] = {}
        self._watched: dict[tuple[str, str], _Watched] = {}

    def update(self, name: str, stage: str, values: Tensor, *, watched: bool = True, source: str = "") -> None:
        """Take in one batch; only the peak counts if not ``watched``. ``source``: module path, for messages."""
        if values.numel() == 0:
            return
        peak = float(values.abs().max())
        if not np.isfinite(peak):
            where = name if source in ("", name) else f"{name} ({source})"
            raise CompileError(
                f"calibration: {where} has a NaN or an infinity: the batch has one itself, or the model overflows on it; "
                "leave that batch out"
            )
        self._peaks[name, stage] = max(self._peaks.get((name, stage), 0.0), peak)
        if watched:
            self._watched.setdefault((name, stage), _Watched(self._make())).update(values)

    def _of(self, name: str, stage: str) -> _Watched:
        found = self._watched.get((name, stage))
        if found is None:
            raise CompileError(f"calibration: no batch has a value {name!r}: give one of each shape that has its own operators")
        return found

    def peak(self, name: str, stage: str) -> float:
        """Largest magnitude; 0 for a stage that the node does not have."""
        return self._peaks.get((name, stage), 0.0)

    def scale(self, name: str, stage: str) -> float:
        """Real value of one int8 step by the observer's method."""
        return self._of(name, stage).observer.scale(8)

    def sample(self, name: str, stage: str) -> Tensor:
        """Some of the values (rows, C)."""
        return self._of(name, stage).rows

    def mean(self, name: str, stage: str) -> NDArray[np.float64]:
        """Mean of each channel."""
        return self._of(name, stage).rows.double().mean(0).numpy()

    def centred(self, name: str, stage: str) -> tuple[float, NDArray[np.float64]]:
        """Scale of an int8 step, and the middle of each channel's range, for the values less the middle."""
        watched = self._of(name, stage)
        middle = ((watched.low + watched.high) / 2).double()
        observer = self._make()
        observer.update(watched.rows - middle)
        observer.update(torch.stack([watched.low, watched.high]) - middle)
        return observer.scale(8), middle.numpy()

    def from_low(self, name: str, stage: str) -> tuple[float, float]:
        """Scale of an int8 step and the value at 0, from the smallest value to the largest worth keeping."""
        watched = self._of(name, stage)
        limit = watched.observer.threshold(9)
        low, high = max(float(watched.low.min()), -limit), min(float(watched.high.max()), limit)
        if not high > low:
            return watched.observer.scale(8), 0.0
        scale = (high - low) / 255
        return scale, low + 128 * scale


def calibrate(
    graph: Graph,
    batches: Iterable[Any],
    observer: str | Callable[[], Observer] = "mse",
    progress: Progress | None = None,
) -> Calibration:
    """Run the fused graph on each batch and watch its values; rows of masked keys do not count."""
    return calibrate_together([(graph, batches)], observer, progress)


def calibrate_together(
    parts: Sequence[tuple[Graph, Iterable[Any]]],
    observer: str | Callable[[], Observer] = "mse",
    progress: Progress | None = None,
) -> Calibration:
    """`calibrate` graphs of one network for several shapes, each with its own batches: a value has the range that it has in all
    of them. A graph without batches adds its constants alone."""
    calibration = Calibration(observer_factory(observer))
    sizes = [len(batches) if isinstance(batches, Sized) else None for _, batches in parts]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    done = 0
    for graph, batches in parts:
        before = done
        for done, batch in enumerate(batches, before + 1):
            _watch(graph, graph.bind(batch), calibration)
            if progress is not None:
                progress(done, total)
        if done == before and len(parts) > 1:
            _watch_constants(graph, calibration)
    if not done:
        raise ValueError("quantise needs at least one calibration batch")
    return calibration


def _watch_constants(graph: Graph, calibration: Calibration) -> None:
    for node in graph.nodes.values():
        if not node.inputs and not isinstance(node, Input):
            calibration.update(node.name, "out", node.evaluate(), source=node.source)


def unmasked(graph: Graph, inputs: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """What takes the rows (N, C) of tokens that take part out of a value (batch, rows, C); other values, and all of a graph with
    no key mask or several, stay as they are."""
    masks = [node for node in graph.nodes.values() if isinstance(node, KeyMask)]
    keep = masks[0].evaluate(inputs[masks[0].inputs[0]])[:, 0] if len(masks) == 1 else None
    masked = keep is not None and bool(keep.any())

    def seen(values: Tensor) -> Tensor:
        fits = keep is not None and values.ndim == 3 and values.shape[:2] == keep.shape
        return values[keep] if masked and fits else values

    return seen


def _watch(graph: Graph, inputs: dict[str, Tensor], calibration: Calibration) -> None:
    """Run one batch; rows of masked tokens do not count."""
    seen = unmasked(graph, inputs)

    def observe(node: Node, operands: tuple[Tensor, ...], value: Tensor) -> None:
        if isinstance(node, Linear | Convolution | Pointwise) and not node.post.is_empty:
            x = node.product(operands[0])
            calibration.update(node.name, "product", seen(x), watched=False, source=node.source)
            for stage, result in node.post.stages(x, *operands[1:]):
                watched = node.post.function is not None and stage in ("sum", "function")
                behind = f", behind {node.post.function.name}" if node.post.function is not None and stage == "function" else ""
                calibration.update(node.name, stage, seen(result), watched=watched, source=f"{node.source or node.name}{behind}")
        if not isinstance(node, KeyMask):
            calibration.update(node.name, "out", seen(value), source=node.source)

    for node in graph.inputs:
        if inputs[node.name].is_floating_point():
            calibration.update(node.name, "out", seen(inputs[node.name]))
    graph.run(inputs, observe=observe)
