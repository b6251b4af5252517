"""What the commands do, without the command line: each gives its result as JSON values."""

from __future__ import annotations

import importlib.metadata
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from algo.nm import NM
from compiler.compile import Host
from compiler.listing import bound_of
from compiler.listing import listing as to_text
from compiler.partitioned import PartitionedProgram, load
from compiler.program import Program
from hw.arch import Arch
from models.bert import DISTRIBUTIONS, BertModel
from models.registry import create_model, list_models
from nmforge.api import compile
from nmforge.arguments import pattern_text
from nmforge.console import progress_bars, reporter, write_text
from nmforge.encoder import compile_encoder
from nmforge.errors import BadInputError, unknown
from nmforge.inputs import check_outputs, random_inputs, read_inputs, write_outputs
from nmforge.sentiment import SentimentConfig, prepare, train
from nmforge.sources import load_source
from nmforge.whole import whole_source
from sim.memory import MemoryModel
from sim.simulate import Engine, Run, simulate
from sim.trace import Trace

__all__ = ["build_program", "catalogue", "run_program", "run_training"]

_LABELS = {"reference": "integer reference", "isa": "ISA engine, instructions", "verilator": "RTL, cycles"}


def catalogue() -> list[dict[str, Any]]:
    """One row a model: name, parameters, shapes, and the source of its weights."""
    return [_row(name) for name in list_models()]


def _row(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = create_model(name)
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shapes": _shapes(model),
        "source": _source(name),
    }


def _shapes(model: torch.nn.Module) -> str:
    classes = getattr(getattr(model, "config", None), "num_classes", None)
    if classes is not None:
        return f"{type(model).__name__}, images to {classes} classes"
    if not isinstance(model, BertModel):
        return type(model).__name__
    sizes = model.config
    return (
        f"{sizes.layers} layers, hidden {sizes.hidden}, {sizes.heads} heads of {sizes.hidden // sizes.heads}, "
        f"feed-forward {sizes.intermediate}, up to {sizes.positions} tokens"
    )


def _source(name: str) -> str:
    if name not in DISTRIBUTIONS:
        return "random, or pretrained=PATH"
    package = DISTRIBUTIONS[name]
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"pip install {package}"


def _sizes(dense_epochs: int | None, epochs: int | None, sentences: int | None) -> SentimentConfig:
    config = SentimentConfig()
    if sentences is not None:
        config = replace(config, sentences=sentences)
    if dense_epochs is not None:
        config = replace(config, dense=replace(config.dense, epochs=dense_epochs))
    if epochs is not None:
        config = replace(config, idp=replace(config.idp, train=replace(config.idp.train, epochs=epochs)))
    return config


def run_training(
    pattern: dict[str, NM],
    folder: Path,
    *,
    dense_epochs: int | None,
    epochs: int | None,
    sentences: int | None,
    held_out: int,
    seed: int,
    fresh: bool,
) -> dict[str, Any]:
    """Train, and say what came of it; None takes what the demo takes."""
    config = _sizes(dense_epochs, epochs, sentences)
    data = prepare(seed, test_size=held_out, max_length=config.max_length, model=config.model)
    with progress_bars() as progress:
        result = train(pattern, folder, data=data, fresh=fresh, config=config, progress=progress)
    return {
        "pattern": pattern_text(pattern),
        "patterns": {name: str(nm) for name, nm in result.patterns.items()},
        "dense": str(result.dense_folder),
        "sparse": str(result.sparse_folder),
        "accuracy": {"float_dense": result.dense_accuracy, "float_sparse": result.sparse_accuracy},
        "held_out": len(data.test),
        "stages": [
            {"name": s.name, "accuracy": s.accuracy, "seconds": round(s.seconds, 1), "folder": str(s.folder)}
            for s in result.stages
        ],
        "wall_s": round(result.seconds, 1),
    }


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
    whole: bool = False,
    host: Host = "allow",
) -> dict[str, Any]:
    """Compile, write the program file, and say what is in it as JSON values."""
    if not output.resolve().parent.is_dir():
        raise BadInputError(f"the folder of {output} does not exist")
    if host not in get_args(Host):
        raise unknown("value of --host", host, get_args(Host))
    if whole or source.endswith(".onnx"):
        return _build_whole(
            source, output, host=host, arch=arch, listing=listing, pattern=pattern, batch=batch, length=length,
            pretrained=pretrained, calibration=calibration, seed=seed,
        )  # fmt: skip
    found = load_source(source, pattern=pattern, pretrained=pretrained, calibration=calibration, seed=seed)
    if length > found.bert.config.positions:
        raise BadInputError(f"length must be <= {found.bert.config.positions}, the positions of the model, not {length}")
    start = time.monotonic()
    with progress_bars() as progress:
        program = compile_encoder(
            found.bert, batch=batch, length=length, arch=arch, calibration=found.calibration, progress=reporter(progress)
        )
    return _written(program, output, listing, found.description, time.monotonic() - start)


