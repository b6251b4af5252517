"""``nmforge train --config``: from YAML to a trained model, alone or under torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from algo.config import Config, load
from algo.distributed import is_main, processes, world
from algo.methods import METHODS
from algo.recipe import Outcome, run_recipe
from nmforge.console import progress_bars
from nmforge.errors import BadInputError
from nmforge.tasks import get_task

__all__ = ["READY", "configuration", "methods", "ready_configs", "run_config"]

READY = Path(__file__).parent / "configs"
"""Folder of the ready configurations."""


def ready_configs() -> list[str]:
    """Names that ``--config`` takes besides files."""
    return sorted(str(path.relative_to(READY).with_suffix("")) for path in READY.rglob("*.yaml"))


def methods() -> list[str]:
    """Names that ``method`` takes."""
    return ["dense", *METHODS]


def configuration(
    sources: Sequence[str], overrides: Sequence[str], *, pattern: str | None = None, out: Path | None = None, resume: bool = False
) -> Config:
    """Read what the command line names.

    Parameters
    ----------
    sources
        YAML files or ready names; none with ``resume``.
    overrides
        ``KEY=VALUE``.
    pattern
        ``"2:4"``, or a mix ``"GLOB=N:M,GLOB=N:M"`` of full layer names.
    resume
        Take the configuration that the run in ``out`` has.

    Raises
    ------
    BadInputError
        Nothing to resume, or both a configuration and ``resume``.
    ConfigError
        See `algo.config.load`.
    """
    if resume:
        kept = (out or Path("out/train")) / "config.yaml"
        if sources:
            raise BadInputError("--resume takes the config that the folder has: leave --config out")
        if not kept.is_file():
            raise BadInputError(f"nothing to resume: there is no {kept}; name the folder of the run with --out")
        sources = [str(kept)]
    config = load(sources, overrides, ready=READY)
    if pattern is not None:
        config = replace(config, pattern=_pattern(pattern))
    if out is not None:
        config = replace(config, run=replace(config.run, out=out))
    return config


def run_config(config: Config, *, fresh: bool = False) -> dict[str, Any]:
    """Train, and say what came of it as JSON values."""
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # results are the main process's to print
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    torch.set_flush_denormal(True)  # pruned weights decay towards zero, and denormals are slow
    with processes(config.run.device) as device:
        task = get_task(config.task, config.data)
        with progress_bars() if is_main() else nullcontext() as progress:
            outcome = run_recipe(config, task, device=device, fresh=fresh, progress=progress)
        return _record(config, outcome) | {"processes": world()}


def _record(config: Config, outcome: Outcome) -> dict[str, Any]:
    return {
        "task": config.task,
        "method": config.method,
        "pattern": config.pattern if isinstance(config.pattern, str) else dict(config.pattern),
        "patterns": {name: str(nm) for name, nm in outcome.patterns.items()},
        "accuracy": outcome.accuracy,
        "seconds": outcome.seconds,
        "resumed_step": outcome.resumed_step,
        "sparse": str(outcome.folder),
        "log": str((config.run.log or config.run.out) / "log.csv"),
        "out": str(config.run.out),
    }


def _pattern(text: str) -> str | dict[str, str]:
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(glob.strip() and nm.strip() for glob, _, nm in pairs):
        raise BadInputError(f'a mix of patterns is written like "blocks.*.attn.*=2:4,blocks.*.mlp.*=1:8", not {text!r}')
    return {glob.strip(): nm.strip() for glob, _, nm in pairs}
