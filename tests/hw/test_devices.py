"""Devices of the presets."""

from hw.arch import PRESETS
from hw.devices import DEVICES, device_of


def test_every_preset_has_a_device() -> None:
    for name in PRESETS:
        device = device_of(name)
        assert device is not None and DEVICES[device.name] is device
        assert min(device.luts, device.ffs, device.dsps, device.brams) > 0
    assert device_of("mine") is None
