"""`nmforge verilog`: separate from the other commands, because it needs no torch."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from hw.arch import Arch
from hw.verilog import TOP_NAME, verilog
from nmforge.console import write_text

__all__ = ["write_verilog"]


def write_verilog(arch: Arch, output: Path | None) -> tuple[str, dict[str, Any]]:
    """Generate the accelerator; write it if there is a file; return the text and facts about it."""
    start = time.monotonic()
    text = verilog(arch)
    seconds = round(time.monotonic() - start, 2)
    if output is not None:
        write_text(output, text)
    return text, {
        "arch": arch.name,
        "file": None if output is None else str(output),
        "top": TOP_NAME,
        "lines": text.count("\n"),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seconds": seconds,
    }
