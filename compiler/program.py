"""A compiled program: everything that a simulator, a driver or a report needs, in one value and one file.

The file is a zip without compression: `manifest.json` (what the program is, and the SHA-256 of every other
member), `code.bin` (instructions), `weights.bin` (constants), `network.json` + `network.bin` (the integer
network, for the reference). Nothing is pickled, and equal programs are equal files, byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from compiler.network_io import network_from_bytes, network_to_bytes
from compiler.ops import QuantNetwork
from compiler.placement import PatchPlacement, Placement, RowPlacement
from hw.arch import Arch
from hw.isa import INSTRUCTION_BYTES, Instruction
from hw.numerics import MASK_BIAS, PARAM_DTYPE

if TYPE_CHECKING:
    from compiler.report import Report

__all__ = [
    "FORMAT_VERSION",
    "MaskTable",
    "ModelTensor",
    "OperatorInfo",
    "Program",
    "ProgramFileError",
    "TensorInfo",
    "canonical_json",
    "input_names",
    "load",
    "mask_params",
    "program_from_bytes",
    "read_zip",
    "record",
    "sha256",
    "write_whole",
    "zip_bytes",
]

FORMAT_VERSION = 4
"""Of the file: 4 has products of activations. A reader refuses other versions."""

KIND = "nmforge program"
_MEMBERS = ("code.bin", "weights.bin", "network.json", "network.bin")
_EPOCH = (1980, 1, 1, 0, 0, 0)

Layout = Literal["columns", "keys", "transposed", "keymask"]
Kind = Literal[
    "linear", "attention", "pointwise", "convolution", "pooling", "matmul", "rearrangement", "product", "softmax",
]


class ProgramFileError(ValueError):
    """A program file that cannot be used; the message names the file and the member or field."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor in memory: (batch, rows, channels), real value = scale * integer.

    layout ``"columns"``, ``"keys"`` and ``"transposed"`` are those of docs/numerics.md; ``"keymask"`` tensors exist only
    as the parameter tables that `Program.memory_image` makes of them (address 0, no bytes). `heads` is 1
    except for transposed tensors. `of` names the network's tensor: a copy in a second layout has a name of
    its own. The tensor is complete in memory after instruction `written` (-1: the host wrote it), and stays
    to the end if `kept`, else at least until instruction `last_use` has completed. `patches`: (height, width, patches from top
    to bottom, from left to right) of an image in patches (`compiler.placement.PatchPlacement`). `pitch`: columns from one row
    tile to the next, if they are not the channels (layouts "columns" and "keys").
    """

    name: str
    of: str
    shape: tuple[int, int, int]
    dtype: Literal["int8", "int16", "keymask"]
    scale: float
    layout: Layout
    heads: int
    address: int
    written: int
    last_use: int
    kept: bool
    patches: tuple[int, int, int, int] | None = None
    pitch: int = 0

    def placement(self, arch: Arch) -> RowPlacement:
        """Where its token rows lie; for images that are not stored in patches."""
        return RowPlacement(self.shape[0], self.shape[1], arch.rows)

    def stored(self, arch: Arch) -> Placement:
        """Where its token rows lie, in layout "columns"."""
        if self.patches is None:
            return self.placement(arch)
        height, width, *grid = self.patches
        return PatchPlacement(self.shape[0], height, width, arch.rows, arch.row_groups, (grid[0], grid[1]))

    def grid(self, arch: Arch) -> tuple[int, ...]:
        """Shape of the stored array."""
        batch, _, channels = self.shape
        place = self.placement(arch)
        if self.layout in ("columns", "keys"):
            tiles = self.stored(arch).tiles if self.layout == "columns" else batch * place.own_tiles
            return tiles, self.pitch or channels, arch.rows
        if self.layout == "transposed":
            blocks = -(-channels // self.heads // arch.lanes)
            return batch, self.heads, blocks, place.own_tiles * arch.rows, arch.lanes
        return (0,)

    def nbytes(self, arch: Arch) -> int:
        """Bytes in memory, padding included."""
        return int(np.prod(self.grid(arch))) * self._dtype.itemsize

    def to_memory(self, values: NDArray[np.integer], arch: Arch) -> NDArray[np.uint8]:
        """Bytes of the stored tensor; rows and features that pad it are zero."""
        channels, grid = self.shape[2], self.grid(arch)
        if self.layout == "transposed":
            batch, heads, blocks, rows, lanes = grid
            padded = np.zeros((batch * rows, heads, blocks * lanes), np.int8)
            padded[self._rows(arch), :, : channels // heads] = values.reshape(*self.shape[:2], heads, -1)
            stored = padded.reshape(batch, rows, heads, blocks, lanes).transpose(0, 2, 3, 1, 4)
        else:
            tiles, _, rows = grid
            padded = np.zeros((tiles * rows, channels), self._dtype)
            padded[self._rows(arch)] = values
            stored = np.zeros(grid, self._dtype)
            stored[:, :channels] = padded.reshape(tiles, rows, channels).transpose(0, 2, 1)
        return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)

    def from_memory(self, raw: NDArray[np.uint8], arch: Arch) -> NDArray[np.integer]:
        """Inverse of `to_memory`: the tensor (batch, rows, channels), int8 or int16."""
        channels, grid = self.shape[2], self.grid(arch)
        stored = np.ascontiguousarray(raw).view(self._dtype).reshape(grid)
        if self.layout == "transposed":
            batch, heads, blocks, rows, lanes = grid
            whole = stored.transpose(0, 3, 1, 2, 4).reshape(batch * rows, heads, blocks * lanes)
            return np.ascontiguousarray(whole[self._rows(arch), :, : channels // heads]).reshape(self.shape)
        return np.ascontiguousarray(stored[:, :channels].transpose(0, 2, 1).reshape(-1, channels)[self._rows(arch)])

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype("<i2" if self.dtype == "int16" else "i1")

    def _rows(self, arch: Arch) -> NDArray[np.int64]:
        """Stored row of each row: (batch, length)."""
        place = self.placement(arch)
        if self.layout == "columns":
            return self.stored(arch).packed_rows()
        size = place.own_tiles * arch.rows
        return np.stack([batch * size + place.own_rows(batch) for batch in range(place.batch)])


@dataclass(frozen=True, kw_only=True)
class OperatorInfo:
    """One operator of the network. Bytes are those of its weights: int8 dense, and as stored (both without
    parameters).

    `effective_macs` = MACs * N/M for weight matmuls, all MACs for dense-dense ones (design.md,
    "utilisation"); `spans` are the ranges [start, stop) of its instructions. `shape` is (batch * rows,
    inputs, outputs) or, of attention, (batch * heads * queries, keys, head_dim).
    """

    name: str
    source: str
    kind: Kind
    pattern: str
    shape: tuple[int, int, int]
    macs: int
    effective_macs: float
    weight_bytes_dense: int
    weight_bytes: int
    weight_format: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class MaskTable:
    """Column parameters that the host writes from a keymask input: one entry per key and batch entry, batch entries `stride`
    bytes apart; entries of no key are masked (see `RowPlacement.own_rows`)."""

    tensor: str
    address: int
    stride: int
    batch: int
    keys: int
    mult: int
    shift: int


@dataclass(frozen=True, kw_only=True)
class ModelTensor:
    """An input or output of the user's model: its name, shape and dtype there, and the network's tensor
    behind it.

    An activation is ``round(value / scale)`` clipped to the tensor's dtype, reshaped to (batch, rows,
    channels); of a keymask (kind), True or 1 marks a key that takes part, or with ``inverted`` one that does
    not (torch's key_padding_mask).

    An activation with an `image` is (batch, channels, height, width) or (batch, channels, length) in the model, and rows of
    channels in the network. image: of an output (height, width) or (length,); of an input (height, width) of the windows that
    become rows, then kernel, stride, padding and dilation, (vertical, horizontal) each; columns are in the order (kernel line,
    kernel column, channel).
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    scale: float
    kind: Literal["activation", "keymask"] = "activation"
    inverted: bool = False
    image: tuple[int, ...] | None = None


def input_names(specs: Sequence[ModelTensor]) -> list[str]:
    """Names of a module's arguments, in order; one may become several tensors, such as windows of several kinds."""
    return list(dict.fromkeys(spec.name for spec in specs))


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """A compiled network for one `Arch`.

    Memory: `code` at `code_address`, `constants` at `constants_address`, then activations and mask tables up
    to `memory_bytes`.
    """

    arch: Arch
    code: bytes
    code_address: int
    constants: NDArray[np.uint8]
    constants_address: int
    memory_bytes: int
    tensors: tuple[TensorInfo, ...]
    operators: tuple[OperatorInfo, ...]
    masks: tuple[MaskTable, ...]
    inputs: tuple[ModelTensor, ...]
    outputs: tuple[ModelTensor, ...]
    network: QuantNetwork
    meta: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Program(arch={self.arch.name!r}, instructions={self.instruction_count}, "
            f"operators={len(self.operators)}, memory_bytes={self.memory_bytes})"
        )

    @property
    def instruction_count(self) -> int:
        """Instructions, HALT included."""
        return len(self.code) // INSTRUCTION_BYTES

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """The decoded instructions."""
        step = INSTRUCTION_BYTES
        return tuple(Instruction.decode(self.code[i : i + step]) for i in range(0, len(self.code), step))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense network."""
        return sum(operator.macs for operator in self.operators)

    @property
    def effective_macs(self) -> float:
        """Numerator of the utilisation: weight MACs * N/M + dense-dense MACs."""
        return sum(operator.effective_macs for operator in self.operators)

    @property
    def ideal_cycles(self) -> float:
        """Cycles at utilisation 1."""
        return self.effective_macs / self.arch.macs

    @property
    def activation_bytes(self) -> int:
        """Memory for activations and mask tables, after code and constants."""
        return self.memory_bytes - self.constants_address - len(self.constants)

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Weights as dense int8, and as stored."""
        return sum(o.weight_bytes_dense for o in self.operators), sum(o.weight_bytes for o in self.operators)

    def tensor(self, name: str) -> TensorInfo:
        """Where a tensor lies.

        Raises
        ------
        KeyError
            No such tensor.
        """
        for info in self.tensors:
            if info.name == name:
                return info
        raise KeyError(f"the program has no tensor {name!r}")

    def memory_image(self, inputs: Mapping[str, NDArray[np.integer]]) -> NDArray[np.uint8]:
        """The whole memory before a run.

        Parameters
        ----------
        inputs
            One integer array (batch, rows, channels) for each input tensor of the network, within int8 or
            int16; 0 and 1 for keymasks.

        Raises
        ------
        ValueError
            An input is missing, unknown, or of the wrong shape or range.
        TypeError
            An input is not an integer (or bool) array.
        """
        names = self.network.inputs
        unknown, missing = sorted(set(inputs) - set(names)), [name for name in names if name not in inputs]
        if unknown or missing:
            what = f"unknown input {unknown[0]!r}" if unknown else f"input {missing[0]!r} is missing"
            raise ValueError(f"{what}; the program's inputs are {', '.join(names)}")
        image = np.zeros(self.memory_bytes, np.uint8)
        image[self.code_address : self.code_address + len(self.code)] = np.frombuffer(self.code, np.uint8)
        image[self.constants_address : self.constants_address + len(self.constants)] = self.constants
        for name in names:
            info, values = self.tensor(name), _checked_input(self.tensor(name), inputs[name])
            if info.layout == "keymask":
                self._write_masks(image, name, values)
            else:
                raw = info.to_memory(values, self.arch)
                image[info.address : info.address + len(raw)] = raw
        for name, values in self.network.constants.items():
            info = self.tensor(name)
            raw = info.to_memory(np.broadcast_to(values, info.shape), self.arch)
            image[info.address : info.address + len(raw)] = raw
        return image

    def read_tensor(self, image: NDArray[np.uint8], name: str) -> NDArray[np.integer]:
        """A tensor (batch, rows, channels) out of a memory image, int8 or int16. After a run only `kept`
        tensors are still there."""
        info = self.tensor(name)
        if info.layout == "keymask":
            raise ValueError(f"{name!r} is a key mask: it exists only as parameter tables")
        return info.from_memory(image[info.address : info.address + info.nbytes(self.arch)], self.arch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: to a temporary name in the same folder, then renamed, so that no reader sees half
        of it."""
        write_whole(path, self.to_bytes())

    def report(self) -> Report:
        """Every operator with its place, MACs and bytes; here all are on the accelerator."""
        from compiler.report import Report, program_rows  # compiler.report knows the front end, which programs do not need

        return Report(tuple(program_rows(self)))

    def to_bytes(self) -> bytes:
        """The file's bytes; equal programs give equal bytes."""
        network, arrays = network_to_bytes(self.network)
        members = dict(zip(_MEMBERS, (self.code, self.constants.tobytes(), network, arrays), strict=True))
        manifest = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            **self.header(),
            "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in members.items()},
        }
        manifest["sha256"] = sha256(canonical_json(manifest))
        return zip_bytes({"manifest.json": canonical_json(manifest), **members})

    def header(self) -> dict[str, Any]:
        """All but code, constants and network, as JSON values."""
        return {
            "arch": self.arch.to_dict(),
            **{name: getattr(self, name) for name in ("code_address", "constants_address", "memory_bytes", "meta")},
            **{name: [asdict(item) for item in getattr(self, name)] for name in _TABLES},
        }

    @classmethod
    def from_header(
        cls, header: dict[str, Any], code: bytes, constants: NDArray[np.uint8], network: QuantNetwork
    ) -> Program:
        """Inverse of `header`.

        Raises
        ------
        ProgramFileError
            Damaged; names the field.
        """
        tables: dict[str, Any] = {
            name: tuple(record(kind, item, name) for item in _field(header, name, list)) for name, kind in _TABLES.items()
        }
        return cls(
            arch=record(Arch, _field(header, "arch", dict), "arch"),
            code=code,
            constants=constants,
            network=network,
            meta={str(key): str(value) for key, value in _field(header, "meta", dict).items()},
            code_address=_field(header, "code_address", int),
            constants_address=_field(header, "constants_address", int),
            memory_bytes=_field(header, "memory_bytes", int),
            **tables,
        )

    def _write_masks(self, image: NDArray[np.uint8], name: str, values: NDArray[np.integer]) -> None:
        for table in self.masks:
            if table.tensor != name:
                continue
            place = RowPlacement(table.batch, table.keys, self.arch.rows)
            for batch in range(table.batch):
                raw = mask_params(place, batch, values[batch, 0] != 0, table.mult, table.shift).view(np.uint8)
                start = table.address + batch * table.stride
                image[start : start + len(raw)] = raw


def mask_params(
    place: RowPlacement, batch: int, keep: NDArray[np.bool_] | bool, mult: int, shift: int
) -> NDArray[np.void]:
    """Column parameters (span,) of the scores of a batch entry: keys that `keep` (length,) does not mark, and columns that
    are no key, are masked."""
    entries = np.zeros(place.span(batch), PARAM_DTYPE)
    entries["bias"], entries["mult"], entries["shift"] = MASK_BIAS, mult, shift
    entries["bias"][place.own_rows(batch)] = np.where(keep, 0, MASK_BIAS)
    return entries


_TABLES: dict[str, type] = {
    "tensors": TensorInfo,
    "operators": OperatorInfo,
    "masks": MaskTable,
    "inputs": ModelTensor,
    "outputs": ModelTensor,
}


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file: to a temporary name in the same folder, then renamed."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def zip_bytes(members: Mapping[str, bytes]) -> bytes:
    """A zip without compression and dates."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
    return buffer.getvalue()


def load(path: str | os.PathLike[str]) -> Program:
    """Read a program file.

    Raises
    ------
    FileNotFoundError
        No such file.
    ProgramFileError
        Not a program file, truncated, altered, or of a newer format; the message names file and field.
    """
    try:
        return program_from_bytes(Path(path).read_bytes())
    except ProgramFileError as error:
        raise ProgramFileError(f"{os.fspath(path)}: {error}") from error.__cause__


def program_from_bytes(data: bytes) -> Program:
    """A program from its file's bytes.

    Raises
    ------
    ProgramFileError
        As `load`, without the file's name.
    """
    members, manifest = read_zip(data, KIND, _MEMBERS)
    try:
        network = network_from_bytes(members["network.json"], members["network.bin"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramFileError(f"network.json: {error}") from error
    return Program.from_header(manifest, members["code.bin"], np.frombuffer(members["weights.bin"], np.uint8), network)


def read_zip(data: bytes, kind: str, names: Sequence[str] | None = None) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The members of a file, those of `names` or all, and its manifest: of the wanted kind, and with the right checksums.

    Raises
    ------
    ProgramFileError
    """
    members = _read_members(data)
    manifest = _read_manifest(members["manifest.json"], kind)
    files = _field(manifest, "files", dict)
    for name in names or files:
        entry = _field(files, name, dict, "files.")
        if name not in members:
            raise ProgramFileError(f"{name} is missing")
        same = _field(entry, "bytes", int, f"files.{name}.") == len(members[name])
        if not same or entry.get("sha256") != sha256(members[name]):
            raise ProgramFileError(f"{name} does not match its checksum: the file is truncated or was altered")
    return members, manifest


def _read_members(data: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise zipfile.BadZipFile("compressed members")
            members = {entry.filename: archive.read(entry) for entry in entries}
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        struct.error,
    ) as error:
        raise ProgramFileError(f"not a program file, or a truncated one (zip: {error})") from error
    if "manifest.json" not in members:
        raise ProgramFileError("not a program file: manifest.json is missing")
    return members


def _read_manifest(raw: bytes, kind: str) -> dict[str, Any]:
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise ProgramFileError(f"manifest.json: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise ProgramFileError(f"manifest.json: kind is not {kind!r}")
    version = _field(manifest, "format_version", int)
    if version != FORMAT_VERSION:
        advice = "use a newer nmforge" if version > FORMAT_VERSION else "compile the model again"
        raise ProgramFileError(
            f"manifest.json: format_version is {version}, this nmforge reads {FORMAT_VERSION}: {advice}"
        )
    stated = manifest.pop("sha256", None)
    if stated != sha256(canonical_json(manifest)):
        raise ProgramFileError("manifest.json: sha256 does not match: the file was altered")
    return manifest


def _field(values: dict[str, Any], name: str, kind: type, prefix: str = "") -> Any:
    value = values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProgramFileError(f"manifest.json: {prefix}{name} must be a {kind.__name__}, not {value!r}")
    return value


def record(kind: type, values: Any, where: str) -> Any:
    """A dataclass from its JSON form; lists become tuples."""
    if not isinstance(values, dict) or set(values) != {f.name for f in fields(kind)}:
        raise ProgramFileError(f"manifest.json: {where} does not have the fields of {kind.__name__}")
    try:
        return kind(**{name: _tuples(value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ProgramFileError(f"manifest.json: {where}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def canonical_json(values: dict[str, Any]) -> bytes:
    """Canonical form; numbers of NumPy count as numbers."""
    return json.dumps(values, indent=1, sort_keys=True, default=lambda number: number.item()).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checked_input(info: TensorInfo, values: NDArray[np.integer]) -> NDArray[np.integer]:
    array = np.asarray(values)
    if array.dtype.kind not in "iub":
        raise TypeError(f"input {info.name!r} must be an integer array, not {array.dtype}")
    if array.shape != info.shape:
        raise ValueError(f"input {info.name!r} must have the shape {info.shape}, not {array.shape}")
    low, high = {"int8": (-128, 127), "int16": (-32768, 32767), "keymask": (0, 1)}[info.dtype]
    if array.size and (array.min() < low or array.max() > high):
        raise ValueError(f"input {info.name!r} must be in {low}..{high}, not {array.min()}..{array.max()}")
    return array
