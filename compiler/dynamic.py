"""A compiled network for several shapes: a program for each, with weights that are stored once.

All of them have the same constants at the same address, and code one behind the other: one memory holds them, and where the
accelerator starts decides which one runs.

The file is a zip without compression, as that of `Program`: `manifest.json`; of each variant and stage, `v<i>s<j>.code.bin` and
`v<i>s<j>.network.json`, or `v<i>s<j>.host.json`; and, for all of them, `weights<i>.bin` (the constants), `arrays.bin` (of the
integer networks) and `host.safetensors`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from compiler.host import HostPart
from compiler.network_io import ArrayPool, network_from_bytes, network_to_bytes
from compiler.partitioned import PartitionedProgram, file_kind
from compiler.partitioned import load as load_fixed
from compiler.program import (
    FORMAT_VERSION,
    ModelTensor,
    Program,
    ProgramFileError,
    canonical_json,
    input_names,
    read_zip,
    sha256,
    write_whole,
    zip_bytes,
)
from compiler.report import DynamicReport, VariantRow
from compiler.shapes import Dim, DynamicShapes, Sizes, input_shapes, sizes_text
from hw.arch import Arch

__all__ = ["DynamicProgram", "load"]

KIND = "nmforge dynamic program"

AnyProgram = Program | PartitionedProgram


@dataclass(frozen=True, eq=False, kw_only=True)
class DynamicProgram:
    """A program for each allowed shape of a network's inputs.

    Members
    -------
    shapes
        Which dimensions vary, and what they may be.
    variants
        Sizes and program of each combination, the smallest sizes first.
    """

    shapes: DynamicShapes
    variants: tuple[tuple[Sizes, AnyProgram], ...]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{dim.name}={list(dim.values)}" for dim in self.shapes.dims)
        return f"DynamicProgram(arch={self.arch.name!r}, {sizes}, variants={len(self.variants)})"

    def at(self, **sizes: int) -> AnyProgram:
        """The program for one value of each dimension.

        Raises
        ------
        ValueError
            An unknown or missing dimension, or a value that was not compiled.
        """
        wanted = self.shapes.check(sizes)
        return next(program for found, program in self.variants if found == wanted)

    def sizes_of(self, inputs: Any) -> Sizes:
        """The sizes that inputs have: a tensor, tensors in order, or a dict by name.

        Raises
        ------
        ValueError
            A value that was not compiled (names input, dimension, value and what is allowed), wrong number or names of inputs.
        """
        return self.shapes.sizes(input_shapes(inputs, input_names(self.inputs), "the program"))

    def for_inputs(self, inputs: Any) -> AnyProgram:
        """The program for the shapes that inputs have; raises as `sizes_of`."""
        return self.at(**self.sizes_of(inputs))

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs of all variants."""
        return tuple(program for _, made in self.variants for program in _programs(made))

    @property
    def largest(self) -> AnyProgram:
        """That of the largest sizes."""
        return self.variants[-1][1]

    @property
    def arch(self) -> Arch:
        return self.largest.arch

    @property
    def inputs(self) -> tuple[ModelTensor, ...]:
        """Those of the largest sizes."""
        return self.largest.inputs

    @property
    def outputs(self) -> tuple[ModelTensor, ...] | tuple[str, ...]:
        """Those of the largest sizes."""
        return self.largest.outputs

    @property
    def instruction_count(self) -> int:
        """Instructions of all variants."""
        return sum(made.instruction_count for _, made in self.variants)

    @property
    def memory_bytes(self) -> int:
        """Of the variant that needs most, and with that for all: they share their bytes."""
        return max(made.memory_bytes for _, made in self.variants)

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Weights as dense int8, and as stored, of one variant."""
        return self.largest.weight_bytes

    def report(self) -> DynamicReport:
        """What each variant is made of; ``program.at(...).report()`` lists the operators of one."""
        return DynamicReport(tuple(_row(sizes, made) for sizes, made in self.variants), self.largest.report())

    # -- the file --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        write_whole(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's bytes; equal programs give equal bytes."""
        writer = _Writer()
        manifest: dict[str, Any] = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "dims": [[dim.name, list(dim.values)] for dim in self.shapes.dims],
            "places": [[name, axis, dim.name] for name, axis, dim in self.shapes.places],
            "variants": [
                {"sizes": sizes, **writer.variant(f"v{i}", made)} for i, (sizes, made) in enumerate(self.variants)
            ],
        }
        members = writer.finished()
        manifest["files"] = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in members.items()}
        manifest["sha256"] = sha256(canonical_json(manifest))
        return zip_bytes({"manifest.json": canonical_json(manifest), **members})


def _programs(made: AnyProgram) -> tuple[Program, ...]:
    return made.programs if isinstance(made, PartitionedProgram) else (made,)


def _row(sizes: Sizes, made: AnyProgram) -> VariantRow:
    report = made.report()
    return VariantRow(
        sizes=dict(sizes), programs=len(_programs(made)), instructions=made.instruction_count,
        code_bytes=sum(len(program.code) for program in _programs(made)), memory_bytes=made.memory_bytes,
        macs=report.macs["accelerator"], macs_host=report.macs["host"], ideal_cycles=made.ideal_cycles,
    )  # fmt: skip


