"""A report of one or more simulated runs as a single HTML file: plots inlined, no scripts, good on screen and on paper."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from compiler.partitioned import PartitionedProgram
from compiler.program import Program
from hw.arch import Arch
from sim import plots
from sim.counters import MEANING, UnitTime, traffic_bytes, unit_table
from sim.simulate import Run

__all__ = ["RunView", "layer_and_kind", "render", "run_record", "write_report"]

_TEMPLATES = Path(__file__).parent / "templates"

_PROJECTIONS = {"query", "key", "value", "q_proj", "k_proj", "v_proj", "q", "k", "v"}

_STREAMS = {
    "fetch": "instructions", "a": "activations", "w": "weight values", "x": "weight positions", "p": "column parameters",
    "r": "residuals", "g": "norm parameters", "write": "results written",
}  # fmt: skip

_WAITS = {"busy": "computing", "wait_weights": "waits for weights", "wait_columns": "waits for activations",
          "blocked": "waits to be drained", "idle": "idle"}
_WAIT_COLOURS = (plots.SPARSE, "#b45309", "#1d4ed8", "#7e22ce", "#cbd5e1")


def run_record(program: Program | PartitionedProgram, run: Run) -> dict[str, Any]:
    """What a report shows of a run, as JSON values: `Run.to_dict`, and the program's operators with their cycles."""
    operators = []
    parts = program.programs if isinstance(program, PartitionedProgram) else (program,)
    for operator in program.operators:
        row = asdict(operator)
        del row["spans"]
        operators.append(row | {"shape": list(operator.shape), "cycles": run.operator_cycles.get(operator.name)})
    return run.to_dict() | {
        "kind": "nmforge run",
        "arch_parameters": run.arch.to_dict(),
        "operators": operators,
        "places": program.report().to_dict(),
        "program": {
            "instructions": program.instruction_count,
            "code_bytes": sum(len(part.code) for part in parts),
            "constant_bytes": sum(len(part.constants) for part in parts),
            "activation_bytes": max(part.activation_bytes for part in parts),
            "memory_bytes": program.memory_bytes,
            "macs": program.macs,
            "effective_macs": program.effective_macs,
        },
    }


@dataclass(frozen=True, eq=False)
class RunView:
    """A run as the report sees it: a label, a colour, and the record of `run_record`."""

    label: str
    colour: str
    record: Mapping[str, Any]

    @cached_property
    def arch(self) -> Arch:
        return Arch(**self.record["arch_parameters"])

    @property
    def cycles(self) -> int | None:
        cycles = self.record["cycles"]
        return None if cycles is None else int(cycles)

    @property
    def operators(self) -> Sequence[Mapping[str, Any]]:
        rows: Sequence[Mapping[str, Any]] = self.record["operators"]
        return rows

    @cached_property
    def units(self) -> tuple[UnitTime, ...]:
        """Busy and waiting units; empty for an engine without time."""
        return unit_table(self.record["counters"]) if self.record["counters"] else ()

    @cached_property
    def traffic(self) -> dict[str, int]:
        """Bytes by stream."""
        return traffic_bytes(self.record["counters"], self.arch) if self.record["counters"] else {}

    def by_layer(self) -> dict[str, dict[str, int]]:
        """Cycles by layer and kind; empty if the run does not know its operators' cycles."""
        found: dict[str, dict[str, int]] = {}
        for operator in self.operators:
            if operator["cycles"] is None:
                continue
            layer, kind = layer_and_kind(operator)
            kinds = found.setdefault(layer, {})
            kinds[kind] = kinds.get(kind, 0) + int(operator["cycles"])
        return found

    def storage(self) -> dict[str, tuple[int, int]]:
        """Weight bytes by layer: as dense int8, and as stored."""
        found: dict[str, tuple[int, int]] = {}
        for operator in self.operators:
            layer, _ = layer_and_kind(operator)
            dense, stored = found.get(layer, (0, 0))
            found[layer] = dense + operator["weight_bytes_dense"], stored + operator["weight_bytes"]
        return {layer: sizes for layer, sizes in found.items() if any(sizes)}


