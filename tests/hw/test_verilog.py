"""The export: deterministic, cached, without machine paths."""

import re
from pathlib import Path

import pytest

import hw.verilog
from hw.arch import get_arch
from hw.verilog import TOP_NAME, cache_dir, verilog


def test_text() -> None:
    text = verilog("tiny")
    assert text.startswith("// nmforge accelerator, architecture tiny (16 multiply-accumulates per cycle).\n// rows=4, lanes=4,")
    assert re.search(rf"^module {TOP_NAME}\(", text, re.MULTILINE)
    assert str(Path(hw.verilog.__file__).parent) not in text and "src =" not in text and "/home" not in text
    for port in ("input clk", "input rst", "output irq", "input [11:0] s_axi_awaddr", "output [63:0] m_axi_wdata",
                 "output [31:0] m_axi_araddr"):
        assert re.search(rf"^  {re.escape(port)}\s*;", text, re.MULTILINE), port


def test_deterministic_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = verilog("tiny")
    monkeypatch.setenv("NMFORGE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    assert verilog(get_arch("tiny")) == known
    (entry,) = (tmp_path / "verilog").iterdir()
    entry.write_text("from the cache")
    assert verilog("tiny") == "from the cache"


def test_text_is_tidy() -> None:
    text = verilog("tiny")
    assert re.search(r"\\\$\d+ ", text) is None, "temporaries have plain names"
    assert re.search(r"\{\d+\{", text), "sign extensions are folded"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a = { \\$x [16], \\$x [16], \\$x  };", "a = { {2{\\$x [16]}}, \\$x  };"),
        ("a = { x[1], x[1:0], x[1], x[1], b };", "a = { x[1], x[1:0], {2{x[1]}}, b };"),
        ("a = { x, y, x, xx, x };", "a = { x, y, x, xx, x };"),
        ("a = { x, x };", "a = { {2{x}} };"),
    ],
)
def test_repeats(before: str, after: str) -> None:
    assert hw.verilog._fold_repeats(before) == after


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="unknown arch preset"):
        verilog("huge")
