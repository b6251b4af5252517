"""What can go wrong on the command line, and how it is said."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["BadInputError", "CheckFailedError", "unknown"]


class BadInputError(ValueError):
    """Wrong use, or input that cannot be used: exit code 2."""


class CheckFailedError(RuntimeError):
    """A check failed, such as bytes that differ: exit code 1. `result` is what the command found out all the same."""

    def __init__(self, message: str, result: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def unknown(what: str, name: str, known: Iterable[str]) -> BadInputError:
    """An error for a name that is not known, with near ones or, if there are none, all of them."""
    names = list(known)
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    return BadInputError(f"unknown {what} {name!r}: {hint}")
