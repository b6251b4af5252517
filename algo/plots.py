"""Plots of training runs, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["save_curves", "save_panels"]


def save_panels(
    path: str | Path, names: Sequence[str], panels: Mapping[str, Sequence[float | None]], *,
    lines: Mapping[str, tuple[str, float]] | None = None, joined: bool = True,
) -> None:
    """One panel below the other over the same names; None leaves a gap.

    ``lines`` gives a panel a horizontal line: its label and value. ``joined`` draws lines between the points, for names that
    have an order.
    """
    figure = Figure(figsize=(max(5.0, 0.7 * len(names) + 2), 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        axis.plot(range(len(names)), [float("nan") if value is None else value for value in values], "o-" if joined else "o")
        if lines and title in lines:
            label, value = lines[title]
            axis.axhline(value, linestyle="--", color="grey", label=label)
            axis.legend()
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[-1].set_xticks(range(len(names)), names)
    _save(figure, path)


def save_curves(
    path: str | Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str, log: bool = False
) -> None:
    """Several curves, each its x and y values, in one picture; ``log`` makes the y axis logarithmic."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, (xs, ys) in curves.items():
        axis.plot(xs, ys, label=name)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    if 1 < len(curves) <= 20:
        axis.legend(fontsize="small")
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    FigureCanvasAgg(figure).print_png(str(temporary))
    os.replace(temporary, path)
