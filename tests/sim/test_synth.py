"""Synthesis estimates: counts of known designs, the cache, errors, and that the whole accelerator maps."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from amaranth.back.verilog import convert as verilog_of

from hw.arch import PRESETS, get_arch
from hw.lane import Mac, PackedMac, sum_bits, sum_word, wrap_bits
from hw.verilog import TOP_NAME, cache_dir, verilog
from sim.synth import TARGETS, SynthesisError, _stub, map_units, synthesise, yosys_version
from sim.verilator import ToolMissingError

REGISTER = "module leaf(input clk, input [7:0] d, output reg [7:0] q); always @(posedge clk) q <= ~d; endmodule\n"
TOP = REGISTER + """module top(input clk, input [23:0] d, output [23:0] q);
  leaf a(.clk(clk), .d(d[7:0]), .q(q[7:0]));
  leaf b(.clk(clk), .d(d[15:8]), .q(q[15:8]));
  leaf c(.clk(clk), .d(d[23:16]), .q(q[23:16]));
endmodule
"""
MULTIPLY = "module top(input signed [7:0] a, input signed [7:0] b, output signed [15:0] p); assign p = a * b; endmodule\n"
MEMORY = """module top(input clk, input we, input [8:0] wa, input [8:0] ra, input [71:0] d, output reg [71:0] q);
  reg [71:0] m [511:0];
  always @(posedge clk) begin if (we) m[wa] <= d; q <= m[ra]; end
endmodule
"""


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NMFORGE_CACHE", str(tmp_path))
    return tmp_path / "synth"


@pytest.mark.parametrize("target", TARGETS)
def test_instances_are_multiplied(target: str) -> None:
    found = synthesise(TOP, top="top", target=target)
    assert (found.ffs, found.luts, found.dsps, found.brams, found.target) == (24, 24, 0, 0, target)
    assert "leaf" not in found.cells
    assert [(unit.name, unit.count, unit.ffs) for unit in found.units] == [("leaf", 3, 8), ("top", 1, 0)]


@pytest.mark.parametrize(("target", "multiplier", "memory", "blocks"),
                         [("xcup", "DSP48E2", "RAMB36E2", 1), ("xc7", "DSP48E1", "RAMB36E1", 1),
                          ("intel", "MISTRAL_MUL9X9", "MISTRAL_M10K", 4),
                          ("ecp5", "MULT18X18D", "PDPW16KD", 2)])
def test_hard_blocks(target: str, multiplier: str, memory: str, blocks: int) -> None:
    product = synthesise(MULTIPLY, top="top", target=target)
    assert product.dsps == product.cells[multiplier] == 1
    stored = synthesise(MEMORY, top="top", target=target)
    assert stored.brams == blocks and stored.lut_rams == 0


@pytest.mark.parametrize(("packing", "products"), [(False, 1), (True, 2)])
def test_accumulators_are_in_the_dsp_block(packing: bool, products: int) -> None:
    """Multiplier, product register, adder and sum register are one block; LUTs only for signs, or for wraps of the low field."""
    arch = replace(PRESETS["tiny"], packing=packing)
    mac = PackedMac(arch) if packing else Mac(sum_bits(arch))
    found = synthesise(verilog_of(mac, name="mac", emit_src=False, strip_internal_attrs=True), top="mac", target="xcup")
    assert found.dsps == 1 and found.luts <= (8 if packing else 1) * products
    assert found.ffs == sum_word(arch)[0] + (wrap_bits(arch) + 3 if packing else 0)


def test_numbers_of_the_design_around_make_no_difference(fresh_cache: Path) -> None:
    text = "module top(\\a$7 , q);\n  input \\a$7 ;\n  output q;\n  assign q = ~\\a$7 ;\nendmodule\n"
    (first,) = map_units(text, top="top", target="ecp5").values()
    (second,) = map_units(text.replace("$7", "$123"), top="top", target="ecp5").values()
    assert "a$7" in first["ports"] and "a$123" in second["ports"] and len(list(fresh_cache.iterdir())) == 1


def test_stub() -> None:
    stub = _stub("module leaf(a, q);\n  input [7:0] a;\n  wire [7:0] a;\n  output q;\n  assign q = a[0];\nendmodule\n")
    assert stub.startswith("(* blackbox *)\nmodule leaf(a, q);") and "input [7:0] a;" in stub and "assign" not in stub


def test_cache(fresh_cache: Path) -> None:
    first = synthesise(REGISTER, top="leaf", target="ecp5")
    assert synthesise(REGISTER, top="leaf", target="ecp5") == first  # seconds too
    (entry,) = fresh_cache.iterdir()
    assert entry.parent == cache_dir() / "synth"
    entry.write_text("{")
    with pytest.raises(SynthesisError, match=f"{entry.name} was damaged and is removed: run again"):
        synthesise(REGISTER, top="leaf", target="ecp5")
    assert synthesise(REGISTER, top="leaf", target="ecp5").cells == first.cells


def test_a_unit_is_mapped_once_for_all_designs(fresh_cache: Path) -> None:
    """What a design shares with another comes from the cache."""
    lines: list[str] = []
    synthesise(TOP, top="top", target="ecp5", progress=lines.append)
    synthesise(TOP.replace("leaf b", "leaf other"), top="top", target="ecp5", progress=lines.append)
    assert [line.partition(",")[0] for line in lines] == ["mapped 1/2: leaf", "mapped 2/2: top", "mapped 1/1: top"]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown synthesis target 'ice40'; known targets: xcup, xc7, intel, ecp5"):
        synthesise(TOP, top="top", target="ice40")
    with pytest.raises(ValueError, match="no module 'missing'"):
        synthesise(TOP, top="missing")


@pytest.mark.parametrize(("body", "message"), [
    ("output q); assign q = ;", "syntax error"),
    ("output q); absent x(.q(q));", "absent"),
    ("output reg q); always @* if (a) q = b;", "[Ll]atch"),
])
def test_yosys_errors(body: str, message: str, fresh_cache: Path) -> None:
    with pytest.raises(SynthesisError, match=message):
        synthesise(f"module top(input a, input b, {body} endmodule\n", top="top", target="ecp5")
    assert not fresh_cache.exists()


def test_timeout(fresh_cache: Path) -> None:
    with pytest.raises(SynthesisError, match="more than 0.01 s"):
        synthesise(TOP, top="top", target="ecp5", timeout_s=0.01)


def test_yosys_is_missing(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolMissingError, match=r"pip install pyosys==0\.70"):
        synthesise(TOP, top="top")
    with pytest.raises(ToolMissingError, match="not installed"):
        yosys_version()


@pytest.mark.slow
def test_accelerator_maps() -> None:
    """The smallest preset for the target that is quicker; ``python -m benchmarks silicon`` has the others."""
    found = synthesise(verilog("tiny"), top=TOP_NAME, target="ecp5")
    assert found.dsps >= get_arch("tiny").macs
    assert found.brams > 0 and found.luts > found.lut_rams > 0 and found.ffs > 0
    assert sum(unit.count * unit.luts for unit in found.units) == found.luts and found.levels > 0
