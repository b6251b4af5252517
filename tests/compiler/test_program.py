import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from compiler.compile import compile_network
from compiler.placement import RowPlacement
from compiler.program import FORMAT_VERSION, Program, ProgramFileError, TensorInfo, load
from hw.arch import PRESETS
from hw.numerics import MASK_BIAS, PARAM_DTYPE
from tests.compiler.random_networks import random_inputs, random_network

TINY = PRESETS["tiny"]
MASKED_SEED = next(
    s for s in range(100) if any(n.dtype == "keymask" for n in random_network(s, TINY).tensors.values())
)


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_network(random_network(MASKED_SEED, TINY), TINY)


@pytest.fixture
def path(program: Program, tmp_path: Path) -> Path:
    program.save(tmp_path / "x.nmf")
    return tmp_path / "x.nmf"


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 12), (3, 4, 6)])
@pytest.mark.parametrize(
    ("layout", "heads", "dtype"),
    [("columns", 1, "int8"), ("columns", 1, "int16"), ("transposed", 1, "int8"), ("transposed", 3, "int8")],
)
def test_tensor_layouts_are_inverse(shape: tuple[int, int, int], layout: str, heads: int, dtype: str) -> None:
    if shape[2] % heads:
        pytest.skip("heads do not divide the channels")
    info = TensorInfo(
        name="t",
        of="t",
        shape=shape,
        dtype=dtype,
        scale=1.0,
        layout=layout,
        heads=heads,  # type: ignore[arg-type]
        address=0,
        written=0,
        last_use=0,
        kept=True,
    )
    values = np.random.default_rng(0).integers(-128, 128, shape).astype(dtype)
    raw = info.to_memory(values, TINY)
    assert len(raw) == info.nbytes(TINY)
    back = info.from_memory(raw, TINY)
    assert back.dtype == np.dtype(dtype)
    assert_array_equal(back, values)


def test_columns_address_formula() -> None:
    """address = (row_tile * channels + channel) * T * itemsize + row in tile * itemsize; the tails of both batch entries
    share the last row tile"""
    info = TensorInfo(
        name="t",
        of="t",
        shape=(2, 6, 3),
        dtype="int16",
        scale=1.0,
        layout="columns",
        heads=1,
        address=0,
        written=0,
        last_use=0,
        kept=True,
    )
    values = np.arange(36, dtype=np.int16).reshape(2, 6, 3)
    raw = info.to_memory(values, TINY).view("<i2")
    for batch, row, channel in np.ndindex(2, 6, 3):
        tile, place = (batch, row) if row < 4 else (2, 2 * batch + row - 4)
        assert raw[(tile * 3 + channel) * 4 + place] == values[batch, row, channel]


def test_transposed_address_formula() -> None:
    """address = ((unit * blocks + block) * padded_rows + row) * L + feature mod L"""
    info = TensorInfo(
        name="t",
        of="t",
        shape=(2, 5, 12),
        dtype="int8",
        scale=1.0,
        layout="transposed",
        heads=2,
        address=0,
        written=0,
        last_use=0,
        kept=True,
    )
    values = np.arange(120).astype(np.int8).reshape(2, 5, 12)
    raw = info.to_memory(values, TINY).view(np.int8)
    for batch, row, channel in np.ndindex(2, 5, 12):
        head, feature = divmod(channel, 6)
        block = (batch * 2 + head) * 2 + feature // 4
        place = row + (batch if row >= 4 else 0)  # where the shared tile has the tail of this batch entry
        assert raw[(block * 8 + place) * 4 + feature % 4] == values[batch, row, channel]


