"""The generated Verilog of the presets is lint clean, but for the waived classes."""

import pytest

from hw.verilog import TOP_NAME, verilog
from sim.lint import WAIVERS, lint, unwaived


@pytest.mark.parametrize("preset", ["tiny", "sta256", "sta1024"])
def test_presets(preset: str) -> None:
    assert unwaived(lint(verilog(preset), top=TOP_NAME)) == {}


def test_waivers_are_needed_and_reasoned() -> None:
    assert WAIVERS.keys() == lint(verilog("tiny"), top=TOP_NAME).keys()
    assert all(len(reason.split()) >= 5 for reason in WAIVERS.values())


@pytest.mark.parametrize(("body", "expected"), [
    ("output reg q); always @* if (a) q = a;", "LATCH"),
    ("output q);", "UNDRIVEN"),
    ("output q); assign q = a; assign q = ~a;", "MULTIDRIVEN"),
    ("output q); wire b; assign b = ~c; wire c; assign c = b; assign q = b ^ a;", "UNOPTFLAT"),
    ("output q); assign q = nothing;", "ERROR"),
    ("output reg q); always @* q = 1'b0;", "ALWNEVER"),
])
def test_faults_are_found(body: str, expected: str) -> None:
    assert expected in unwaived(lint(f"module top(input a, {body} endmodule\n", top="top"))
