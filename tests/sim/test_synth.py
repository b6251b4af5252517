"""Synthesis estimates: counts of known designs, the cache, errors, and that the whole accelerator maps."""

import importlib.util
from pathlib import Path

import pytest

from hw.arch import get_arch
from hw.verilog import TOP_NAME, cache_dir, verilog
from sim.synth import TARGETS, SynthesisError, _repeated, synthesise, yosys_version
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


@pytest.mark.parametrize(("target", "multiplier", "memory", "blocks"),
                         [("xcup", "DSP48E2", "RAMB36E2", 1), ("ecp5", "MULT18X18D", "PDPW16KD", 2)])
def test_hard_blocks(target: str, multiplier: str, memory: str, blocks: int) -> None:
    product = synthesise(MULTIPLY, top="top", target=target)
    assert product.dsps == product.cells[multiplier] == 1
    stored = synthesise(MEMORY, top="top", target=target)
    assert stored.brams == blocks and stored.lut_rams == 0


def test_repeated_modules_keep_their_borders() -> None:
    assert {"nmforge_lane", "nmforge_mac", "nmforge_position"} <= set(_repeated(verilog("tiny")))
    assert _repeated(TOP) == ["leaf"]


def test_cache(fresh_cache: Path) -> None:
    first = synthesise(REGISTER, top="leaf", target="ecp5")
    assert synthesise(REGISTER, top="leaf", target="ecp5") == first  # seconds too
    (entry,) = fresh_cache.iterdir()
    entry.write_text("{")
    assert synthesise(REGISTER, top="leaf", target="ecp5").cells == first.cells
    assert entry.read_text() != "{" and entry.parent == cache_dir() / "synth"


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown synthesis target 'ice40'; known targets: xcup, ecp5"):
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
    """The smallest preset for the target that is quicker; ``python -m benchmarks area`` has the others."""
    found = synthesise(verilog("tiny"), top=TOP_NAME, target="ecp5")
    assert found.dsps >= get_arch("tiny").macs
    assert found.brams > 0 and found.luts > found.lut_rams > 0 and found.ffs > 0