def _build_whole(
    source: str, output: Path, *, host: Host, arch: Arch, listing: Path | None, **options: Any
) -> dict[str, Any]:
    """`build_program` for a whole network: token numbers or images in, results out."""
    found = whole_source(source, **options)
    start = time.monotonic()
    with progress_bars() as progress:
        program = compile(
            found.model, found.example, arch=arch, calibration=found.calibration, host=host, progress=reporter(progress)
        )
    return _written(program, output, listing, found.description, time.monotonic() - start)


def _written(
    program: Program | PartitionedProgram, output: Path, listing: Path | None, description: str, seconds: float
) -> dict[str, Any]:
    """Write a program file, and say what is in it as JSON values."""
    program.save(output)
    parts = program.programs if isinstance(program, PartitionedProgram) else (program,)
    if listing is not None:
        write_text(listing, "\n".join(map(to_text, parts)))
    bounds = [bound_of(part.instructions, part.arch) for part in parts]
    dense, stored = program.weight_bytes
    places = program.report()
    return {
        "file": str(output),
        "source": description,
        "arch": program.arch.name,
        "programs": len(parts),
        "macs_host": places.macs["host"],
        "host_operators": sum(row.place == "host" for row in places.rows),
        "warning": places.warning,
        "operators": len(program.operators),
        "instructions": program.instruction_count,
        "memory_bytes": program.memory_bytes,
        "weight_bytes_dense": dense,
        "weight_bytes": stored,
        "macs": program.macs,
        "effective_macs": program.effective_macs,
        "bound_cycles": sum(bound.cycles for bound in bounds),
        "bound_unit": max(bounds, key=lambda bound: bound.cycles).unit,
        "seconds": round(seconds, 2),
    }


def run_program(
    file: Path,
    *,
    arch: Arch | None,
    engine: str,
    inputs: Path | None,
    outputs: Path | None,
    check: bool,
    memory: MemoryModel,
    trace: Trace | None,
    seed: int,
) -> tuple[Program | PartitionedProgram, Run]:
    """Load a program, run it on inputs from a file or a seed, and write its outputs; `arch`: refuse a program for another."""
    if engine not in get_args(Engine):
        raise unknown("engine", engine, get_args(Engine))
    if engine == "cycle" and (inputs is not None or outputs is not None):
        raise BadInputError("the engine 'cycle' has no data: --inputs and --outputs need another")
    if outputs is not None:
        check_outputs(outputs)
    program = load(file)
    if arch is not None and program.arch != arch:
        raise BadInputError(f"{file} was compiled for {program.arch.name}, not for {arch.name}: compile it again")
    values = None if engine == "cycle" else read_inputs(inputs) if inputs is not None else random_inputs(program, seed)
    with progress_bars() as progress:
        run = simulate(
            program, values, engine=engine, check=check, memory=memory, trace=trace,  # type: ignore[arg-type]
            progress=reporter(progress, _LABELS, _expected(program)),
        )  # fmt: skip
    if outputs is not None:
        names = [spec if isinstance(spec, str) else spec.name for spec in program.outputs]
        write_outputs(outputs, {name: _array(value) for name, value in zip(names, run.outputs, strict=True)})
    return program, run


def _expected(program: Program | PartitionedProgram) -> dict[str, int]:
    """Cycles that the run will take at least; nothing for a program whose errors are yet to be reported."""
    if isinstance(program, PartitionedProgram):
        return {}
    try:
        return {"verilator": bound_of(program.instructions, program.arch).cycles}
    except ValueError:
        return {}


def _array(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value)
