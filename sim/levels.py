"""Logic levels of mapped netlists: the longest chain of look-up tables between registers.

What counts as levels: a LUT, or reading a LUT RAM, is 1; entering a carry chain 1, passing along it 0; wide multiplexers
behind LUTs 0; a multiplier up to a register behind it `MULTIPLY`, the adder of a DSP block `ADD`: about the ratio of their
delays to that of a LUT with its routing. It is a count, not a delay: no wire is known before place and route.

A unit is analysed with what is known of the units inside it (`Timing`), so that a path is found across their borders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ADD", "MULTIPLY", "Timing", "analyse"]

MULTIPLY, ADD = 4, 2

Bit = int  # of a net; constants are strings in Yosys' JSON and have no timing
Arc = tuple[Bit, int]

_SEQUENTIAL = ("FD", "TRELLIS_FF", "MISTRAL_FF", "RAMB", "DP16KD", "PDPW16KD", "URAM", "MISTRAL_M10K", "MISTRAL_M20K")
_LUT_RAMS = ("RAM", "TRELLIS_DPR16X4", "SRL", "MISTRAL_MLAB")
_MUXES = ("MUXF", "PFUMX", "L6MUX21")


@dataclass
class Timing:
    """Levels of a unit as those see it who instantiate it; ports by ``name[index]``.

    Attributes
    ----------
    launch, capture : dict
        Levels from a register to an output; from an input to a register.
    through : dict
        Levels from inputs to an output, by output.
    levels : int
        Longest path between registers that lies in the unit and what is inside it, and crosses no port of the unit.
    path : tuple of str
        Names along that path, start first.
    """

    launch: dict[str, int] = field(default_factory=dict)
    capture: dict[str, int] = field(default_factory=dict)
    through: dict[str, dict[str, int]] = field(default_factory=dict)
    levels: int = 0
    path: tuple[str, ...] = ()


@dataclass
class _Graph:
    """Arcs into each net, nets that registers drive, and nets that registers read, with the levels inside the cell."""

    drivers: dict[Bit, list[Arc]] = field(default_factory=dict)
    starts: dict[Bit, int] = field(default_factory=dict)
    ends: dict[Bit, int] = field(default_factory=dict)
    end_names: dict[Bit, tuple[str, Any]] = field(default_factory=dict)  # of a pin, and the net that its register drives
    inside: int = 0  # levels between registers of one cell

    def arc(self, source: Any, target: Any, levels: int) -> None:
        if isinstance(source, int) and isinstance(target, int):
            self.drivers.setdefault(target, []).append((source, levels))

    def start(self, bit: Any, levels: int = 0) -> None:
        if isinstance(bit, int):
            self.starts[bit] = max(levels, self.starts.get(bit, 0))

    def end(self, bit: Any, name: str, levels: int = 0, register: Any = None) -> None:
        if isinstance(bit, int) and levels >= self.ends.get(bit, 0):
            self.ends[bit] = levels
            self.end_names[bit] = (name, register)


def analyse(module: Mapping[str, Any], children: Mapping[str, Timing]) -> Timing:
    """Timing of one module of Yosys' JSON, given that of the units it instantiates."""
    graph = _Graph()
    for name, cell in module["cells"].items():
        _add_cell(graph, name, cell, children)
    arrival, before = _arrivals(graph)
    names = _net_names(module)
    timing = Timing(levels=-1)
    for bit, inside in graph.ends.items():
        if bit in arrival and arrival[bit] + inside > timing.levels:
            timing.levels = arrival[bit] + inside
            pin, register = graph.end_names[bit]
            timing.path = (*_trace(bit, before, names), names.get(register, pin))
    timing.levels = max(graph.inside, timing.levels)
    _ports(module, graph, arrival, timing)
    return timing


def _bits(cell: Mapping[str, Any], directions: Iterable[str]) -> Iterator[tuple[str, int, Any]]:
    for port, bits in cell["connections"].items():
        if cell["port_directions"].get(port) in directions:
            for index, bit in enumerate(bits):
                yield port, index, bit