def layer_and_kind(operator: Mapping[str, Any]) -> tuple[str, str]:
    """Where an operator belongs: ``("layer 0", "Q, K, V")`` of ``layers.0.attention.query``."""
    source = operator["source"] or operator["name"]
    parts = source.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if place is None:
        layer, rest = "network", parts
    else:
        layer, rest = f"{parts[place - 1].removesuffix('s') if place else 'layer'} {parts[place]}", parts[place + 1 :]
    if operator["kind"] == "attention":
        return layer, "attention"
    if rest and rest[-1] in _PROJECTIONS:
        return layer, "Q, K, V"
    return layer, " ".join(rest).replace("_", " ") or operator["kind"]


# -- the page ---------------------------------------------------------------------------------------------------------


def render(facts: Mapping[str, Any]) -> str:
    """The page of a demo's summary, or of a single `run_record`.

    Raises
    ------
    ValueError
        The facts are neither; names the first field that is missing.
    """
    kind = facts.get("kind")
    if kind not in ("nmforge demo", "nmforge run"):
        raise ValueError(f"a report needs the summary of a demo or of a simulation, not kind={kind!r}")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        n=_thousands, share=_share, mb=_megabytes, short=plots.short, seconds=_seconds, times=_times, nice=_nice,
        million=lambda value: _nice(value / 1e6, 1),
    )
    try:
        views = _views(facts)
        context = {"facts": facts, "views": views, "plots": _plots(facts, views), "meaning": MEANING}
        context |= {"table": _operator_rows(views), "waits": _WAITS}
        page = environment.get_template("demo.html" if kind == "nmforge demo" else "run.html")
        return page.render(context)
    except KeyError as error:
        raise ValueError(f"a field of the summary is missing: {error}") from error
    except UndefinedError as error:
        raise ValueError(f"the summary is not of this version of nmforge: {error}") from error


