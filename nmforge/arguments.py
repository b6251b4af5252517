"""Command-line text to values: patterns, architectures."""

from __future__ import annotations

from algo.nm import MAX_M, NM
from hw.arch import PRESETS, Arch
from nmforge.errors import BadInputError, unknown

__all__ = ["ENCODER", "parse_arch", "parse_pattern", "parse_table", "pattern_text"]

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
