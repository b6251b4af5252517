"""`nmforge compile`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from algo.nm import NM
from compiler.listing import bound_of
from compiler.listing import listing as to_text
from hw.arch import Arch
from nmforge.console import progress_bars, reporter, write_text
from nmforge.encoder import compile_encoder
from nmforge.errors import BadInputError
from nmforge.sources import load_source

__all__ = ["build_program"]


def build_program(
    source: str,
    output: Path,
    *,
    pattern: dict[str, NM] | None,
    arch: Arch,
    batch: int,
    length: int,
    pretrained: bool,
    calibration: int,
    listing: Path | None,
    seed: int,
) -> dict[str, Any]:
    """Compile, write the program file, and say what is in it as JSON values."""
    if not output.resolve().parent.is_dir():
        raise BadInputError(f"the folder of {output} does not exist")
    found = load_source(source, pattern=pattern, pretrained=pretrained, calibration=calibration, seed=seed)
    if length > found.bert.config.positions:
        raise BadInputError(f"length must be <= {found.bert.config.positions}, the positions of the model, not {length}")
    start = time.monotonic()
    with progress_bars() as progress:
        program = compile_encoder(
            found.bert, batch=batch, length=length, arch=arch, calibration=found.calibration, progress=reporter(progress)
        )
    seconds = round(time.monotonic() - start, 2)
    program.save(output)
    if listing is not None:
        write_text(listing, to_text(program))
    bound = bound_of(program.instructions, program.arch)
    dense, stored = program.weight_bytes
    return {
        "file": str(output),
        "source": found.description,
        "arch": arch.name,
        "operators": len(program.operators),
        "instructions": program.instruction_count,
        "memory_bytes": program.memory_bytes,
        "weight_bytes_dense": dense,
        "weight_bytes": stored,
        "macs": program.macs,
        "effective_macs": program.effective_macs,
        "bound_cycles": bound.cycles,
        "bound_unit": bound.unit,
        "seconds": seconds,
    }