def write_report(facts: Mapping[str, Any], path: Path) -> None:
    """Write the page, whole or not at all."""
    text = render(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _views(facts: Mapping[str, Any]) -> list[RunView]:
    if facts["kind"] == "nmforge run":
        return [RunView("this run", plots.SPARSE, facts)]
    runs = facts["runs"]
    return [RunView("dense", plots.DENSE, runs["dense"]), RunView(_label(facts), plots.SPARSE, runs["sparse"])]


def _label(facts: Mapping[str, Any]) -> str:
    """What the sparse network is called: its pattern, or "sparse" for a mix."""
    pattern = str(facts["pattern"])
    return pattern if "=" not in pattern else "sparse"


def _plots(facts: Mapping[str, Any], views: Sequence[RunView]) -> dict[str, str]:
    """SVG by name; a plot that the facts do not allow is absent."""
    found: dict[str, str] = {"storage": _plot_storage(views)}
    timed = [view for view in views if view.cycles is not None]
    if timed:
        found |= {"layers": _plot_layers(timed), "array": _plot_array(timed), "units": _plot_units(timed),
                  "traffic": _plot_traffic(timed)}  # fmt: skip
    if len(timed) == 2:
        found["cycles"] = _plot_cycles(facts, timed)
    if "accuracy" in facts:
        found["accuracy"] = _plot_accuracy(facts)
    return {name: svg for name, svg in found.items() if svg}


def _plot_layers(views: Sequence[RunView]) -> str:
    """One bar for each layer and network, by kind of operator."""
    tables = [view.by_layer() for view in views]
    layers = list(tables[0])
    if not layers:
        return ""
    rows, cells = [], []
    for layer in layers:
        for view, table in zip(views, tables, strict=True):
            rows.append(f"{layer} · {view.label}" if len(views) > 1 else layer)
            cells.append(table.get(layer, {}))
    kinds = _top_kinds(cells)
    parts = {kind: [float(cell.get(kind, 0)) for cell in cells] for kind in kinds}
    others = [float(sum(value for kind, value in cell.items() if kind not in kinds)) for cell in cells]
    if any(others):
        parts["other"] = others
    return plots.stacked(rows, parts, label="cycles", group=len(views))


def _top_kinds(cells: Sequence[Mapping[str, int]]) -> list[str]:
    """Kinds in the order in which they appear, at most seven: those that cost most."""
    total: dict[str, int] = {}
    for cell in cells:
        for kind, value in cell.items():
            total[kind] = total.get(kind, 0) + value
    largest = sorted(total, key=lambda kind: total[kind], reverse=True)[: len(plots.KINDS) - 1]
    return [kind for kind in total if kind in largest]


def _plot_array(views: Sequence[RunView]) -> str:
    arrays = [next(unit for unit in view.units if unit.unit == "array") for view in views]
    parts = {
        text: [_array_cycles(unit, name) / max(1, unit.cycles) for unit in arrays] for name, text in _WAITS.items()
    }
    return plots.stacked(
        [view.label for view in views], parts, label="share of all cycles", colours=_WAIT_COLOURS, share=True
    )


def _array_cycles(unit: UnitTime, name: str) -> int:
    return {"busy": unit.busy, "idle": unit.idle}.get(name, unit.waits.get(name, 0))


def _plot_units(views: Sequence[RunView]) -> str:
    names = {"load": "loader", "array": "array", "post": "post-processing", "row": "row unit", "store": "store"}
    units = [unit.unit for unit in views[0].units]
    series = {view.label: [unit.busy_share for unit in view.units] for view in views}
    rows = [names.get(unit, unit) for unit in units]
    return plots.grouped(rows, series, label="busy share of all cycles", colours=_colours(views), share=True)


def _plot_traffic(views: Sequence[RunView]) -> str:
    rows = [_STREAMS.get(name, name) for name in views[0].traffic]
    series = {view.label: [float(value) for value in view.traffic.values()] for view in views}
    return plots.grouped(rows, series, label="bytes on the bus", colours=_colours(views))


def _plot_storage(views: Sequence[RunView]) -> str:
    view = views[-1]
    sizes = view.storage()
    if not sizes:
        return ""
    series = {"int8, every weight": [float(before) for before, _ in sizes.values()],
              "as stored": [float(after) for _, after in sizes.values()]}
    return plots.grouped(list(sizes), series, label="bytes of weights", colours=(plots.DENSE, plots.SPARSE))


def _plot_cycles(facts: Mapping[str, Any], views: Sequence[RunView]) -> str:
    dense, sparse = (float(view.cycles or 0) for view in views)
    ideal = dense / facts["ideal_speedup"]
    texts = [f"{dense:,.0f}", f"{sparse:,.0f}   ({dense / sparse:.2f}x)", f"{ideal:,.0f}   ({facts['ideal_speedup']:.2f}x)"]
    rows = ["dense", views[1].label, "dense / ideal speed-up"]
    return plots.bars(
        rows, [dense, sparse, ideal], texts, label="cycles", colours=[plots.DENSE, plots.SPARSE, "#e2e8f0"],
        limits=(0, dense * 1.3),
    )  # fmt: skip


def _plot_accuracy(facts: Mapping[str, Any]) -> str:
    accuracy = facts["accuracy"]
    names = {"float_dense": "dense, float", "float_sparse": f"{_label(facts)}, float", "int8_sparse": f"{_label(facts)}, int8"}
    values = [float(accuracy[name]) for name in names]
    errors = [1.96 * math.sqrt(value * (1 - value) / accuracy["sentences"]) for value in values]
    low = min(0.5, math.floor((min(values) - max(errors)) * 20) / 20)
    texts = [f"{value:.1%}" for value in values]
    return plots.bars(
        list(names.values()), values, texts, label="accuracy; whiskers: 95 % confidence", errors=errors, share=True,
        colours=[plots.DENSE, "#5eada5", plots.SPARSE], limits=(low, 1.0),
    )  # fmt: skip


def _colours(views: Sequence[RunView]) -> list[str]:
    return [view.colour for view in views]


def _operator_rows(views: Sequence[RunView]) -> list[dict[str, Any]]:
    """One row an operator: of the last view, with the cycles of each."""
    names = [{operator["name"]: operator["cycles"] for operator in view.operators} for view in views]
    rows = []
    for operator in views[-1].operators:
        cycles = [table.get(operator["name"]) for table in names]
        rows.append(dict(operator) | {"all_cycles": cycles})
    return rows


# -- how numbers are written ------------------------------------------------------------------------------------------


def _thousands(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value / 1e3:.2f} kB"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _nice(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value == 0:
        return "0 s"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.2f} ms"
    return f"{value:.1f} s" if value < 60 else f"{value / 60:.1f} min"