class _Writer:
    """Members of a file; what variants have in common is stored once."""

    def __init__(self) -> None:
        self.members: dict[str, bytes] = {}
        self.arrays = ArrayPool()
        self.weights: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}

    def variant(self, name: str, made: AnyProgram) -> dict[str, Any]:
        """A variant's entry in the manifest."""
        if isinstance(made, Program):
            return {"stages": [self.program(f"{name}s0", made)], "partitioned": None}
        stages = [
            self.program(f"{name}s{i}", stage) if isinstance(stage, Program) else self.host(f"{name}s{i}", stage)
            for i, stage in enumerate(made.stages)
        ]
        return {"stages": stages, "partitioned": made.header()}

    def program(self, name: str, program: Program) -> dict[str, Any]:
        self.members[f"{name}.code.bin"] = program.code
        self.members[f"{name}.network.json"] = network_to_bytes(program.network, self.arrays)[0]
        data = program.constants.tobytes()
        member = self.weights.setdefault(sha256(data), f"weights{len(self.weights)}.bin")
        self.members[member] = data
        return {"program": program.header(), "weights": member}

    def host(self, name: str, part: HostPart) -> dict[str, Any]:
        keys = {}
        for constant, value in part.constants.items():
            stored = value.contiguous().clone()
            keys[constant] = sha256(save_tensors({"": stored}))
            self.tensors[keys[constant]] = stored
        self.members[f"{name}.host.json"] = part.structure()
        return {"constants": keys}

    def finished(self) -> dict[str, bytes]:
        return {**self.members, "arrays.bin": self.arrays.to_bytes(), "host.safetensors": save_tensors(self.tensors)}


def load(path: str | os.PathLike[str]) -> Program | PartitionedProgram | DynamicProgram:
    """Read a program file of any kind.

    Raises
    ------
    FileNotFoundError
        No such file.
    ProgramFileError
        Not a program file, truncated, altered, or of another format; a host operator that is not allowed; variants that are not
        what the manifest says.
    """
    data = Path(path).read_bytes()
    if file_kind(data) != KIND:
        return load_fixed(path)
    try:
        return _Reader(data).program()
    except ProgramFileError as error:
        raise ProgramFileError(f"{os.fspath(path)}: {error}") from error.__cause__


class _Reader:
    """A file's members; arrays of different variants are views of the same bytes."""

    def __init__(self, data: bytes) -> None:
        self.members, self.manifest = read_zip(data, KIND)
        self.weights: dict[str, NDArray[np.uint8]] = {}
        try:
            self.tensors = load_tensors(self.member("host.safetensors"))
        except SafetensorError as error:
            raise ProgramFileError(f"host.safetensors: {error}") from error

    def member(self, name: str) -> bytes:
        if name not in self.members:
            raise ProgramFileError(f"{name} is missing")
        return self.members[name]

    def program(self) -> DynamicProgram:
        try:
            dims = {name: Dim(name, values) for name, values in self.manifest["dims"]}
            shapes = DynamicShapes(tuple((str(name), int(axis), dims[dim]) for name, axis, dim in self.manifest["places"]))
            variants = tuple(
                (dict(entry["sizes"]), self.variant(f"v{i}", entry)) for i, entry in enumerate(self.manifest["variants"])
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ProgramFileError(f"manifest.json: {error!r}") from error
        except ValueError as error:
            if isinstance(error, ProgramFileError):
                raise
            raise ProgramFileError(f"manifest.json: {error}") from error
        for problem in _problems(shapes, variants):
            raise ProgramFileError(f"manifest.json: variants: {problem}")
        return DynamicProgram(shapes=shapes, variants=variants)

    def variant(self, name: str, entry: Mapping[str, Any]) -> AnyProgram:
        stages = tuple(
            self.fixed(f"{name}s{i}", stage) if "program" in stage else self.host(f"{name}s{i}", stage)
            for i, stage in enumerate(entry["stages"])
        )
        if entry["partitioned"] is not None:
            return PartitionedProgram.from_header(entry["partitioned"], stages)
        if len(stages) != 1 or not isinstance(stages[0], Program):
            raise ProgramFileError(f"manifest.json: {name}: not partitioned, but not one program")
        return stages[0]

    def fixed(self, name: str, entry: Mapping[str, Any]) -> Program:
        structure, member = self.member(f"{name}.network.json"), str(entry["weights"])
        if member not in self.weights:
            self.weights[member] = np.frombuffer(self.member(member), np.uint8)
        try:
            network = network_from_bytes(structure, self.member("arrays.bin"))
        except (ValueError, KeyError, TypeError) as error:
            raise ProgramFileError(f"{name}.network.json: {error}") from error
        return Program.from_header(entry["program"], self.member(f"{name}.code.bin"), self.weights[member], network)

    def host(self, name: str, entry: Mapping[str, Any]) -> HostPart:
        try:
            constants = {constant: self.tensors[key] for constant, key in entry["constants"].items()}
            return HostPart.from_structure(self.member(f"{name}.host.json"), constants)
        except (ValueError, KeyError, TypeError) as error:
            raise error if isinstance(error, ProgramFileError) else ProgramFileError(f"{name}.host.json: {error}") from error


def _problems(shapes: DynamicShapes, variants: tuple[tuple[Sizes, AnyProgram], ...]) -> Iterator[str]:
    """What contradicts the dimensions: a variant that is missing, or whose inputs have other sizes than it says."""
    if not shapes.places or [sizes for sizes, _ in variants] != list(shapes.combinations()):
        yield "not one for each combination of dimensions"
        return
    names = input_names(variants[-1][1].inputs)
    for sizes, made in variants:
        given = {spec.name: spec.shape for spec in made.inputs}
        if list(given) != names or any(name not in given for name, _, _ in shapes.places):
            yield f"{sizes_text(sizes)} has the inputs {', '.join(given)}, not {', '.join(names)}"
        elif shapes.sizes(given) != sizes or made.arch != variants[-1][1].arch:
            yield f"the program for {sizes_text(sizes)} has other shapes or another arch"
