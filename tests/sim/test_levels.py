"""Logic levels of small netlists, written by hand and mapped by Yosys."""

from typing import Any

import pytest

from sim.levels import ADD, MULTIPLY, Timing, analyse
from sim.synth import synthesise


def cell(kind: str, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], **parameters: str) -> dict[str, Any]:
    return {"type": kind, "connections": {**inputs, **outputs}, "parameters": parameters,
            "port_directions": {**dict.fromkeys(inputs, "input"), **dict.fromkeys(outputs, "output")}}


def module(cells: dict[str, Any], inputs: dict[str, list[int]], outputs: dict[str, list[int]],
           names: dict[str, list[int]] | None = None) -> dict[str, Any]:
    ports = {name: {"direction": way, "bits": bits} for way, group in (("input", inputs), ("output", outputs))
             for name, bits in group.items()}
    return {"ports": ports, "cells": cells, "netnames": {name: {"bits": bits} for name, bits in (names or {}).items()}}


def register(source: int, target: int) -> dict[str, Any]:
    return cell("FDRE", {"D": [source], "C": [1]}, {"Q": [target]})


def lut(*nets: int) -> dict[str, Any]:
    return cell("LUT6", {f"I{i}": [net] for i, net in enumerate(nets[:-1])}, {"O": [nets[-1]]})


def test_chain_between_registers() -> None:
    cells = {"a": register(2, 3), "x": lut(3, 4), "y": lut(4, 3, 5), "b": register(5, 6)}
    timing = analyse(module(cells, {"i": [2]}, {"o": [6]}, {"start": [3], "end": [6]}), {})
    assert (timing.levels, timing.path) == (2, ("start", "end"))
    assert (timing.capture, timing.launch, timing.through) == ({"i[0]": 0}, {"o[0]": 0}, {})


def test_carry_chains_and_wide_multiplexers() -> None:
    carry = [cell("CARRY4", {"CI": [ci], "S": [s]}, {"CO": [co]}) for ci, s, co in ((10, 3, 11), (11, 3, 12), (12, 3, 13))]
    cells = {"a": register(2, 3), **{f"c{i}": c for i, c in enumerate(carry)},
             "m": cell("MUXF7", {"I0": [13], "S": [3]}, {"O": [14]}), "b": register(14, 15)}
    assert analyse(module(cells, {}, {}), {}).levels == 1


@pytest.mark.parametrize(("registers", "levels"), [((0, 0), MULTIPLY + 1), ((1, 0), MULTIPLY), ((0, 1), MULTIPLY + ADD),
                                                   ((1, 1), MULTIPLY)])
def test_multipliers(registers: tuple[int, int], levels: int) -> None:
    dsp = cell("DSP48E2", {"A": [3]}, {"P": [4]}, MREG=str(registers[0]), PREG=str(registers[1]))
    cells = {"a": register(2, 3), "d": dsp, "x": lut(4, 5), "b": register(5, 6)}
    assert analyse(module(cells, {}, {}), {}).levels == levels


def test_registers_of_a_multiplier() -> None:
    """The way to a register of an operand ends there; enables pass neither multiplier nor adder."""
    for options, levels in ({"AREG": "1", "MREG": "1", "PREG": "1"}, MULTIPLY), ({"AREG": "1", "PREG": "1"}, MULTIPLY + ADD):
        dsp = cell("DSP48E2", {"A": [5], "CEP": [5]}, {"P": [4]}, **options)
        cells = {"a": register(2, 3), "x": lut(3, 6), "y": lut(6, 5), "d": dsp, "b": register(4, 7)}
        assert analyse(module(cells, {}, {}), {}).levels == levels
    alone = cell("DSP48E2", {"A": [3]}, {"P": [4]}, AREG="1")
    cells = {"a": register(2, 3), "d": alone, "x": lut(4, 5), "b": register(5, 6)}
    assert analyse(module(cells, {}, {}), {}).levels == MULTIPLY + 1
    enable = cell("DSP48E2", {"CEP": [3]}, {"P": [4]}, MREG="1", PREG="1")
    assert analyse(module({"a": register(2, 3), "d": enable}, {}, {}), {}).levels == 0


def test_paths_across_units() -> None:
    inner = Timing(launch={"q[0]": 2}, capture={"d[0]": 3}, through={"y[0]": {"x[0]": 4}})
    unit = cell("unit", {"d": [5], "x": [3]}, {"q": [6], "y": [5]})
    cells = {"a": register(2, 3), "u": unit, "l": lut(6, 7), "b": register(7, 8)}
    timing = analyse(module(cells, {}, {}, {"start": [3]}), {"unit": inner})
    assert timing.levels == 4 + 3 and timing.path == ("start", "u.d[0]")
    assert analyse(module({"u": unit}, {"p": [3]}, {"o": [5]}), {"unit": inner}).through == {"o[0]": {"p[0]": 4}}


def test_a_loop_ends() -> None:
    cells = {"x": lut(3, 4), "y": lut(4, 3)}
    assert analyse(module(cells, {}, {"o": [4]}), {}).levels == 0


def test_mapped_adder() -> None:
    """A LUT and a carry chain."""
    text = """module top(input clk, input [15:0] a, input [15:0] b, output reg [15:0] q);
      reg [15:0] x, y; always @(posedge clk) begin x <= a; y <= b; q <= x + y; end
    endmodule"""
    found = synthesise(text, top="top", target="xcup")
    assert found.levels == 2 and found.units[0].path[-1].startswith("q[")