def _add_cell(graph: _Graph, name: str, cell: Mapping[str, Any], children: Mapping[str, Timing]) -> None:
    kind = cell["type"].lstrip("\\")
    if kind in children:
        _add_child(graph, name, cell, children[kind])
    elif kind.startswith(_SEQUENTIAL):
        _add_register(graph, name, cell)
    elif kind.startswith(("DSP48", "MISTRAL_MUL", "MULT18", "ALU54")):
        _add_dsp(graph, name, cell)
    elif kind.startswith(_LUT_RAMS):
        _add_lut_ram(graph, name, cell)
    else:
        for port, _, source in _bits(cell, ("input",)):
            levels = _levels(kind, port)
            for _, _, target in _bits(cell, ("output",)):
                graph.arc(source, target, levels)


def _levels(kind: str, port: str) -> int:
    if kind.startswith(_MUXES) or (kind.startswith("CARRY") and port in ("CI", "CYINIT")) or port in ("CIN", "CI"):
        return 0
    return 2 if kind in ("CCU2C", "MISTRAL_ALUT_ARITH") else 1  # these hold the LUT in front of the carry chain too


def _add_register(graph: _Graph, name: str, cell: Mapping[str, Any]) -> None:
    register = None
    for _, _, register in _bits(cell, ("output",)):
        graph.start(register)
    for port, _, bit in _bits(cell, ("input",)):
        graph.end(bit, f"{name}.{port}", 0, register)


def _add_lut_ram(graph: _Graph, name: str, cell: Mapping[str, Any]) -> None:
    """Written by the clock, read by the address without one."""
    outputs = [bit for _, _, bit in _bits(cell, ("output",))]
    for bit in outputs:
        graph.start(bit, 1)
    for port, _, source in _bits(cell, ("input",)):
        graph.end(source, f"{name}.{port}")
        if port.startswith(("A", "DPRA", "RAD", "B1ADDR")):
            for target in outputs:
                graph.arc(source, target, 1)


def _number(value: Any) -> int:
    text = str(value)
    return int(text, 2) if text and set(text) <= {"0", "1"} else 0


def _add_dsp(graph: _Graph, name: str, cell: Mapping[str, Any]) -> None:
    """A multiplier with the registers that its parameters say: of its operands, behind the multiplier, behind the adder."""
    given = cell.get("parameters", {})
    product, result = _number(given.get("MREG", 0)), _number(given.get("PREG", 0))
    outputs = [(port, bit) for port, _, bit in _bits(cell, ("output",)) if port in ("P", "Y", "PCOUT")]
    outputs = outputs or [(port, bit) for port, _, bit in _bits(cell, ("output",))]
    for _, bit in outputs:
        if product or result:
            graph.start(bit, 0 if result else ADD)
    for port, _, source in _bits(cell, ("input",)):
        operand = port.rstrip("0123456789")
        inside = MULTIPLY if operand in ("A", "B", "D") else ADD if operand in ("C", "PCIN", "CARRYIN") else 0
        rest = inside + (ADD if inside == MULTIPLY and not product else 0)
        if _number(given.get(f"{operand}REG", 0)):
            graph.end(source, f"{name}.{port}")
            if product or result:
                graph.inside = max(graph.inside, rest)
            else:
                for _, bit in outputs:
                    graph.start(bit, inside)
        elif result or inside == 0 or (product and inside == MULTIPLY):
            graph.end(source, f"{name}.{port}", rest)
        else:
            for _, target in outputs:
                graph.arc(source, target, inside)


def _add_child(graph: _Graph, name: str, cell: Mapping[str, Any], timing: Timing) -> None:
    bits = {f"{port}[{index}]": bit for port, index, bit in _bits(cell, ("input", "output"))}
    for port, levels in timing.launch.items():
        graph.start(bits.get(port), levels)
    for port, levels in timing.capture.items():
        graph.end(bits.get(port), f"{name}.{port}", levels)
    for target, sources in timing.through.items():
        for source, levels in sources.items():
            graph.arc(bits.get(source), bits.get(target), levels)


