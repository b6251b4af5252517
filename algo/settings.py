"""Fields of configurations: each says what it means, so that the documentation can be made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

__all__ = ["section", "setting"]


def setting(default: Any, meaning: str) -> Any:
    """A dataclass field with a default and what it means."""
    return field(default=default, metadata={"help": meaning})


def section(factory: Callable[[], Any], meaning: str) -> Any:
    """The same for a default that is made anew, such as a dict or a nested configuration."""
    return field(default_factory=factory, metadata={"help": meaning})
