"""What of a network runs where, and whether that is worth it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from compiler.exported import is_getitem, module_path, source_line
from compiler.partition import HostStage, Partition

if TYPE_CHECKING:
    from compiler.program import Program

__all__ = ["DynamicReport", "Report", "ReportRow", "VariantRow", "operator_macs", "partition_rows", "program_rows"]

aten = torch.ops.aten
Place = Literal["accelerator", "host"]


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One operator.

    Members
    -------
    name, operator, source, line
        Of the result; the aten operator; module path; line of the module's code, if torch knows it.
    place, stage
        Where it runs, and as part of which stage.
    shape
        Of the result.
    macs
        Multiply-accumulates of a product, 0 for anything else.
    bytes
        Its constants and results: float32 on the host, int8 on the accelerator.
    reason
        Why it is on the host.
    """

    name: str
    operator: str
    place: Place
    stage: int
    shape: tuple[int, ...]
    macs: int
    bytes: int
    reason: str = ""
    source: str = ""
    line: str = ""


@dataclass(frozen=True)
class Report:
    """All operators, in execution order; ``str(report)`` is a table.

    Members
    -------
    rows
        See `ReportRow`.
    moved
        Elements that go from host to accelerator or back.
    """

    rows: tuple[ReportRow, ...]
    moved: int = 0

    @property
    def macs(self) -> dict[Place, int]:
        """Multiply-accumulates by place."""
        return {place: sum(row.macs for row in self.rows if row.place == place) for place in ("accelerator", "host")}

    @property
    def host_share(self) -> float:
        """Part of the multiply-accumulates that the host does; 0 where there are none."""
        total = sum(self.macs.values())
        return self.macs["host"] / total if total else 0.0

    @property
    def host_work(self) -> int:
        """What the host does: multiply-accumulates, elements of other results, elements moved."""
        other = sum(prod(row.shape) for row in self.rows if row.place == "host" and not row.macs)
        return self.macs["host"] + other + self.moved

    @property
    def warning(self) -> str:
        """Says so when the host's work outweighs what the accelerator saves it; else empty."""
        saved = self.macs["accelerator"]
        if self.host_work <= saved:
            return ""
        worst = max((row for row in self.rows if row.place == "host"), key=lambda row: (row.macs, prod(row.shape)))
        return (
            f"the host's work ({self.host_work:,} operations and elements moved) outweighs what the accelerator saves "
            f"({saved:,} MACs); the largest part is {worst.operator} {worst.name!r} in "
            f"{worst.source or 'the module'}: {worst.reason}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "rows": [asdict(row) for row in self.rows], "moved": self.moved, "macs": dict(self.macs),
            "host_share": self.host_share, "host_work": self.host_work, "warning": self.warning,
        }  # fmt: skip

    def __str__(self) -> str:
        head = ("operator", "where", "stage", "result", "MACs", "bytes", "module", "why on the host")
        table = [head] + [
            (
                f"{row.operator} {row.name}", row.place, str(row.stage), "x".join(map(str, row.shape)), f"{row.macs:,}",
                f"{row.bytes:,}", row.source + (f" ({row.line})" if row.line else ""), row.reason,
            )
            for row in self.rows
        ]  # fmt: skip
        macs = self.macs
        total = (
            f"accelerator: {macs['accelerator']:,} MACs; host: {macs['host']:,} MACs ({self.host_share:.2%}); "
            f"{self.moved:,} elements moved between them"
        )
        return "\n".join([_aligned(table, right=(4, 5)), total, *([f"warning: {self.warning}"] if self.warning else [])])


@dataclass(frozen=True, kw_only=True)
class VariantRow:
    """One variant of a dynamic program.

    Members
    -------
    sizes
        Value of each dimension.
    programs, instructions, code_bytes
        Programs of the accelerator between host parts, and their code.
    memory_bytes
        Code of all variants, constants and the activations of this one.
    macs, macs_host
        Multiply-accumulates of accelerator and host.
    ideal_cycles
        At utilisation 1.
    """

    sizes: dict[str, int]
    programs: int
    instructions: int
    code_bytes: int
    memory_bytes: int
    macs: int
    macs_host: int
    ideal_cycles: float