def _arrivals(graph: _Graph) -> tuple[dict[Bit, int], dict[Bit, Bit]]:
    """Levels from a register to each net that one reaches, and the net before it on the longest way."""
    arrival: dict[Bit, int] = dict(graph.starts)
    before: dict[Bit, Bit] = {}
    for bit in _in_order(graph):
        for source, levels in graph.drivers[bit]:
            if source in arrival and arrival[source] + levels > arrival.get(bit, -1):
                arrival[bit] = arrival[source] + levels
                before[bit] = source
    return arrival, before


def _in_order(graph: _Graph) -> list[Bit]:
    """Nets with drivers, each after its sources; a combinational loop is cut where it is met."""
    order: list[Bit] = []
    seen: set[Bit] = set()
    for root in graph.drivers:
        stack: list[tuple[Bit, Iterator[Arc]]] = []
        if root not in seen:
            seen.add(root)
            stack.append((root, iter(graph.drivers[root])))
        while stack:
            bit, rest = stack[-1]
            for source, _ in rest:
                if source in graph.drivers and source not in seen:
                    seen.add(source)
                    stack.append((source, iter(graph.drivers[source])))
                    break
            else:
                order.append(bit)
                stack.pop()
    return order


def _ports(module: Mapping[str, Any], graph: _Graph, arrival: Mapping[Bit, int], timing: Timing) -> None:
    """Fill in what those see who instantiate the module."""
    inputs: dict[Bit, str] = {}
    outputs: dict[str, Bit] = {}
    for port, facts in module["ports"].items():
        for index, bit in enumerate(facts["bits"]):
            if isinstance(bit, int):
                if facts["direction"] == "input":
                    inputs[bit] = f"{port}[{index}]"
                else:
                    outputs[f"{port}[{index}]"] = bit
    order = _in_order(graph)
    onward: dict[Bit, int] = dict(graph.ends)
    for bit in reversed(order):
        if bit in onward:
            for source, levels in graph.drivers[bit]:
                onward[source] = max(onward.get(source, 0), onward[bit] + levels)
    timing.capture = {port: onward[bit] for bit, port in inputs.items() if bit in onward}
    timing.launch = {port: arrival[bit] for port, bit in outputs.items() if bit in arrival}
    cones = _cones(graph, order, inputs, set(outputs.values()))
    timing.through = {port: cones[bit] for port, bit in outputs.items() if cones.get(bit)}


def _cones(graph: _Graph, order: list[Bit], inputs: Mapping[Bit, str], wanted: set[Bit]) -> dict[Bit, dict[str, int]]:
    """Levels from inputs to each wanted net, where there is a way without a register."""
    needed = set(wanted)
    for bit in reversed(order):
        if bit in needed:
            needed.update(source for source, _ in graph.drivers[bit])
    cones: dict[Bit, dict[str, int]] = {bit: {port: 0} for bit, port in inputs.items() if bit in needed}
    for bit in order:
        if bit in needed:
            cone = cones.setdefault(bit, {})
            for source, levels in graph.drivers[bit]:
                for port, depth in cones.get(source, {}).items():
                    if depth + levels > cone.get(port, -1):
                        cone[port] = depth + levels
    return cones


def _net_names(module: Mapping[str, Any]) -> dict[Bit, str]:
    """The shortest name of each net that is not a tool's."""
    names: dict[Bit, str] = {}
    for name, facts in module["netnames"].items():
        if facts.get("hide_name") or name.startswith(("$", "_", "\\$")) or "$signal" in name:
            continue
        for index, bit in enumerate(facts["bits"]):
            text = f"{name}[{index}]" if len(facts["bits"]) > 1 else name
            if isinstance(bit, int) and len(text) < len(names.get(bit, text + "x")):
                names[bit] = text
    return names


def _trace(bit: Bit, before: Mapping[Bit, Bit], names: Mapping[Bit, str]) -> tuple[str, ...]:
    way = [bit]
    while way[-1] in before:
        way.append(before[way[-1]])
    way.reverse()
    named = [names[step] for step in way if step in names]
    return tuple(named[:1] + ([named[-1]] if len(named) > 1 else []))
