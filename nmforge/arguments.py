"""Command-line text to values: patterns, architectures."""

from __future__ import annotations

from collections.abc import Sequence

from algo.nm import MAX_M, NM
from hw.arch import PRESETS, Arch
from nmforge.errors import BadInputError, unknown

__all__ = ["ENCODER", "parse_arch", "parse_dynamic", "parse_pattern", "parse_sizes", "parse_table", "pattern_text"]

ENCODER = "bert.encoder."
"""Where the layers that a pattern names lie in a sentence classifier."""


def parse_pattern(text: str) -> dict[str, NM]:
    """Read ``"2:4"``, or a mix such as ``"*.attention.*=2:4,*.up=1:8,*=dense"``, as globs of full layer names.

    Globs are of names within the encoder (``layers.0.up``); the first that matches decides, a layer without a match stays dense.

    Raises
    ------
    BadInputError
        Not a pattern; the message says what one looks like or what was probably meant.
    """
    return {glob if glob.startswith(ENCODER) else ENCODER + glob: nm for glob, nm in parse_table(text).items()}


def parse_table(text: str) -> dict[str, NM]:
    """Read the same as globs of any names; ``"2:4"`` is ``{"*": 2:4}``."""
    if "=" not in text:
        return {"*": _pattern(text)}
    table: dict[str, NM] = {}
    for part in text.split(","):
        glob, equals, pattern = (piece.strip() for piece in part.partition("="))
        if not (glob and equals and pattern):
            raise BadInputError(f'a mix of patterns is written like "*.attention.*=2:4,*.up=1:8", not {text!r}')
        if glob in table:
            raise BadInputError(f"the mix of patterns names {glob!r} twice: {text!r}")
        table[glob] = _pattern(pattern)
    return table


def pattern_text(table: dict[str, NM]) -> str:
    """The inverse of `parse_pattern`."""
    if list(table) == [f"{ENCODER}*"]:
        return str(table[f"{ENCODER}*"])
    return ",".join(f"{glob.removeprefix(ENCODER)}={nm}" for glob, nm in table.items())


def _pattern(text: str) -> NM:
    try:
        return NM(text)
    except ValueError as error:
        hint = _meant(text)
        raise BadInputError(f"bad pattern {text!r}: {error}" + (f"; did you mean {hint}?" if hint else "")) from None


def _meant(text: str) -> str | None:
    """A pattern near to text that is none: another separator, or both numbers swapped."""
    for mark in ("of", "/", "-", ",", ".", ";", "_", "x"):
        text = text.lower().replace(mark, ":")
    n, _, m = (part.strip() for part in text.partition(":"))
    if not (n.isdecimal() and m.isdecimal()):
        return None
    low, high = sorted((int(n), int(m)))
    return f"{low}:{high}" if 1 <= low <= high <= MAX_M else None


def parse_dynamic(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read ``["length=16,32,64", "batch=1,8"]``, or ``"tokens:1=16,32"``: what dimensions may be, by name.

    Raises
    ------
    BadInputError
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        numbers = [value.strip() for value in values.split(",")]
        if not (name and equals) or not all(number.isdecimal() and int(number) > 0 for number in numbers) or name in found:
            raise BadInputError(f"--dynamic is written like length=16,32,64 or tokens:1=16,32, each name once, not {text!r}")
        found[name] = tuple(map(int, numbers))
    return found


def parse_sizes(texts: Sequence[str]) -> dict[str, int]:
    """Read ``["length=32", "batch=1"]``."""
    found = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value.isdecimal()) or name in found:
            raise BadInputError(f"--shape is written like length=32, each name once, not {text!r}")
        found[name] = int(value)
    return found


def parse_arch(name: str) -> Arch:
    """A preset by name.

    Raises
    ------
    BadInputError
        Unknown; the message has near names.
    """
    if name not in PRESETS:
        raise unknown("arch preset", name, PRESETS)
    return PRESETS[name]
