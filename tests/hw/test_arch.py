"""Architecture parameters: presets, derived values, one message per bad field."""

from dataclasses import replace

import pytest

from hw.arch import PRESETS, Arch, get_arch


def test_presets():
    assert {name: arch.macs for name, arch in PRESETS.items()} == {
        "tiny": 16, "ecp5": 64, "sta256": 256, "sta1024": 1024, "gemv256": 256, "sta4096": 4096}
    assert get_arch("tiny") is PRESETS["tiny"]
    assert Arch(**PRESETS["sta256"].to_dict()) == PRESETS["sta256"]


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown arch preset 'sta12'; known presets: tiny, ecp5, sta256"):
        get_arch("sta12")
    with pytest.raises(TypeError, match="preset name or an Arch, not 3"):
        get_arch(3)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"rows": 5}, ValueError, "Arch.rows must be a positive power of two, not 5"),
    ({"rows": 8, "bus_bytes": 16}, ValueError, r"Arch.lanes must be in rows\.\.256, not 4 with 8 rows"),
    ({"rows": 2, "lanes": 2}, ValueError, r"Arch.rows must be in 4\.\.64, not 2"),
    ({"bus_bytes": 4}, ValueError, r"Arch.bus_bytes must be in 2\*rows\.\.128, not 4"),
    ({"lane_depth": 32}, ValueError, r"Arch.lane_depth must be in 64\.\.8192, not 32"),
    ({"clock_mhz": 0}, ValueError, "Arch.clock_mhz must be positive, not 0"),
    ({"row_depth": 32.0}, TypeError, "Arch.row_depth must be an int, not 32.0"),
    ({"name": 7}, TypeError, "Arch.name must be a str, not 7"),
    ({"multiplier_bits": 28}, ValueError, r"Arch.multiplier_bits must be in 18\.\.27, not 28"),
    ({"packing": 1}, TypeError, "Arch.packing must be a bool, not 1"),
    ({"sparse": "no"}, TypeError, "Arch.sparse must be a bool, not 'no'"),
])
def test_bad_field(changes, error, message):
    with pytest.raises(error, match=message):
        replace(PRESETS["tiny"], **changes)
