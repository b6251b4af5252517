"""Sparse architecture divergence (SAD) and flip rate: how much masks change while a network trains.

SAD between two steps is the number of mask bits that differ, ``||E_j - E_i||_1`` (SR-STE, arXiv 2102.04010); the flip rate is
that by weight and step (S-STE, arXiv 2409.09099).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from algo.plots import save_curves
from algo.sparsify import parametrizations

__all__ = ["FlipTracker", "Flips", "flips_plot"]


@dataclass(frozen=True)
class Flips:
    """Change of a layer's mask since the row before: ``sad`` bits of ``weights``; ``rate`` is per weight and step."""

    step: int
    layer: str
    sad: int
    weights: int
    rate: float


class FlipTracker:
    """Compares masks between calls of `update`.

    Parameters
    ----------
    model
        With layers in training, see `algo.sparsify.sparsify`.
    path
        A CSV file to append rows to: step, layer, sad, weights, rate.
    """

    def __init__(self, model: nn.Module, path: str | Path | None = None) -> None:
        self._model, self._path = model, None if path is None else Path(path)
        self._masks: dict[tuple[str, int], Tensor] = {}
        self._step: int | None = None
        self.rows: list[Flips] = []

    @torch.no_grad()
    def update(self, step: int) -> list[Flips]:
        """Note the masks after a step; rows of all layers, none at the first call.

        Raises
        ------
        ValueError
            ``step`` is not later than the one before.
        """
        if self._step is not None and step <= self._step:
            raise ValueError(f"steps must rise: {step} after {self._step}")
        now: dict[tuple[str, int], Tensor] = {}
        for index, (name, weight, mask) in enumerate(parametrizations(self._model)):
            now[name, index] = (mask.mask if mask.is_frozen else mask.new_mask(weight)).clone()
        found = []
        for (name, index), present in now.items():
            before = self._masks.get((name, index))
            if before is not None and self._step is not None:
                sad, weights = int((before != present).sum()), present.numel()
                found.append(Flips(step, name, sad, weights, sad / weights / (step - self._step)))
        self._masks, self._step = now, step
        self.rows += found
        self._append(found)
        return found

    def _append(self, rows: Sequence[Flips]) -> None:
        if self._path is None or not rows:
            return
        new = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(("step", "layer", "sad", "weights", "rate"))
            writer.writerows((row.step, row.layer, row.sad, row.weights, f"{row.rate:.3e}") for row in rows)


def flips_plot(rows: Sequence[Flips], path: str | Path) -> None:
    """Draw each layer's flip rate against the step, as a PNG."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        xs, ys = curves.setdefault(row.layer, ([], []))
        xs.append(row.step)
        ys.append(row.rate)
    save_curves(path, curves, x="step", y="mask bits changed, per weight and step")
