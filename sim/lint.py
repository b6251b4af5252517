"""Lint of generated Verilog: ``verilator --lint-only -Wall`` and the list of what is waived, with reasons.

The text is written by Amaranth and Yosys' Verilog back end, so most style classes describe the back end and not the design. A
class that is not in the list is an error.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from sim.verilator import _find_verilator

__all__ = ["WAIVERS", "lint", "unwaived"]

WAIVERS: dict[str, str] = {
    "CASEINCOMPLETE": "the back end turns If and Switch into casez and assigns the default before it; no latch can form, "
                      "since Amaranth gives every signal a value",
    "DECLFILENAME": "one file holds all modules",
    "PROCASSINIT": "registers have their reset value as initial value as well, which FPGAs load with the bitstream",
    "UNUSEDSIGNAL": "the back end names every member of a record and every intermediate value, used or not; a struct's member "
                    "that one unit does not need is no fault",
    "WIDTHEXPAND": "the back end relies on Verilog's extension of the narrower operand, which is what Amaranth means: it widens "
                   "signed operands by itself",
    "WIDTHTRUNC": "`! vector` is the back end's test for zero, and a part selected at a variable place is `vector >> place` cut "
                  "by the assignment",
}
"""Class of warning and why it is not a fault here."""

_MESSAGE = re.compile(r"^%(?:Warning|Error)(?:-(\w+))?: (.*)$", re.MULTILINE)


def lint(verilog_text: str, *, top: str) -> dict[str, list[str]]:
    """All messages of ``verilator --lint-only -Wall``, by class; errors without one are of class ERROR.

    Raises
    ------
    ToolMissingError
        Verilator is not installed.
    """
    binary, root = _find_verilator()
    with tempfile.TemporaryDirectory(prefix="nmforge-lint-") as folder:
        path = Path(folder) / f"{top}.v"
        path.write_text(verilog_text)
        done = subprocess.run(
            [str(binary), "--lint-only", "-Wall", "-Wno-fatal", "--error-limit", "0", "--top-module", top, path.name],
            cwd=folder, env={**os.environ, "VERILATOR_ROOT": str(root)}, capture_output=True, text=True, check=False,
        )
    found: dict[str, list[str]] = {}
    for match in _MESSAGE.finditer(done.stderr):
        found.setdefault(match[1] or "ERROR", []).append(match[2])
    if done.returncode != 0 and not found:
        found["ERROR"] = [f"Verilator ended with code {done.returncode}: {done.stderr[-2000:]}"]
    return found


def unwaived(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """The messages of classes that `WAIVERS` does not list."""
    return {name: messages for name, messages in found.items() if name not in WAIVERS}
