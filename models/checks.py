"""Checks that the families share: sizes of a configuration, options of a builder, shapes of inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

from torch import Tensor

__all__ = ["check_images", "check_multiple", "check_options", "check_pixels", "check_positive", "check_share", "check_tokens"]


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


def check_images(images: Tensor, channels: int, size: int | None = None) -> None:
    """Refuse what is not a batch of images (B, channels, H, W), or is of another size than ``size`` x ``size``.

    Raises
    ------
    TypeError, ValueError
        Says what is expected and what came.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, normalised as the network expects, not {images.dtype}")
    shape = tuple(images.shape)
    wanted = ("H", "W") if size is None else (size, size)
    if len(shape) != 4 or shape[1] != channels or (size is not None and shape[2:] != wanted):
        raise ValueError(f"images must be (B, {channels}, {wanted[0]}, {wanted[1]}), not {shape}")


def check_pixels(images: Tensor) -> None:
    """Refuse images (B, ...) with a pixel that is not finite; ValueError has the number of the image."""
    finite = images.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise ValueError(f"image {int((~finite).nonzero()[0])} has a pixel that is not finite")


def check_tokens(tokens: Tensor, positions: int) -> None:
    """Refuse what is not token numbers (B, S), or is longer than a model has positions.

    Raises
    ------
    TypeError, ValueError
        Says what is expected and what came.
    """
    if tokens.is_floating_point():
        raise TypeError(f"token numbers must be integers, not {tokens.dtype}")
    if tokens.ndim != 2:
        raise ValueError(f"token numbers must be (B, S), not {tuple(tokens.shape)}")
    if tokens.shape[1] > positions:
        raise ValueError(f"{tokens.shape[1]} tokens, but the model has {positions} positions: truncate the input")