def test_image_holds_code_constants_and_masks(program: Program) -> None:
    inputs = random_inputs(np.random.default_rng(0), program.network)
    image = program.memory_image(inputs)
    assert len(image) == program.memory_bytes
    assert image[: len(program.code)].tobytes() == program.code
    assert_array_equal(image[program.constants_address :][: len(program.constants)], program.constants)
    assert program.masks
    for table in program.masks:
        raw = image[table.address : table.address + table.batch * table.stride].reshape(
            table.batch, table.stride
        )
        place = RowPlacement(table.batch, table.keys, TINY.rows)
        entries = raw[:, : 8 * place.span(0)].copy().view(PARAM_DTYPE)
        for batch, keep in enumerate(inputs[table.tensor][:, 0]):
            whole = raw[batch, : 8 * place.span(batch)].copy().view(PARAM_DTYPE)
            assert_array_equal(np.flatnonzero(whole["bias"] == 0), place.own_rows(batch)[keep == 1])
        assert set(np.unique(entries["bias"])) <= {0, MASK_BIAS}
        assert (entries["mult"] == table.mult).all()
        assert (entries["shift"] == table.shift).all()
    for name in program.network.inputs:
        if program.tensor(name).layout != "keymask":
            assert_array_equal(program.read_tensor(image, name), inputs[name])


