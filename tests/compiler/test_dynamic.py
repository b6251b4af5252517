"""Dynamic programs: choice by shape, one memory, one file, the RTL."""

import io
import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compiler.compile import compile_model
from compiler.dynamic import DynamicProgram, load
from compiler.partitioned import PartitionedProgram
from compiler.program import Program, ProgramFileError, canonical_json, sha256
from compiler.shapes import Dim
from sim.compare import compare
from sim.simulate import simulate
from tests.compiler.dynamic_networks import Causal, Masked

LENGTHS, BATCHES = (3, 6), (1, 2)


def _inputs(batch: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, length, 16), "mask": (torch.arange(length) < length - 1).long().expand(batch, -1)}


@pytest.fixture(scope="module")
def module() -> Masked:
    torch.manual_seed(0)
    return Masked(16).eval()


@pytest.fixture(scope="module")
def program(module: Masked) -> DynamicProgram:
    batch, n = Dim("batch", BATCHES), Dim("n", LENGTHS)
    dims = {0: batch, 1: n}
    made = compile_model(
        module, _inputs(1, 3), arch="tiny", calibration=[_inputs(2, 6)], dynamic={"x": dims, "mask": dims}, host="forbid"
    )
    assert isinstance(made, DynamicProgram)
    return made


@pytest.fixture(scope="module")
def partitioned() -> DynamicProgram:
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (1, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning about host work: the network is tiny
        made = compile_model(Causal().eval(), tokens, arch="tiny", calibration=[tokens], dynamic={"tokens": {1: LENGTHS}})
    assert isinstance(made, DynamicProgram)
    return made


def test_what_it_is(program: DynamicProgram) -> None:
    assert repr(program) == "DynamicProgram(arch='tiny', batch=[1, 2], n=[3, 6], variants=4)"
    assert [sizes for sizes, _ in program.variants] == [{"batch": b, "n": n} for b in BATCHES for n in LENGTHS]
    assert program.at(n=3, batch=2).inputs[0].shape == (2, 3, 16) and program.inputs[0].shape == (2, 6, 16)
    assert program.for_inputs(_inputs(1, 6)) is program.at(batch=1, n=6) and program.largest is program.at(batch=2, n=6)
    assert program.instruction_count == sum(made.instruction_count for made in program.programs)
    assert program.memory_bytes == program.largest.memory_bytes and program.weight_bytes == program.largest.weight_bytes
    rows = program.report().variants
    assert [row.sizes for row in rows] == [sizes for sizes, _ in program.variants]
    assert rows[0].macs < rows[1].macs < rows[3].macs and {row.macs_host for row in rows} == {0}
    table = str(program.report()).splitlines()
    assert table[0].split()[:3] == ["batch", "n", "programs"] and table[6] == "the largest:"
    assert program.report().to_dict()["variants"][3]["instructions"] == program.largest.instruction_count


def test_one_memory_holds_all(program: DynamicProgram) -> None:
    """Code one behind the other, then constants that are the same bytes for all."""
    ranges = [(part.code_address, part.code_address + len(part.code)) for part in program.programs]
    assert all(stop <= start for (_, stop), (start, _) in zip(ranges, ranges[1:]))
    assert {part.constants_address for part in program.programs} == {program.programs[0].constants_address}
    assert ranges[-1][1] <= program.programs[0].constants_address
    assert all(part.constants is program.programs[0].constants for part in program.programs)
    alone = sum(len(part.constants) for part in program.programs)
    assert len(program.programs[0].constants) < alone / 2
    image = np.zeros(program.memory_bytes, np.uint8)
    for part in program.programs:
        own = part.memory_image({t.tensor: np.zeros(part.tensor(t.tensor).shape, np.int8) for t in part.inputs})
        image[part.code_address : part.code_address + len(part.code)] = own[part.code_address :][: len(part.code)]
    for part in program.programs:
        assert image[part.code_address :][: len(part.code)].tobytes() == part.code


@pytest.mark.parametrize("sizes", [(1, 3), (2, 6)])
def test_the_rtl_runs_it(program: DynamicProgram, sizes: tuple[int, int]) -> None:
    given = _inputs(*sizes)
    run = simulate(program, given)
    assert run.bit_exact and run.sizes == dict(zip(("batch", "n"), sizes, strict=True)) == run.to_dict()["sizes"]
    assert simulate(program, given, engine="cycle").cycles == run.cycles
    assert simulate(program, given, engine="reference").outputs_sha256 == run.outputs_sha256


def test_a_short_input_takes_its_own_time(program: DynamicProgram, module: Masked) -> None:
    cycles = [simulate(program, _inputs(2, length), engine="cycle").cycles for length in LENGTHS]
    assert cycles[0] is not None and cycles[1] is not None and cycles[0] < 0.8 * cycles[1]
    alone = compile_model(module, _inputs(2, 3), arch="tiny", calibration=[_inputs(2, 6)])
    assert simulate(alone, engine="cycle").cycles == cycles[0]
    assert len(compare(program, module, _inputs(1, 3)).layers) == len(compare(program, module, _inputs(2, 6)).layers)


def test_a_partitioned_program_on_the_rtl(partitioned: DynamicProgram) -> None:
    for length in LENGTHS:
        tokens = torch.randint(0, 50, (1, length))
        run = simulate(partitioned, tokens)
        assert run.bit_exact and run.cycles == simulate(partitioned, tokens.numpy(), engine="cycle").cycles


def test_wrong_shapes(program: DynamicProgram) -> None:
    for engine in ("isa", "reference", "cycle"):
        with pytest.raises(ValueError, match="input 'x', dimension 1 is 5, but n may be 3 or 6 in this program"):
            simulate(program, _inputs(1, 5), engine=engine)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input 'x', dimension 0 is 3, but batch may be 1 or 2"):
        simulate(program, _inputs(3, 6))
    with pytest.raises(ValueError, match="input 'mask', dimension 1 is 6, but input 'x', dimension 1 is 3: both are n"):
        simulate(program, {"x": torch.randn(1, 3, 16), "mask": _inputs(1, 6)["mask"]})
    with pytest.raises(ValueError, match=r"'x' must have the shape \(1, 3, 16\), not \(1, 3, 8\)"):
        simulate(program, {"x": torch.randn(1, 3, 8), "mask": _inputs(1, 3)["mask"]})
    with pytest.raises(ValueError, match=r"several shapes: give inputs of one, or simulate program.at\(batch=2, n=6\)"):
        simulate(program, engine="cycle")
    with pytest.raises(ValueError, match="the program's inputs are x, mask, not x"):
        simulate(program, {"x": torch.randn(1, 3, 16)})
    with pytest.raises(ValueError, match="n may be 3 or 6 in this program, not 4"):
        program.at(batch=1, n=4)


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["program", "partitioned"])
def test_file(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made: DynamicProgram = request.getfixturevalue(name)
    path = tmp_path / "x.nmf"
    made.save(path)
    again = load(path)
    assert isinstance(again, DynamicProgram) and again.to_bytes() == path.read_bytes() == made.to_bytes()
    assert again.report() == made.report() and again.shapes == made.shapes
    given = _inputs(2, 3) if name == "program" else torch.randint(0, 50, (1, 3))
    run = simulate(again, given, engine="isa")
    assert run.bit_exact and run.outputs_sha256 == simulate(made, given, engine="isa").outputs_sha256
    assert all(part.constants is again.programs[0].constants for part in again.programs)
    made.largest.save(path)
    assert isinstance(load(path), Program if name == "program" else PartitionedProgram)


def test_weights_are_stored_once(program: DynamicProgram) -> None:
    with zipfile.ZipFile(io.BytesIO(program.to_bytes())) as file:
        sizes = {entry.filename: entry.file_size for entry in file.infolist()}
    assert [name for name in sizes if name.startswith("weights")] == ["weights0.bin"]
    with zipfile.ZipFile(io.BytesIO(program.largest.to_bytes())) as file:
        alone = file.getinfo("network.bin").file_size
    assert sizes["arrays.bin"] <= 1.1 * alone


def _altered(data: bytes, change: object = None, **members: bytes | None) -> bytes:
    """A file with other members (None: without), or with a manifest that `change` had; its checksums fit."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        content = {entry.filename: old.read(entry) for entry in old.infolist()}
    manifest = json.loads(content["manifest.json"])
    del manifest["sha256"]
    if callable(change):
        change(manifest)
    for name, value in members.items():
        member = name.replace("__", ".")
        if value is None:
            del content[member]
        else:
            content[member] = value
    content["manifest.json"] = canonical_json(manifest | {"sha256": sha256(canonical_json(manifest))})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        for member, raw in content.items():
            new.writestr(member, raw)
    return buffer.getvalue()


@pytest.mark.parametrize(("change", "members", "message"), [
    (None, {"arrays__bin": b"x"}, "arrays.bin does not match its checksum"),
    (None, {"v1s0__code__bin": None}, "v1s0.code.bin is missing"),
    (None, {"weights0__bin": None}, "weights0.bin is missing"),
    (lambda m: m["variants"].pop(), {}, "variants: not one for each combination of dimensions"),
    (lambda m: m["dims"][1][1].append(9), {}, "variants: not one for each combination"),
    (lambda m: m["dims"][1][1].append(-9), {}, "Dim 'n' may be whole numbers from 1 on"),
    (lambda m: m["places"][0].__setitem__(0, "y"), {}, r"variants: batch = 1, n = 3 has the inputs x, mask"),
    (lambda m: m["variants"][0].update(m["variants"][1] | {"sizes": m["variants"][0]["sizes"]}), {},
     "variants: the program for batch = 1, n = 3 has other shapes"),
    (lambda m: m["variants"][0]["stages"][0].update(weights="weights7.bin"), {}, "weights7.bin is missing"),
    (lambda m: m["variants"][0]["stages"][0]["program"].pop("arch"), {}, "arch must be a dict"),
    (lambda m: m["variants"][0]["stages"].clear(), {}, "v0: not partitioned, but not one program"),
    (lambda m: m.pop("places"), {}, "manifest.json: KeyError"),
    (lambda m: m.update(kind="nmforge program"), {}, "code.bin"),
])  # fmt: skip
def test_altered_files(
    program: DynamicProgram, tmp_path: Path, change: object, members: dict[str, bytes | None], message: str
) -> None:
    path = tmp_path / "x.nmf"
    path.write_bytes(_altered(program.to_bytes(), change, **members))
    with pytest.raises(ProgramFileError, match=rf"x.nmf: .*{message}"):
        load(path)


def test_altered_host_parts(partitioned: DynamicProgram, tmp_path: Path) -> None:
    path = tmp_path / "x.nmf"
    path.write_bytes(_altered(partitioned.to_bytes(), lambda m: m["variants"][0]["stages"][0]["constants"].update(x="none")))
    with pytest.raises(ProgramFileError, match="x.nmf: v0s0.host.json: 'none'"):
        load(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ProgramFileError, match="x.nmf: not a program file, or a truncated one"):
        load(path)
