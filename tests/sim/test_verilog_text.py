"""Cutting Verilog into modules and units."""

from hw.verilog import TOP_NAME, verilog
from sim.verilog_text import LARGE, split, units

TEXT = """module leaf(input a, output q); assign q = ~a; endmodule
module \\top.middle (a, q);
  input a; output q;
  leaf one (.a(a), .q(q));
endmodule
module top(a, q);
  input [1:0] a; output [1:0] q;
  \\top.middle  middle (.a(a[0]), .q(q[0]));
  leaf two (.a(a[1]), .q(q[1]));
endmodule
"""


def test_split() -> None:
    modules = split(TEXT)
    assert list(modules) == ["leaf", "top.middle", "top"]
    assert modules["top"].instances == {"top.middle": 1, "leaf": 1} and modules["top.middle"].instances == {"leaf": 1}
    assert modules["leaf"].text.startswith("module leaf") and modules["leaf"].text.endswith("endmodule")


def test_small_single_modules_are_flattened() -> None:
    leaf, top = units(split(TEXT), "top")
    assert (leaf.name, leaf.children, top.name, top.children) == ("leaf", (), "top", ("leaf",))
    assert "top.middle" in top.text and "module leaf" not in top.text


def test_large_modules_are_units() -> None:
    padded = TEXT.replace("input a; output q;", "input a; output q;" + " // " + "x" * LARGE)
    assert [unit.name for unit in units(split(padded), "top")] == ["leaf", "top.middle", "top"]


def test_units_of_the_accelerator() -> None:
    found = {unit.name: unit for unit in units(split(verilog("tiny")), TOP_NAME)}
    assert {"nmforge_lane", "nmforge_mac", "nmforge_position", "nmforge_selector", f"{TOP_NAME}.core"} <= set(found)
    assert "nmforge_mac" in found["nmforge_lane"].children
    order = list(found)
    assert all(order.index(child) < order.index(unit.name) for unit in found.values() for child in unit.children)