def test_inputs_are_checked(program: Program) -> None:
    inputs = random_inputs(np.random.default_rng(0), program.network)
    name, mask = program.network.inputs[0], program.masks[0].tensor
    value = inputs[name]
    cases: list[tuple[dict, type[Exception], str]] = [
        (
            {k: v for k, v in inputs.items() if k != name},
            ValueError,
            f"input '{name}' is missing; the program's inputs are",
        ),
        ({**inputs, "y": value}, ValueError, "unknown input 'y'"),
        ({**inputs, name: value[:, :, :0]}, ValueError, f"input '{name}' must have the shape .* not"),
        ({**inputs, name: value.astype(np.float32)}, TypeError, "must be an integer array, not float32"),
        ({**inputs, name: value.astype(np.int32) + 200}, ValueError, r"must be in -128..127"),
        ({**inputs, mask: inputs[mask] * 2}, ValueError, r"must be in 0..1"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            program.memory_image(given)
    with pytest.raises(KeyError, match="no tensor 'nothing'"):
        program.tensor("nothing")
    with pytest.raises(ValueError, match="is a key mask"):
        program.read_tensor(np.zeros(1, np.uint8), mask)
    program.memory_image({**inputs, mask: inputs[mask].astype(bool)})


def test_totals(program: Program) -> None:
    assert program.instruction_count == len(program.instructions) == len(program.code) // 64
    assert program.effective_macs <= program.macs
    assert program.ideal_cycles == program.effective_macs / 16
    assert "Program(arch='tiny', instructions=" in repr(program)
    spans = [i for operator in program.operators for span in operator.spans for i in range(*span)]
    assert sorted(spans) == list(
        range(program.instruction_count - 1)
    )  # each but HALT belongs to one operator


# -- file ----------------------------------------------------------------------------------------------------


def test_save_and_load(program: Program, path: Path) -> None:
    loaded = load(path)
    for item in fields(Program):
        if item.name not in ("constants", "network"):
            assert getattr(loaded, item.name) == getattr(program, item.name), item.name
    assert_array_equal(loaded.constants, program.constants)
    assert loaded.to_bytes() == program.to_bytes() == path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["x.nmf"]
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [
            "manifest.json",
            "code.bin",
            "weights.bin",
            "network.json",
            "network.bin",
        ]


def test_saving_leaves_nothing_behind_when_it_fails(program: Program, tmp_path: Path) -> None:
    (tmp_path / "x.nmf").mkdir()
    with pytest.raises(OSError, match="x.nmf"):
        program.save(tmp_path / "x.nmf")
    assert [p.name for p in tmp_path.iterdir()] == ["x.nmf"]
    with pytest.raises(FileNotFoundError):
        program.save(tmp_path / "nowhere" / "x.nmf")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.nmf")


def test_truncated_file(path: Path) -> None:
    whole = path.read_bytes()
    for size in [0, 1, 4, 30, *range(100, len(whole), len(whole) // 20), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ProgramFileError, match=r"x.nmf: not a program file, or a truncated one"):
            load(path)


def test_altered_byte_is_noticed_or_harmless(program: Program, path: Path) -> None:
    whole = path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    places = {*rng.integers(0, len(whole), 150), *range(60), *range(len(whole) - 340, len(whole))}
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            assert load(path).to_bytes() == whole  # a byte of the zip's own that nobody reads
        except ProgramFileError as error:
            assert "x.nmf" in str(error)
            refused += 1
    assert refused > 200


def _rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change members of the file, and make the zip whole again."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    path.write_bytes(buffer.getvalue())


def _signed(members: dict[str, bytes], change: Callable[[dict], None]) -> None:
    """Change the manifest and sign it again: a consistent file of another make."""
    manifest = json.loads(members["manifest.json"])
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, indent=1, sort_keys=True).encode()).hexdigest()
    members["manifest.json"] = json.dumps(manifest).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("manifest.json"), "manifest.json is missing"),
        (lambda m: m.pop("code.bin"), "code.bin is missing"),
        (
            lambda m: m.update({"weights.bin": m["weights.bin"][:-1] + b"x"}),
            "weights.bin does not match its checksum",
        ),
        (lambda m: m.update({"network.bin": b""}), "network.bin does not match its checksum"),
        (lambda m: m.update({"manifest.json": b"{"}), "manifest.json: "),
        (lambda m: m.update({"manifest.json": b"[]"}), "kind is not 'nmforge program'"),
        (
            lambda m: m.update({"manifest.json": m["manifest.json"].replace(b'"tiny"', b'"tinz"')}),
            "sha256 does not match",
        ),
        (lambda m: _signed(m, lambda x: x.update(kind="other")), "kind is not"),
        (
            lambda m: _signed(m, lambda x: x.update(format_version=FORMAT_VERSION + 1)),
            "format_version is 5, this nmforge reads 4: use a newer nmforge",
        ),
        (
            lambda m: _signed(m, lambda x: x.update(format_version=1)),
            "format_version is 1, this nmforge reads 4: compile the model again",
        ),
        (
            lambda m: _signed(m, lambda x: x.update(format_version="1")),
            "format_version must be a int, not '1'",
        ),
        (lambda m: _signed(m, lambda x: x.pop("memory_bytes")), "memory_bytes must be a int, not None"),
        (
            lambda m: _signed(m, lambda x: x["arch"].update(rows=5)),
            "arch: Arch.rows must be a positive power of two, not 5",
        ),
        (lambda m: _signed(m, lambda x: x["arch"].pop("rows")), "arch does not have the fields of Arch"),
        (
            lambda m: _signed(m, lambda x: x["tensors"][0].update(extra=1)),
            "tensors does not have the fields of TensorInfo",
        ),
        (lambda m: _signed(m, lambda x: x["files"].pop("code.bin")), "files.code.bin must be a dict"),
        (
            lambda m: _signed(m, lambda x: x["files"]["code.bin"].pop("bytes")),
            "files.code.bin.bytes must be a int",
        ),
    ],
)
def test_altered_file(path: Path, change: Callable[[dict[str, bytes]], None], message: str) -> None:
    _rewrite(path, change)
    with pytest.raises(ProgramFileError, match=f"x.nmf: .*{message}"):
        load(path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x.nmf"
    path.write_bytes(b"\x7fELF" + bytes(1000))
    with pytest.raises(ProgramFileError, match="not a program file"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ProgramFileError, match=r"manifest.json is missing"):
        load(path)


def test_damaged_network_is_named(program: Program, path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        members["network.json"] = members["network.json"].replace(b'"Linear"', b'"Linoar"')
        digest = hashlib.sha256(members["network.json"]).hexdigest()
        _signed(members, lambda manifest: manifest["files"]["network.json"].update(sha256=digest))

    _rewrite(path, change)
    with pytest.raises(ProgramFileError, match="network.json: unknown type 'Linoar'"):
        load(path)


def test_numpy_scalars_in_tables_are_written_as_numbers(program: Program) -> None:
    inputs = tuple(replace(item, scale=np.float32(0.5)) for item in program.inputs)  # type: ignore[arg-type]
    assert replace(program, inputs=inputs).to_bytes()