@dataclass(frozen=True)
class DynamicReport:
    """Variants of a dynamic program, the smallest sizes first, and the operators of the largest; ``str(report)``: two tables."""

    variants: tuple[VariantRow, ...]
    largest: Report

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: those of the largest variant, and ``variants``."""
        return {"variants": [asdict(row) for row in self.variants], **self.largest.to_dict()}

    def __str__(self) -> str:
        names = tuple(self.variants[0].sizes)
        head = (*names, "programs", "instructions", "code bytes", "memory bytes", "MACs", "host MACs", "ideal cycles")
        table = [head] + [
            tuple(f"{value:,}" for value in (
                *row.sizes.values(), row.programs, row.instructions, row.code_bytes, row.memory_bytes, row.macs, row.macs_host,
                round(row.ideal_cycles),
            ))
            for row in self.variants
        ]  # fmt: skip
        return f"{_aligned(table, right=range(len(head)))}\n\nthe largest:\n{self.largest}"


def _aligned(table: Sequence[Sequence[str]], right: Container[int]) -> str:
    """Lines of equal columns; those of the numbers in ``right`` end together."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in table
    )
    return "\n".join(line.rstrip() for line in lines)


def partition_rows(found: Partition) -> tuple[ReportRow, ...]:
    """The rows of a partition, by exported operator."""
    return tuple(
        _row(found, node, number, isinstance(stage, HostStage))
        for number, stage in enumerate(found.stages)
        for node in stage.nodes
        if not is_getitem(node)
    )


def _row(found: Partition, node: fx.Node, stage: int, host: bool) -> ReportRow:
    value = node.meta["val"]
    results = [value] if isinstance(value, Tensor) else [part for part in value if isinstance(part, Tensor)]
    constants = [found.exported.constant(item) for item in node.all_input_nodes]
    sizes = [item[0].numel() for item in constants if item is not None and isinstance(item[0], Tensor)]
    size = sum(part.numel() for part in results) + sum(sizes)
    return ReportRow(
        name=node.name, operator=str(node.target).removeprefix("aten."), place="host" if host else "accelerator", stage=stage,
        shape=tuple(results[0].shape) if results else (), macs=operator_macs(node), bytes=size * (4 if host else 1),
        reason=found.reasons.get(node.name, ""), source=module_path(node), line=source_line(node),
    )  # fmt: skip


def operator_macs(node: fx.Node) -> int:
    """Multiply-accumulates of an exported operator: linear layers, products, attention, convolutions; else 0."""
    target, value = node.target, node.meta["val"]
    shapes = [tuple(item.meta["val"].shape) for item in node.all_input_nodes if isinstance(item.meta.get("val"), Tensor)]
    if not isinstance(value, Tensor):
        return 0
    if target is aten.linear.default:
        return value.numel() * shapes[0][-1]
    if target in (aten.mm.default, aten.bmm.default, aten.matmul.default):
        return value.numel() * shapes[0][-1]
    if target in (aten.addmm.default, aten.baddbmm.default):
        return value.numel() * shapes[1][-1]
    if target is aten.scaled_dot_product_attention.default:
        query, key, width = shapes[0], shapes[1] if len(shapes) > 1 else shapes[0], value.shape[-1]
        return prod(query[:-1]) * key[-2] * (query[-1] + width)
    if str(target).startswith(("aten.conv", "aten.convolution")):
        weight = shapes[1]
        return value.numel() * prod(weight[1:])
    return 0


def program_rows(program: Program, stage: int = 0) -> Iterable[ReportRow]:
    """The rows of a program that runs on the accelerator alone, by its operators."""
    for operator in program.operators:
        rows, _, cols = operator.shape
        yield ReportRow(
            name=operator.name, operator=operator.kind, place="accelerator", stage=stage, shape=(rows, cols),
            macs=operator.macs, bytes=operator.weight_bytes + rows * cols, source=operator.source,
        )  # fmt: skip


def moved_elements(stages: Sequence[Any]) -> int:
    """Elements of the inputs and outputs of programs."""
    return sum(prod(spec.shape) for program in stages for spec in (*program.inputs, *program.outputs))
