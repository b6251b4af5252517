"""Shared modules: written once in the Verilog, instantiated everywhere; ordinary submodules in simulation."""

import re

from hw.arch import PRESETS
from hw.verilog import verilog

TINY = PRESETS["tiny"]


def test_each_shared_module_is_written_once():
    text = verilog(TINY)
    modules = re.findall(r"^module (\S+?)\s*\(", text, re.MULTILINE)
    assert len(modules) == len(set(modules))
    for name in ("nmforge_lane", "nmforge_mac", "nmforge_position", "nmforge_post_row", "nmforge_row_moments"):
        assert modules.count(name) == 1, name


def test_instances_are_counted():
    text = verilog(TINY)
    assert len(re.findall(r"^  nmforge_lane \S+ \(", text, re.MULTILINE)) == TINY.lanes
    assert len(re.findall(r"^  nmforge_mac \S+ \(", text, re.MULTILINE)) == TINY.rows  # once per lane, in the lane's module
    assert len(re.findall(r"^  nmforge_post_row \S+ \(", text, re.MULTILINE)) == TINY.rows
