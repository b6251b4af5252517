"""Parts that the presets are meant for: what they hold, and which preset goes where."""

from dataclasses import dataclass

__all__ = ["DEVICES", "SPARE", "Device", "device_of"]

SPARE = 0.2
"""Share of each resource of its device that a preset leaves free."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A part, by its maker's data sheet.

    `dsps` are DSP48E2 or MULT18X18D; `brams` RAMB36 or DP16KD (18 kbit); `urams` UltraRAM blocks.
    """

    name: str
    board: str
    target: str  #: synthesis target, see sim/synth.py
    luts: int
    ffs: int
    dsps: int
    brams: int
    urams: int = 0


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(name="XCZU3EG", board="Ultra96", target="xcup", luts=70_560, ffs=141_120, dsps=360, brams=216),
        Device(name="XCZU9EG", board="ZCU102", target="xcup", luts=274_080, ffs=548_160, dsps=2520, brams=912),
        Device(name="XCU250", board="Alveo U250", target="xcup", luts=1_728_000, ffs=3_456_000, dsps=12_288, brams=2688,
               urams=1280),
        Device(name="LFE5U-85F", board="ECP5-85", target="ecp5", luts=83_640, ffs=83_640, dsps=156, brams=208),
    )
}

_PRESETS = {"tiny": "LFE5U-85F", "ecp5": "LFE5U-85F", "sta256": "XCZU3EG", "sta1024": "XCZU9EG", "gemv256": "XCZU9EG",
            "sta4096": "XCU250"}


def device_of(preset: str) -> Device | None:
    """The part that a preset is tied to; None for an Arch that is no preset."""
    return DEVICES[_PRESETS[preset]] if preset in _PRESETS else None
