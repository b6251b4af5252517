"""Verilog to a file."""

import hashlib
from pathlib import Path

from hw.arch import get_arch
from nmforge.hardware import write_verilog


def test_write_verilog(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tiny.v"
    text, facts = write_verilog(get_arch("tiny"), path)
    assert path.read_text() == text
    assert facts["sha256"] == hashlib.sha256(text.encode()).hexdigest() and facts["file"] == str(path)
    assert facts["lines"] == text.count("\n") and f"module {facts['top']}(" in text.replace(" (", "(")
    assert write_verilog(get_arch("tiny"), None)[1]["file"] is None
