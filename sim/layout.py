"""Order of a Verilated model's variables in memory.

A design of many like instances becomes C++ in which each instance's statement is written out: ``lane3.mac7.total = ...``,
a thousand times. Where the variables of neighbours lie side by side, the compiler joins such statements to vector
instructions; in Verilator's order they lie a module apart.
"""

import re

__all__ = ["arrange"]

_MEMBER = re.compile(r" +([CSIQ]Data|VlWide<\d+>)/\*\d+:0\*/ (\w+);")
_DELAYED = "__Vdly__"  # a register's next value, where Verilator needs one
_UNIQUE = re.compile(r"__024\d+")  # appended to names that are taken; it differs between like instances
_INDEX = re.compile(r"(?<=[a-z])\d+(?=__DOT__|$)|(?<=___05F)\d+(?=___05F|$)")  # of an instance, or of an array's element

Key = tuple[str, tuple[int, ...], str, tuple[int, int], str]


def arrange(header: str) -> str:
    """The text of a model's class with its variables in another order: like instances' variables side by side.

    All instances inside of one outer instance are neighbours, first every fourth of them: they take the same byte of
    consecutive words.
    """
    lines = header.split("\n")
    places: dict[str, list[int]] = {}
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines):
        match = _MEMBER.fullmatch(line)
        if match:
            places.setdefault(match[1], []).append(number)
            keys[line] = _key(match[2])
    arranged = list(lines)
    for numbers in places.values():  # a type's variables stay in the places of that type: no padding between them
        for number, line in zip(numbers, sorted((lines[n] for n in numbers), key=keys.__getitem__), strict=True):
            arranged[number] = line
    return "\n".join(arranged)


def _key(name: str) -> Key:
    """Outer instance, kind of variable, and the place among the inner instances."""
    plain = _UNIQUE.sub("", name.removeprefix(_DELAYED))
    delayed = _DELAYED if name.startswith(_DELAYED) else ""
    found = [*_INDEX.finditer(plain)]
    *outer, inner = [0, *(int(match[0]) for match in found)]
    cut = found[-2].end() if len(found) > 1 else len(plain)
    return (_INDEX.sub("#", plain[:cut]), tuple(outer[1:]), _INDEX.sub("#", plain[cut:]) + delayed,
            (inner % 4, inner // 4), name)
