"""What the commands do, without the command line: each gives its result as JSON values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from algo.nm import NM
from algo.observers import observer_factory
from compiler.compile import Host
from compiler.dynamic import DynamicProgram, load
from compiler.listing import bound_of
from compiler.listing import listing as to_text
from compiler.partitioned import PartitionedProgram
from compiler.program import Program
from hw.arch import Arch
from nmforge.api import compile
from nmforge.arguments import pattern_text
from nmforge.console import progress_bars, reporter, write_text
from nmforge.dynamic import chosen, dynamic_dims
from nmforge.encoder import PLACES, compile_encoder
from nmforge.errors import BadInputError, unknown
from nmforge.inputs import check_outputs, random_inputs, read_inputs, write_outputs
from nmforge.sentiment import SentimentConfig, prepare, train
from nmforge.sources import load_source
from nmforge.whole import whole_source
from sim.compare import compare
from sim.memory import MemoryModel
from sim.simulate import Engine, Run, simulate
from sim.trace import Trace

__all__ = ["build_program", "compare_layers", "quantisation_options", "run_program", "run_training"]

_LABELS = {"reference": "integer reference", "isa": "ISA engine, instructions", "verilator": "RTL, cycles"}


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
    quantisation: Mapping[str, Any] | None = None,
    dynamic: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """Compile, write the program file, and say what is in it as JSON values; ``quantisation``: see `quantisation_options`;
    ``dynamic``: what dimensions may be, by name."""
    if not output.resolve().parent.is_dir():
        raise BadInputError(f"the folder of {output} does not exist")
    start = time.monotonic()
    made = _compiled(
        source, pattern=pattern, arch=arch, batch=batch, length=length, pretrained=pretrained, calibration=calibration, seed=seed,
        whole=whole, host=host, quantisation=quantisation or {}, dynamic=dynamic or {},
    )  # fmt: skip
    return _written(made.program, output, listing, made.description, time.monotonic() - start)


@dataclass(frozen=True, eq=False)
class _Compiled:
    """A program, the module it was made of, inputs of it, and where both come from."""

    program: Program | PartitionedProgram | DynamicProgram
    module: nn.Module | str
    inputs: Any
    description: str


def _compiled(
    source: str, *, pattern: dict[str, NM] | None, arch: Arch, batch: int, length: int, pretrained: bool, calibration: int,
    seed: int, whole: bool, host: Host, quantisation: Mapping[str, Any],
    dynamic: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> _Compiled:  # fmt: skip
    """An encoder, or, ``whole`` and of ONNX files, a whole network: token numbers or images in, results out."""
    if host not in get_args(Host):
        raise unknown("value of --host", host, get_args(Host))
    sizes: dict[str, Any] = {"pattern": pattern, "pretrained": pretrained, "calibration": calibration, "seed": seed}
    if whole or source.endswith(".onnx"):
        found = whole_source(source, batch=batch, length=length, dynamic=dynamic, **sizes)
        shapes = dynamic_dims(dynamic, found.places)
        with progress_bars() as progress:
            program = compile(
                found.model, found.example, arch=arch, calibration=found.calibration, host=host, progress=reporter(progress),
                dynamic=shapes, **quantisation,
            )  # fmt: skip
        return _Compiled(program, found.model, found.example, found.description)
    encoder, shapes = load_source(source, **sizes), dynamic_dims(dynamic, PLACES)
    batch, length = max(dynamic.get("batch", (batch,))), max(dynamic.get("length", (length,)))
    positions = encoder.bert.config.positions
    if length > positions:
        raise BadInputError(f"length must be <= {positions}, the positions of the model, not {length}")
    with progress_bars() as progress:
        only = compile_encoder(
            encoder.bert, batch=batch, length=length, arch=arch, calibration=encoder.calibration, progress=reporter(progress),
            dynamic=shapes, **quantisation,
        )  # fmt: skip
    inputs = {name: _of_size(value, batch, length) for name, value in encoder.calibration[0].items()}
    return _Compiled(only, encoder.bert.encoder, inputs, encoder.description)


def _of_size(values: Tensor, batch: int, length: int) -> Tensor:
    """(B, S, ...) cut, repeated, or padded with zeros to other numbers of sequences and tokens."""
    rows = values[torch.arange(batch) % len(values), :length]
    padded = rows.new_zeros(batch, length, *rows.shape[2:])
    padded[:, : rows.shape[1]] = rows
    return padded


def compare_layers(source: str, output: Path | None, *, count: int, **options: Any) -> dict[str, Any]:
    """Compile as `build_program` does, compare every layer with float, and plot it; layers as JSON values, worst first too."""
    if output is not None and output.suffix not in (".svg", ".png"):
        raise BadInputError(f"a plot is written to .svg or .png, not to {output.name!r}")
    if output is not None and not output.resolve().parent.is_dir():
        raise BadInputError(f"the folder of {output} does not exist")
    made = _compiled(source, **options)
    assert isinstance(made.module, nn.Module)  # only of an ONNX file with dynamic shapes is it the path
    comparison = compare(made.program, made.module, made.inputs)
    if output is not None:
        comparison.plot(output, count=count)
    return {
        "source": made.description, "plot": None if output is None else str(output), "table": str(comparison),
        "layers": [asdict(layer) for layer in comparison.layers], "worst": [asdict(layer) for layer in comparison.worst(count)],
    }  # fmt: skip


def quantisation_options(
    *, observer: str, smooth: float | None, bias_correction: bool, bits16: Sequence[str], residual_bits: int
) -> dict[str, Any]:
    """Options of `nmforge.compile` from the command line, checked."""
    try:
        observer_factory(observer)
    except ValueError as error:
        raise BadInputError(f"--observer: {error}") from None
    if smooth is not None and not 0 <= smooth <= 1:
        raise BadInputError(f"--smooth must be in [0, 1], not {smooth}")
    if residual_bits not in (8, 16):
        raise BadInputError(f"--residual-bits must be 8 or 16, not {residual_bits}")
    if "auto" in bits16 and len(bits16) > 1:
        raise BadInputError("--bits16 auto chooses for itself: give it alone, or patterns")
    return {
        "observer": observer, "smooth": smooth, "bias_correction": bias_correction, "residual_bits": residual_bits,
        "bits16": "auto" if "auto" in bits16 else tuple(bits16),
    }  # fmt: skip


def _written(
    made: Program | PartitionedProgram | DynamicProgram, output: Path, listing: Path | None, description: str, seconds: float
) -> dict[str, Any]:
    """Write a program file, and say what is in it as JSON values; of a dynamic program, of its largest shapes."""
    made.save(output)
    if listing is not None:
        write_text(listing, "\n".join(map(to_text, (made,) if isinstance(made, Program) else made.programs)))
    variants = [asdict(row) for row in made.report().variants] if isinstance(made, DynamicProgram) else []
    _, program = chosen(made, {})
    parts = program.programs if isinstance(program, PartitionedProgram) else (program,)
    bounds = [bound_of(part.instructions, part.arch) for part in parts]
    dense, stored = program.weight_bytes
    places = program.report()
    return {
        "file": str(output),
        "file_bytes": output.stat().st_size,
        "variants": variants,
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
    shape: Mapping[str, int] | None = None,
) -> tuple[Program | PartitionedProgram, Run]:
    """Load a program, run it on inputs from a file or a seed, and write its outputs; `arch`: refuse a program for another.

    shape: of a dynamic program, the size of dimensions; without, inputs from a file decide, else it is the largest.
    """
    if engine not in get_args(Engine):
        raise unknown("engine", engine, get_args(Engine))
    if engine == "cycle" and (inputs is not None or outputs is not None):
        raise BadInputError("the engine 'cycle' has no data: --inputs and --outputs need another")
    if outputs is not None:
        check_outputs(outputs)
    loaded = load(file)
    if arch is not None and loaded.arch != arch:
        raise BadInputError(f"{file} was compiled for {loaded.arch.name}, not for {arch.name}: compile it again")
    values = read_inputs(inputs) if inputs is not None else None
    given = loaded.sizes_of(values) if isinstance(loaded, DynamicProgram) and values is not None and not shape else shape
    sizes, program = chosen(loaded, given or {})
    if values is None and engine != "cycle":
        values = random_inputs(program, seed)
    with progress_bars() as progress:
        run = simulate(
            program, values, engine=engine, check=check, memory=memory, trace=trace,  # type: ignore[arg-type]
            progress=reporter(progress, _LABELS, _expected(program)),
        )  # fmt: skip
    run = replace(run, sizes=sizes)
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
