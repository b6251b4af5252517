"""Plots of a report: matplotlib figures as SVG text, drawn for a white page, legible in print."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from statistics import linear_regression
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from compiler.memory import MemoryMap

__all__ = [
    "DENSE", "KINDS", "SPARSE", "against", "bars", "beside", "columns", "grouped", "memory_picture", "points", "profile", "short",
    "stacked", "to_png", "to_svg",
]  # fmt: skip

SPARSE, DENSE = "#0f766e", "#94a3b8"
"""Colours of the two networks, everywhere."""

KINDS = ("#1d4ed8", "#0f766e", "#b45309", "#7e22ce", "#be123c", "#4d7c0f", "#0369a1", "#64748b")
"""Colours of the kinds of a stacked plot, in order; distinct in grey as well as for the colour-blind."""

_INK, _GRID, _WORST = "#334155", "#e2e8f0", "#b91c1c"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "nmforge",
}


def short(value: float) -> str:
    """A number with its unit prefix: 1.23 M, 45 k, 7."""
    for limit, mark in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{mark}"
    return f"{value:.3g}"


def stacked(
    rows: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    *,
    label: str,
    colours: Sequence[str] = KINDS,
    share: bool = False,
    group: int = 1,
) -> str:
    """Horizontal stacked bars, first row on top: one bar a row, one colour a part.

    Parameters
    ----------
    share
        Values are shares of 1, shown as percentages, and written into the parts that have room.
    group
        So many rows stand together.
    """
    with plt.rc_context(_STYLE):
        figure, axes = _figure(len(rows))
        left = [0.0] * len(rows)
        places = [row - 0.16 * (row % group - (group - 1) / 2) for row in range(len(rows))]
        for (name, values), colour in zip(parts.items(), colours):
            drawn = axes.barh(
                places, values, left=left, color=colour, label=name, height=0.72, edgecolor="white", linewidth=0.6
            )
            if share:
                texts = [f"{value:.0%}" if value >= 0.055 else "" for value in values]
                axes.bar_label(drawn, texts, label_type="center", color=_contrast(colour), fontsize=9.5)
            left = [start + value for start, value in zip(left, values, strict=True)]
        if not share:
            _write_ends(axes, left, [short(value) for value in left], places)
        _finish(axes, rows, label, share=share, places=places)
        _legend_below(figure, len(parts))
        return to_svg(figure)


def grouped(
    rows: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    label: str,
    colours: Sequence[str] = (DENSE, SPARSE),
    share: bool = False,
) -> str:
    """Horizontal bars side by side: one group a row, one colour a series, values at the ends."""
    with plt.rc_context(_STYLE):
        figure, axes = _figure(len(rows) * max(1.0, 0.62 * len(series)))
        height = 0.76 / len(series)
        for number, ((name, values), colour) in enumerate(zip(series.items(), colours)):
            places = [row + (number - (len(series) - 1) / 2) * height for row in range(len(rows))]
            axes.barh(places, values, height=height * 0.92, color=colour, label=name)
            _write_ends(axes, values, [f"{value:.1%}" if share else short(value) for value in values], places)
        _finish(axes, rows, label, share=share)
        if len(series) > 1:
            _legend_below(figure, len(series))
        return to_svg(figure)


def bars(
    rows: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    *,
    label: str,
    colours: Sequence[str],
    errors: Sequence[float] | None = None,
    limits: tuple[float, float] | None = None,
    share: bool = False,
) -> str:
    """One horizontal bar a row, with its own text, and a whisker of +- error."""
    with plt.rc_context(_STYLE):
        figure, axes = _figure(len(rows) * 1.15)
        whisker = {"ecolor": "#475569", "capsize": 3, "elinewidth": 1}
        axes.barh(range(len(rows)), values, color=list(colours), height=0.62, xerr=errors, error_kw=whisker)
        ends = [value + error for value, error in zip(values, errors or [0.0] * len(values), strict=True)]
        _write_ends(axes, ends, texts)
        _finish(axes, rows, label, share=share)
        if limits is not None:
            axes.set_xlim(*limits)
        return to_svg(figure)


def points(places: Sequence[float], series: Mapping[str, Sequence[float]], *, label: str) -> bytes:
    """Lines through points, one panel a series because their units differ; both axes logarithmic. A PNG file."""
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(1, len(series), figsize=(3.1 * len(series), 2.9), layout="constrained", squeeze=False)
        for axes, (name, values), colour in zip(panels[0], series.items(), KINDS):
            axes.plot(places, values, color=colour, marker="o", linewidth=1.6)
            for place, value in zip(places, values, strict=True):
                axes.annotate(short(value), (place, value), (0, 7), textcoords="offset points", ha="center", fontsize=9.5)
            axes.set(title=name, xlabel=label, xscale="log", yscale="log")
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            axes.grid(True, color=_GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.margins(0.16, 0.2)
        return to_png(figure)


def columns(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], *, label: str, stack: bool = False, limit: float | None = None
) -> bytes:
    """Vertical bars in groups, one colour a series; with `stack` on top of each other. A PNG file."""
    colours = plt.get_cmap("tab20").colors if len(series) > len(KINDS) else KINDS  # type: ignore[attr-defined]
    with plt.rc_context(_STYLE):
        wide = max(6.4, 0.5 * len(groups) * (1 if stack else len(series) / 3))
        figure, axes = plt.subplots(figsize=(wide, 4.0), layout="constrained")
        width, bottom = (0.7 if stack else 0.86 / len(series)), [0.0] * len(groups)
        for number, ((name, values), colour) in enumerate(zip(series.items(), colours)):
            shift = 0 if stack else (number - (len(series) - 1) / 2) * width
            axes.bar([i + shift for i in range(len(groups))], values, width * 0.94, bottom=bottom if stack else 0, color=colour,
                     label=name)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        few = len(groups) <= 6  # few long names on two lines, many beside each other aslant
        axes.set_xticks(range(len(groups)), [name.replace(", ", "\n") if few else name for name in groups])
        if not few:
            axes.set_xticks(range(len(groups)), groups, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_ylabel(label)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, limit)
        axes.yaxis.grid(True, color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=6)
        return to_png(figure)


def profile(values: Sequence[float], names: Mapping[int, str], *, label: str, size: str = "layer") -> Figure:
    """Vertical bars in order, those of ``names`` (by place) in another colour, numbered, and named below: few of many."""
    with plt.rc_context(_STYLE):
        height = 3.4 + 0.2 * len(names)
        figure, axes = plt.subplots(figsize=(max(6.4, 0.11 * len(values)), height), layout="constrained")
        places = range(len(values))
        axes.bar(places, values, color=[_WORST if place in names else SPARSE for place in places], width=0.8)
        for number, place in enumerate(names, 1):
            axes.annotate(str(number), (place, max(values[place], 0.0)), (0, 3), textcoords="offset points", ha="center",
                          color=_WORST, fontweight="bold")
        axes.set(xlabel=f"{size}, in order of execution", ylabel=label)
        axes.margins(x=0.01, y=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.grid(True, color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        told = [f"{number}  {name}: {values[place]:.1f}" for number, (place, name) in enumerate(names.items(), 1)]
        marks = [Rectangle((0, 0), 1, 1, color=_WORST) for _ in told]
        figure.legend(marks, told, loc="outside lower left", handlelength=0.8)
        return figure


def beside(
    rows: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[float | None]]], *, shares: Sequence[str] = ()
) -> bytes:
    """Panels of horizontal bars that share their rows, one colour a series; None: no bar. A PNG file.

    Parameters
    ----------
    panels
        By title: values of each series, one a row.
    shares
        Titles of the panels whose values are shares of 1.
    """
    count = max(len(series) for series in panels.values())
    height = 0.84 / count

    def place(row: int, number: int, series: Mapping[str, Sequence[float | None]]) -> float:
        """Of a bar among those that the row has."""
        there = [other for other, values in enumerate(series.values()) if values[row] is not None]
        return row + (there.index(number) - (len(there) - 1) / 2) * height

    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, len(panels), sharey=True, squeeze=False, layout="constrained",
            figsize=(4.4 + 3.2 * len(panels), 1.3 + len(rows) * (0.14 + 0.16 * count)),
        )  # fmt: skip
        for panel, (title, series) in zip(axes[0], panels.items()):
            for number, ((name, values), colour) in enumerate(zip(series.items(), (DENSE, *KINDS))):
                known = [(place(row, number, series), value) for row, value in enumerate(values) if value is not None]
                places, lengths = [where for where, _ in known], [value for _, value in known]
                panel.barh(places, lengths, height * 0.92, color=colour, label=name)
                texts = [f"{value:.0%}" if title in shares else f"{value:.2f}" for value in lengths]
                for where, length, text in zip(places, lengths, texts, strict=True):
                    panel.annotate(text, (length, where), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
            panel.set_yticks(range(len(rows)), rows)
            panel.tick_params(axis="y", length=0)
            panel.set_title(title)
            panel.xaxis.grid(True, color=_GRID, linewidth=0.8)
            panel.set_axisbelow(True)
            panel.margins(x=0.12)
            if title in shares:
                panel.set_xlim(0, 1.1)
                panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[0][0].set_ylim(len(rows) - 0.5, -0.5)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=count)
        return to_png(figure)


def against(series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> bytes:
    """Points and the line that fits them best, one panel a series, axes from zero. A PNG file."""
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(1, len(series), figsize=(3.9 * len(series), 3.2), layout="constrained", squeeze=False)
        for axes, (name, pairs), colour in zip(panels[0], series.items(), KINDS):
            line, most = linear_regression(*zip(*pairs, strict=True)), max(a for a, _ in pairs)
            axes.plot([0, most], [line.intercept, line.intercept + line.slope * most], color=DENSE, linewidth=1.4)
            axes.plot(*zip(*pairs), color=colour, marker="o", linestyle="")
            axes.set(title=name, xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, None))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            axes.grid(True, color=_GRID, linewidth=0.8)
            axes.set_axisbelow(True)
        return to_png(figure)


def memory_picture(found: MemoryMap) -> bytes:
    """What lies where in memory, and when: a rectangle a region, instructions from left to right, addresses upwards, counted from
    the first byte of an activation. Code and constants, which are there all the time, are left out. A PNG file.
    """
    shown = [region for region in found.regions if region.content not in ("code", "constants")]
    colours = dict(zip(("inputs", "outputs", "masks"), (KINDS[2], KINDS[1], KINDS[3])))
    lowest = min((region.address for region in shown), default=0)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(9.6, 5.0), layout="constrained")
        for number, region in enumerate(sorted(shown, key=lambda region: region.first)):
            start, stop = max(region.first, 0), min(region.last + 1, found.instructions)
            colour = colours.get(region.content, ("#93c5fd", "#60a5fa", "#3b82f6")[number % 3])
            axes.add_patch(Rectangle(
                (start, region.address - lowest), max(stop - start, 1), region.size,
                facecolor=colour, edgecolor="white", linewidth=0.5,
            ))  # fmt: skip
        for name, colour in (*colours.items(), ("activations", "#60a5fa")):
            if any(region.content == name for region in shown):
                axes.bar(0, 0, color=colour, label=name)
        axes.set_xlim(0, found.instructions)
        axes.set_ylim(0, max(found.end - lowest, 1))
        axes.set_xlabel("instruction")
        axes.set_ylabel(f"bytes above address {lowest:#x}")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.set_title(
            f"activations: {short(found.activations)}B, in use at one time {short(found.live)}B, "
            f"without sharing {short(found.unshared)}B"
        )
        figure.legend(loc="outside lower center", ncols=4)
        return to_png(figure)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """An ``<svg>`` element that scales with the page; the same bytes for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)


def _figure(rows: float) -> tuple[Figure, Axes]:
    figure: Figure
    axes: Axes
    figure, axes = plt.subplots(figsize=(7.6, 1.15 + 0.36 * rows), layout="constrained")
    return figure, axes


def _finish(
    axes: Axes, rows: Sequence[str], label: str, *, share: bool, places: Sequence[float] | None = None
) -> None:
    axes.set_yticks(places if places is not None else range(len(rows)), rows)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.xaxis.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if share:
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.margins(x=0.12)


def _write_ends(
    axes: Axes, ends: Sequence[float], texts: Sequence[str], places: Sequence[float] | None = None
) -> None:
    for place, end, text in zip(places if places is not None else range(len(ends)), ends, texts, strict=True):
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9.5)


def _legend_below(figure: Figure, count: int) -> None:
    figure.legend(loc="outside lower center", ncols=min(count, 5), handlelength=1.2, columnspacing=1.4)


def _contrast(colour: str) -> Any:
    """White on dark colours, ink on light ones."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 150 else _INK
