"""A Verilog text cut into modules, and these into units that can be mapped one by one."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Unit", "VerilogModule", "split", "units"]

_MODULE = re.compile(r"^module\s+(\\\S+|\w+)\s*[(;#].*?\bendmodule\b", re.MULTILINE | re.DOTALL)
_INSTANCE = re.compile(r"^\s+(\\\S+|\w+)\s+(?:\\\S+|\w+)\s*\(", re.MULTILINE)

LARGE = 20_000
"""Characters from which a module with its submodules is a unit of its own."""


@dataclass(frozen=True)
class VerilogModule:
    """One module: its text, and how often it instantiates each other module of the design."""

    name: str
    text: str
    instances: Mapping[str, int]


@dataclass(frozen=True)
class Unit:
    """What is mapped at once.

    Attributes
    ----------
    name : str
        Its top module.
    text : str
        That module and the submodules that are flattened into it.
    children : tuple of str
        Units that it instantiates: black boxes to it.
    """

    name: str
    text: str
    children: tuple[str, ...]


def split(text: str) -> dict[str, VerilogModule]:
    """Modules of a design by name (escaped names without the backslash)."""
    bodies = {match[1].lstrip("\\"): match[0] for match in _MODULE.finditer(text)}
    found = {}
    for name, body in bodies.items():
        kinds = Counter(kind.lstrip("\\") for kind in _INSTANCE.findall(body))
        found[name] = VerilogModule(name, body, {kind: count for kind, count in kinds.items() if kind in bodies})
    return found


def units(modules: Mapping[str, VerilogModule], top: str) -> list[Unit]:
    """Units below and with `top`, each after those it instantiates.

    A unit is a module that has more than one instance, or that is large with what is below it. Everything else is flattened
    into the unit above.
    """
    total: Counter[str] = Counter()
    for module in modules.values():
        total.update(module.instances)
    sizes: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in sizes:
            sizes[name] = len(modules[name].text) + sum(size(child) for child in modules[name].instances)
        return sizes[name]

    def is_unit(name: str) -> bool:
        return total[name] > 1 or size(name) > LARGE

    found: dict[str, Unit] = {}

    def visit(name: str) -> None:
        texts, children, inside = [], [], [name]
        for module in inside:
            texts.append(modules[module].text)
            for child in modules[module].instances:
                if not is_unit(child):
                    inside.append(child)
                elif child not in children:
                    children.append(child)
        for child in children:
            if child not in found:
                visit(child)
        found[name] = Unit(name, "\n".join(texts), tuple(sorted(children)))

    visit(top)
    return list(found.values())
