"""A compiled network of several parts: programs for the accelerator, and host parts between them.

The file is a zip without compression, as that of `Program`: `manifest.json`, and of each stage either
`stage<i>.nmf` (a program file) or `stage<i>.json` and `stage<i>.safetensors` (a `HostPart`).
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compiler.host import HostPart
from compiler.ops import QuantNetwork
from compiler.program import (
    FORMAT_VERSION,
    ModelTensor,
    OperatorInfo,
    Program,
    ProgramFileError,
    canonical_json,
    program_from_bytes,
    read_zip,
    record,
    sha256,
    write_whole,
    zip_bytes,
)
from compiler.program import load as load_whole
from compiler.report import Report, ReportRow
from hw.arch import Arch

__all__ = ["PartitionedProgram", "file_kind", "load"]

KIND = "nmforge partitioned program"


@dataclass(frozen=True, eq=False, kw_only=True)
class PartitionedProgram:
    """Programs and host parts, in execution order, that compute one network.

    Members
    -------
    stages
        Each takes tensors by name from the inputs and from the stages before it. A program's inputs and outputs
        (`ModelTensor`) have the names and shapes of the network's tensors.
    inputs
        The model's arguments: name, shape, dtype (``kind`` and ``scale`` mean nothing here).
    outputs
        Names of the model's results, in order.
    rows
        Of the report.
    """

    stages: tuple[HostPart | Program, ...]
    inputs: tuple[ModelTensor, ...]
    outputs: tuple[str, ...]
    rows: tuple[ReportRow, ...]
    meta: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"PartitionedProgram(arch={self.arch.name!r}, programs={len(self.programs)}, "
            f"host_parts={len(self.stages) - len(self.programs)}, memory_bytes={self.memory_bytes})"
        )

    @property
    def programs(self) -> tuple[Program, ...]:
        """The parts of the accelerator."""
        return tuple(stage for stage in self.stages if isinstance(stage, Program))

    @property
    def arch(self) -> Arch:
        return self.programs[0].arch

    def report(self) -> Report:
        """Every operator with its place, MACs, bytes and, on the host, the reason."""
        moved = sum(_size(spec) for program in self.programs for spec in (*program.inputs, *program.outputs))
        return Report(self.rows, moved)

    # -- what a Program has, too -----------------------------------------------------------------------------

    @property
    def operators(self) -> tuple[OperatorInfo, ...]:
        """Those of all programs."""
        return tuple(operator for program in self.programs for operator in program.operators)

    @property
    def instruction_count(self) -> int:
        return sum(program.instruction_count for program in self.programs)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the accelerator, as if dense."""
        return sum(program.macs for program in self.programs)

    @property
    def effective_macs(self) -> float:
        return sum(program.effective_macs for program in self.programs)

    @property
    def ideal_cycles(self) -> float:
        return sum(program.ideal_cycles for program in self.programs)

    @property
    def memory_bytes(self) -> int:
        """Of the program that needs most: they run one after the other."""
        return max(program.memory_bytes for program in self.programs)

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Weights as dense int8, and as stored."""
        sizes = [program.weight_bytes for program in self.programs]
        return sum(dense for dense, _ in sizes), sum(stored for _, stored in sizes)

    @property
    def networks(self) -> Iterator[QuantNetwork]:
        """The integer networks of the programs."""
        return (program.network for program in self.programs)

    # -- the file --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        write_whole(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's bytes; equal programs give equal bytes."""
        members: dict[str, bytes] = {}
        for i, stage in enumerate(self.stages):
            if isinstance(stage, Program):
                members[f"stage{i}.nmf"] = stage.to_bytes()
            else:
                members[f"stage{i}.json"], members[f"stage{i}.safetensors"] = stage.to_bytes()
        manifest: dict[str, Any] = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "stages": ["program" if isinstance(stage, Program) else "host" for stage in self.stages],
            **self.header(),
            "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in members.items()},
        }
        manifest["sha256"] = sha256(canonical_json(manifest))
        return zip_bytes({"manifest.json": canonical_json(manifest), **members})


    def header(self) -> dict[str, Any]:
        """All but the stages, as JSON values."""
        return {
            "inputs": [asdict(spec) for spec in self.inputs], "outputs": list(self.outputs),
            "rows": [asdict(row) for row in self.rows], "meta": self.meta,
        }  # fmt: skip

    @classmethod
    def from_header(cls, header: Mapping[str, Any], stages: tuple[HostPart | Program, ...]) -> PartitionedProgram:
        """Inverse of `header`.

        Raises
        ------
        ProgramFileError
            Damaged.
        """
        try:
            return cls(
                stages=stages,
                inputs=tuple(record(ModelTensor, item, "inputs") for item in header["inputs"]),
                outputs=tuple(str(name) for name in header["outputs"]),
                rows=tuple(record(ReportRow, item, "rows") for item in header["rows"]),
                meta={str(key): str(value) for key, value in header["meta"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ProgramFileError(f"manifest.json: {error!r}") from error


def _size(spec: ModelTensor) -> int:
    size = 1
    for length in spec.shape:
        size *= length
    return size


def load(path: str | os.PathLike[str]) -> Program | PartitionedProgram:
    """Read a program file of fixed shapes; `compiler.dynamic.load` reads any.

    Raises
    ------
    FileNotFoundError
        No such file.
    ProgramFileError
        Not a program file, truncated, altered, or of another format; a host operator that is not allowed.
    """
    data = Path(path).read_bytes()
    if file_kind(data) != KIND:
        return load_whole(path)
    try:
        return _read(data)
    except ProgramFileError as error:
        raise ProgramFileError(f"{os.fspath(path)}: {error}") from error.__cause__


def file_kind(data: bytes) -> str:
    """What a file says it is; empty if it says nothing."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return str(json.loads(archive.read("manifest.json")).get("kind", ""))
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, NotImplementedError, RuntimeError, AttributeError):
        return ""


def _read(data: bytes) -> PartitionedProgram:
    members, manifest = read_zip(data, KIND)
    try:
        stages = tuple(_stage(i, kind, members) for i, kind in enumerate(manifest["stages"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ProgramFileError(f"manifest.json: {error!r}") from error
    return PartitionedProgram.from_header(manifest, stages)


def _stage(number: int, kind: str, members: Mapping[str, bytes]) -> HostPart | Program:
    wanted = [f"stage{number}.nmf"] if kind == "program" else [f"stage{number}.json", f"stage{number}.safetensors"]
    for name in wanted:
        if name not in members:
            raise ProgramFileError(f"{name} is missing")
    if kind == "program":
        return program_from_bytes(members[wanted[0]])
    try:
        return HostPart.from_bytes(*(members[name] for name in wanted))
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramFileError(f"{wanted[0]}: {error}") from error
