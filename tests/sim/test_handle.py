"""The interactive handle, on a module with wide ports, a memory and an instance."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sim.handle import Dut
from sim.harness import HarnessError
from sim.verilator import BuildError

TEXT = """
module inner(input clk, input rst, input [99:0] d, output reg [99:0] q);
  reg [7:0] ram [2:17];
  reg [4:0] p;
  always @(posedge clk) begin
    q <= rst ? 0 : q + d;
    p <= rst ? 2 : p + 1;
    if (!rst) ram[p] <= q[7:0];
  end
endmodule
module top(input clk, input rst, input [99:0] d, input [2:0] s, output [99:0] q, output [3:0] y);
  wire [2:0] t = s + 1;
  assign y = t * 2;
  inner sub(clk, rst, d, q);
endmodule
"""


@pytest.fixture
def dut() -> Iterator[Dut]:
    with Dut(TEXT, "top", trace=True) as handle:
        handle.io.rst = 1
        handle.clock.tick()
        handle.io.rst = 0
        yield handle


def test_ports_of_any_width(dut: Dut) -> None:
    dut.io.d = (1 << 99) + 5
    dut.clock.tick(3)
    assert dut.io.q == 3 * ((1 << 99) + 5) % (1 << 100)
    assert dut.io.width("q") == 100


def test_reading_settles(dut: Dut) -> None:
    dut.io.s = 6
    assert dut.io.y == 14
    dut.io.s = 1
    dut.eval()
    assert dut.io["y"] == 4


def test_inputs_are_masked_to_their_width(dut: Dut) -> None:
    dut.io.s = -1
    assert (dut.io.s, dut.io.y) == (7, 0)
    dut.io.s = 8
    assert dut.io.y == 2
    dut.io.d = -1
    assert dut.io.d == (1 << 100) - 1


def test_internals(dut: Dut) -> None:
    dut.io.s = 2
    assert dut.internals.t == 3
    dut.io.d = 5
    dut.clock.tick(4)
    ram = dut.internals.sub.ram
    assert [ram[i] for i in range(2, 6)] == [0, 5, 10, 15] and dut.internals.sub.p == 6
    assert len(ram) == 16 and list(ram)[:3] == [0, 5, 10]


def test_internals_can_be_set(dut: Dut) -> None:
    dut.internals.sub.q = 1000
    assert dut.io.q == 1000
    dut.io.d = 1
    dut.clock.tick()
    assert dut.io.q == 1001
    dut.internals.sub.ram[9] = 0x1FF
    assert dut.internals.sub.ram[9] == 0xFF


def test_names_can_be_listed(dut: Dut) -> None:
    assert sorted(dut.io) == ["clk", "d", "q", "rst", "s", "y"]
    assert "sub" in dir(dut.internals) and "ram" in dir(dut.internals.sub)
    assert repr(dut.io).startswith("io(") and "y=0x" in repr(dut.io)


def test_errors(dut: Dut, tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"io has no signal 'nothing'; it has clk, "):
        dut.io.nothing = 1
    with pytest.raises(AttributeError, match=r"top.sub has no signal 'nothing'"):
        _ = dut.internals.sub.nothing
    with pytest.raises(ValueError, match=r"io.q is an output"):
        dut.io.q = 1
    with pytest.raises(TypeError, match=r"io.d takes an int, not 'x'"):
        dut.io.d = "x"
    with pytest.raises(TypeError, match=r"top.sub.ram is a memory"):
        dut.internals.sub.ram = 1
    with pytest.raises(IndexError, match=r"ram has elements 2..17, not 18"):
        _ = dut.internals.sub.ram[18]
    with pytest.raises(ValueError, match=r"cycles must be"):
        dut.clock.tick(-1)
    with pytest.raises(HarnessError, match=r"cannot write the trace to .*: No such file"):
        dut.start_trace(tmp_path / "none" / "x.fst")
    array = dut.internals.sub.ram
    dut.close()
    dut.close()
    with pytest.raises(HarnessError, match="closed"):
        dut.eval()
    with pytest.raises(HarnessError, match="closed"):
        array[3] = 1
    with pytest.raises(HarnessError, match="closed"):
        array[3]


def test_trace(dut: Dut, tmp_path: Path) -> None:
    path = tmp_path / "wave.fst"
    dut.start_trace(path)
    dut.io.d = 3
    dut.clock.tick(20)
    dut.stop_trace()
    assert path.stat().st_size > 500
    pywellen = pytest.importorskip("pywellen")
    wave = pywellen.Waveform(str(path))
    names = {var.full_name: var for var in wave.all_vars()}
    assert names["TOP.top.sub.q"].signal.value_at(41) == 60


def test_bad_verilog() -> None:
    with pytest.raises(BuildError, match=r"(?s)verilator_bin failed.*syntax error"):
        Dut("module top(input clk; endmodule", "top", progress=False)
