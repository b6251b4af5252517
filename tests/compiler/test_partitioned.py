"""Partitioned programs: compile, file, and what they say of themselves."""

import io
import json
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from compiler.compile import compile_model
from compiler.graph import CompileError
from compiler.partitioned import PartitionedProgram, load
from compiler.program import Program, ProgramFileError, canonical_json, sha256
from tests.compiler.modules import Apply
from tests.compiler.networks import retriever


@pytest.fixture(scope="module")
def program() -> PartitionedProgram:
    module, inputs = retriever()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning about host work: the network is tiny
        made = compile_model(module, inputs, arch="tiny", calibration=[inputs])
    assert isinstance(made, PartitionedProgram)
    return made


def test_what_it_is(program: PartitionedProgram) -> None:
    assert repr(program).startswith("PartitionedProgram(arch='tiny', programs=2, host_parts=3")
    assert [(spec.name, spec.shape, spec.dtype) for spec in program.inputs] == [
        ("ids", (2, 6), "torch.int64"), ("mask", (2, 6), "torch.int64"),
    ]  # fmt: skip
    first, last = program.programs
    assert [spec.name for spec in first.inputs] == ["embedding", "mask", "_to_copy"]  # the mask twice: keys, and a factor
    assert first.tensor("embedding").dtype == "int16"  # a residual reads it: not rounded to 8 bits
    assert program.macs == first.macs + last.macs and program.instruction_count > first.instruction_count
    assert program.memory_bytes == max(first.memory_bytes, last.memory_bytes)
    assert len(program.operators) == len(first.operators) + len(last.operators)


def test_file(program: PartitionedProgram, tmp_path: Path) -> None:
    path = tmp_path / "x.nmf"
    program.save(path)
    again = load(path)
    assert isinstance(again, PartitionedProgram)
    assert again.to_bytes() == program.to_bytes()
    assert again.report() == program.report()
    program.programs[0].save(path)
    assert isinstance(load(path), Program)


def _changed(data: bytes, name: str, content: bytes | None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            if entry.filename != name:
                new.writestr(entry, old.read(entry))
            elif content is not None:
                new.writestr(entry, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("stage0.json", b"{}", "stage0.json does not match its checksum"),
        ("stage1.nmf", None, "stage1.nmf is missing"),
        ("manifest.json", b"{}", "not a program file|kind is not"),
    ],
)
def test_damaged_files(program: PartitionedProgram, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.nmf"
    path.write_bytes(_changed(program.to_bytes(), name, content))
    with pytest.raises(ProgramFileError, match=rf"x.nmf: .*({message})"):
        load(path)


def test_a_file_with_another_operator_is_refused(program: PartitionedProgram, tmp_path: Path) -> None:
    data = program.to_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        stage = archive.read("stage0.json").replace(b"aten.embedding.default", b"aten.from_file.default")
        manifest = json.loads(archive.read("manifest.json"))
    manifest["files"]["stage0.json"] = {"bytes": len(stage), "sha256": sha256(stage)}
    del manifest["sha256"]
    manifest["sha256"] = sha256(canonical_json(manifest))
    path = tmp_path / "x.nmf"
    path.write_bytes(_changed(_changed(data, "stage0.json", stage), "manifest.json", canonical_json(manifest)))
    with pytest.raises(ProgramFileError, match="stage0.json: aten.from_file.default is none of the operators"):
        load(path)


# -- options and bad input of compile ----------------------------------------------------------------------------------


def test_forbid_names_node_line_and_way_out() -> None:
    module, inputs = retriever()
    with pytest.raises(CompileError) as error:
        compile_model(module, inputs, arch="tiny", calibration=[inputs], host="forbid")
    lines = str(error.value).splitlines()
    assert lines[0].startswith('host="forbid", but the accelerator cannot do all of it: compile with host="allow"')
    assert lines[1].startswith("  embed (networks.py:") and lines[1].endswith("a look-up, no arithmetic")
    assert len(lines) == 7 and lines[-1].startswith("  ... and")


def test_forbid_lets_whole_programs_pass() -> None:
    x = torch.randn(9, 24)
    assert isinstance(compile_model(nn.Linear(24, 4), x, arch="tiny", calibration=[x], host="forbid"), Program)


def test_bad_options_and_data() -> None:
    module, (ids, mask) = retriever()
    with pytest.raises(ValueError, match="host must be one of allow, forbid, not 'perhaps'"):
        compile_model(module, (ids, mask), arch="tiny", host="perhaps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input 'ids' must be int64 .* host operators have fixed shapes"):
        compile_model(module, (ids, mask), arch="tiny", calibration=[(ids[:1], mask[:1])])
    with pytest.raises(ValueError, match="at least one calibration batch"):
        compile_model(module, (ids, mask), arch="tiny", calibration=[])


def test_nothing_for_the_accelerator() -> None:
    with pytest.raises(CompileError, match=r"(?s)nothing of the module is work for the accelerator: .*cumsum"):
        compile_model(Apply(lambda m, x: x.cumsum(0)), torch.randn(3, 4), arch="tiny")


def test_unbounded_values_at_calibration() -> None:
    module, x = Apply(lambda m, x: m.a((x / 0).cumsum(0)), a=nn.Linear(4, 4)), torch.ones(3, 4)
    with pytest.raises(CompileError, match="calibration: .* has a NaN or an infinity"):
        compile_model(module, x, arch="tiny", calibration=[x])


def test_a_constant_result() -> None:
    module = Apply(lambda m, x: (m.a(x), torch.ones(3)), a=nn.Linear(4, 4))
    with pytest.raises(CompileError, match="output 'ones' does not depend on an input"):
        compile_model(module, torch.ones(3, 4), arch="tiny")


def test_host_work_that_outweighs_warns() -> None:
    function = lambda m, x: m.b(m.a(x).cumsum(0).cumsum(1).cumsum(0).cumsum(1).cumsum(0))
    module = Apply(function, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"the host's work \(\d+ operations .* outweighs what the accelerator saves \(96 MACs\)"):
        compile_model(module, x, arch="tiny", calibration=[x])
