"""`nmforge synth`: shares of the device, tables, JSON, and what it refuses; mapping itself is tested in tests/sim."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import nmforge.silicon
from hw.devices import DEVICES
from nmforge.cli import app
from sim.place import Placement, Step
from sim.synth import Resources, SynthesisError, UnitResources
from sim.verilator import ToolMissingError

COUNTS = {"luts": 70_000, "lut_rams": 5000, "ffs": 30_000, "dsps": 120, "brams": 60.5, "urams": 0}
UNIT = UnitResources(name="nmforge_mac", count=64, luts=53, lut_rams=0, ffs=69, dsps=1, brams=0, urams=0, levels=3,
                     path=("a", "b"))
FOUND = Resources(**COUNTS, levels=9, cells={}, target="ecp5", version="0.70", seconds=1.5, units=(UNIT,))
PLACED = Placement(fmax_mhz=101.5, used={"TRELLIS_COMB": 5}, available={"TRELLIS_COMB": 10},
                   path=(Step("dut.core.a", "logic", 1.0),), modules=(("core.array", 9.8),),
                   device="LFE5U-85F-6", version="1", seed=1, seconds=60.0)


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def synthesise(*_: object, progress: Any, **__: object) -> Resources:
        progress("mapped 1/1: nmforge_top, 1.5 s")
        return FOUND

    monkeypatch.setattr(nmforge.silicon, "synthesise", synthesise)
    monkeypatch.setattr(nmforge.silicon, "place_and_route", lambda *_, **__: PLACED)


def synth(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["synth", *arguments])


def test_json(mapped: None) -> None:
    result = synth("ecp5", "--target", "ecp5", "--place-and-route", "--json")
    assert result.exit_code == 0, result.output
    assert "mapped 1/1: nmforge_top" in result.stderr
    record = json.loads(result.stdout)
    assert record["resources"] == COUNTS and record["levels"] == 9 and record["macs"] == 64
    device = DEVICES["LFE5U-85F"]
    assert record["device"]["name"] == device.name and record["device"]["share"]["luts"] == round(70_000 / device.luts, 4)
    assert record["device"]["fits"] is False  # 84 % of the LUTs
    assert record["place"]["fmax_mhz"] == 101.5 and record["vendor_tool"] is None
    assert record["units"][0]["name"] == "nmforge_mac"


def test_table(mapped: None) -> None:
    result = synth("ecp5", "-t", "ecp5", "--place-and-route")
    for text in ("LUT4", "70,000", "MULT18X18D", "does NOT fit", "101.5 MHz", "core.array 9.80 ns", "no vendor tool", "mac"):
        assert text in result.stdout, text
    other = synth("ecp5", "-t", "xc7")
    assert "LFE5U" not in other.stdout and "before place and route" in other.stdout


def test_refused(mapped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown target 'xcpu': did you mean xcup" in synth("tiny", "-t", "xcpu").stderr
    assert "--place-and-route needs --target ecp5" in synth("tiny", "--place-and-route").stderr
    assert synth("tiny", "-t", "ice40").exit_code == 2

    def raising(error: Exception) -> Result:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(nmforge.silicon, "synthesise", fail)
        return synth("tiny")

    missing = raising(ToolMissingError("Yosys is not installed: run `pip install pyosys==0.70`"))
    assert missing.exit_code == 2 and "pip install pyosys" in missing.stderr
    failed = raising(SynthesisError("Yosys failed in module x"))
    assert failed.exit_code == 1 and "Yosys failed in module x" in failed.stderr
