"""Checks that the families share: sizes of a configuration, options of a builder, what goes into a network."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_entries",
    "check_images",
    "check_labels",
    "check_mask",
    "check_multiple",
    "check_numbers",
    "check_options",
    "check_pixels",
    "check_positive",
    "check_share",
    "check_tokens",
]


def check_positive(config: Any, *, zero: Collection[str] = ()) -> None:
    """Refuse a whole number, or a tuple of them, below 1 in a configuration; None and other kinds pass.

    The fields named in ``zero`` may be 0.

    Raises
    ------
    ValueError
        Names the field.
    """
    for field in fields(config):
        value, least = getattr(config, field.name), 0 if field.name in zero else 1
        whole = "int" in str(field.type)
        for item in value if isinstance(value, tuple) else (value,):
            if whole and item is not None and (not isinstance(item, int) or item < least):
                kind = "hold integers" if isinstance(value, tuple) else "be an integer"
                raise ValueError(f"{field.name} must {kind} >= {least}, not {value!r}")
        if value == ():
            raise ValueError(f"{field.name} must not be empty")


def check_share(config: Any, *names: str) -> None:
    """Refuse fields outside [0, 1), such as a probability of dropout; ValueError names the field."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), not {getattr(config, name)!r}")


def check_multiple(config: Any, name: str, of: str) -> None:
    """Refuse a field that is no multiple of another; ValueError names both."""
    value, divisor = getattr(config, name), getattr(config, of)
    if value % divisor:
        raise ValueError(f"{name} must be a multiple of {of}, not {value} with {of} = {divisor}")


def check_options(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse an option that a model's builder does not have; ValueError lists those that it has."""
    options = list(known)
    strange = sorted(set(given) - set(options))
    if strange:
        raise ValueError(f"{name} has no option {strange[0]!r}: it has {', '.join(options)}")


def check_images(images: Tensor, channels: int, size: int | None = None, *, name: str = "images") -> None:
    """Refuse what is not a batch of one or more images (B, channels, H, W), or is of another size than ``size`` x ``size``.

    Raises
    ------
    TypeError, ValueError
        Says what is expected and what came.
    """
    _check_tensor(images, name, "pad_images makes a batch of several" if name == "images" else "")
    if not images.is_floating_point():
        raise TypeError(f"{name} must be floating point, normalised as the network expects, not {images.dtype}")
    shape = tuple(images.shape)
    wanted = ("H", "W") if size is None else (size, size)
    if len(shape) != 4 or shape[1] != channels or (size is not None and shape[2:] != wanted):
        raise ValueError(f"{name} must be (B, {channels}, {wanted[0]}, {wanted[1]}), not {shape}")
    if 0 in shape:
        raise ValueError(f"{name} must be at least one, of at least one pixel, not {shape}")


def check_pixels(images: Tensor) -> None:
    """Refuse images (B, ...) with a pixel that is not finite; ValueError has the number of the image."""
    finite = images.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise ValueError(f"image {int((~finite).nonzero()[0])} has a pixel that is not finite")


def check_tokens(tokens: Tensor, positions: int, vocabulary: int) -> None:
    """Refuse what is not token numbers (B, S) below ``vocabulary``, is empty, or is longer than a model has positions.

    Raises
    ------
    TypeError, ValueError
        Says what is expected and what came.
    """
    _check_tensor(tokens, "token numbers")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token numbers must be integers, int64 or int32, not {tokens.dtype}")
    shape = tuple(tokens.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"token numbers must be (B, S), at least one of a sequence, not {shape}")
    if shape[1] > positions:
        raise ValueError(f"{shape[1]} tokens, but the model has {positions} positions: truncate the input")
    check_numbers(tokens, vocabulary, "token numbers")


def check_numbers(numbers: Tensor, count: int, name: str) -> None:
    """Refuse whole numbers (B, S) that do not point into a table of ``count`` rows; ValueError has the first and its place.

    Values are not looked at where there are none: on the meta device and while a model is exported or compiled.
    """
    if numbers.is_meta or torch.compiler.is_compiling():
        return
    wrong = (numbers < 0) | (numbers >= count)
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name} must be in 0 to {count - 1}, not {int(numbers[row, place])} (place {place} of sequence {row})")


def check_mask(mask: Tensor, rows: Tensor, *, name: str = "the attention mask") -> None:
    """Refuse what has not one entry for each token of ``rows`` (B, S, ...); TypeError, ValueError with both shapes."""
    _check_tensor(mask, name)
    if mask.shape != rows.shape[:2]:
        raise ValueError(f"{name} must be {tuple(rows.shape[:2])}, one a token, not {tuple(mask.shape)}")


def check_entries(entries: Sequence[Any], kind: type, *, images: int, name: str) -> None:
    """Refuse what is not one ``kind`` (such as `Target`) for each of so many images.

    Raises
    ------
    TypeError
        Not a list or tuple, or something else in it.
    ValueError
        Another number.
    """
    if not isinstance(entries, list | tuple):
        raise TypeError(f"{name} must be a list with one {kind.__name__} an image, not {type(entries).__name__}")
    if len(entries) != images:
        raise ValueError(f"{images} images need as many {name}, not {len(entries)}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, kind):
            raise TypeError(f"{name} must hold one {kind.__name__} an image, not {type(entry).__name__} (image {number})")


def check_labels(labels: Tensor, objects: Tensor, *, classes: int, image: int, name: str) -> None:
    """Refuse labels that are not one int64 class below ``classes`` for each of the ``objects`` (N, ...) of an image.

    Raises
    ------
    TypeError, ValueError
        The message has the number of the image; ``name`` says what objects are there (boxes).
    """
    _check_tensor(labels, f"labels of image {image}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels of image {image} must be int64, not {labels.dtype}")
    if labels.shape != objects.shape[:1]:
        raise ValueError(f"image {image} has labels {tuple(labels.shape)} for {name} {tuple(objects.shape)}: one for each")
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(f"labels of image {image} must be in 0 to {classes - 1}, not {labels.tolist()}")


def _check_tensor(value: object, name: str, hint: str = "") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}" + (f": {hint}" if hint else ""))
