"""Run a program on an engine, and prove every byte it writes."""

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from compiler.dynamic import DynamicProgram
from compiler.partitioned import PartitionedProgram
from compiler.program import Program
from hw.arch import Arch
from sim.check import IsaRecord, Mismatch, compare_image, compare_log, record_isa
from sim.cycle import run_cycles
from sim.engine import EngineRun, VerilatorEngine
from sim.memory import MemoryModel
from sim.model_io import Inputs, dequantise_outputs, quantise_inputs
from sim.partitioned import run_stages
from sim.reference import run_reference
from sim.timing import cycles_by_operator, operator_cycles
from sim.trace import Trace

__all__ = ["Engine", "Progress", "Run", "simulate"]

Engine = Literal["verilator", "isa", "reference", "cycle"]

Progress = Callable[[str, int, int | None], None]
"""Called with a stage (``"reference"``, ``"isa"``, ``"verilator"``), how far it is, and its end if that is known."""

_CYCLES_ALLOWED = 10_000_000
_SLOWDOWN_ALLOWED = 200


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """Result of `simulate`.

    Attributes
    ----------
    outputs : tuple
        The model's outputs in order: torch tensors with the model's shapes and dtypes; integer arrays if the program
        was compiled from an integer network. Empty for the engine "cycle", which has no data.
    tensors : dict
        The integer output tensors by the network's names; empty for the engine "cycle".
    cycles : int or None
        From start to done, counted in RTL, or equal to that (engine "cycle"); None for the engine "isa".
    utilisation : float or None
        ``program.effective_macs / (arch.macs * cycles)``.
    counters : dict
        Performance counters; `sim.counters` explains them.
    operator_cycles : dict
        Cycles by operator name, adding up to `cycles` (engine "cycle", and checked runs of "verilator"); see
        `sim.timing`.
    bit_exact : bool or None
        Whether every byte agreed; None if not checked.
    mismatches : tuple of Mismatch
        The first difference of each comparison that failed.
    bytes_checked : int
        Bytes that the program wrote and the check compared.
    wall_s : float
        Seconds that the engine ran, without build, reference and comparison.
    cycles_per_s : float or None
        Speed of the simulation.
    check_s : float
        Seconds for reference, ISA engine and comparison, or for the engine "cycle"'s check of the instructions.
    build_s : float or None
        Seconds that building the simulator took, now or when it was put into the cache.
    simulator : str
        Name and version.
    outputs_sha256 : str or None
        Of the integer output tensors: names, dtypes, shapes, bytes; None for the engine "cycle".
    memory : MemoryModel
        Timing of the memory.
    stages : tuple of Run
        Of a partitioned program: the run of each of its programs, in order; the other attributes are their sums.
    host_s : float
        Of a partitioned program: seconds that the host parts took.
    sizes : dict
        Of a dynamic program: the value of each dimension.
    """

    engine: Engine
    arch: Arch
    outputs: tuple[torch.Tensor | NDArray[np.integer], ...]
    tensors: dict[str, NDArray[np.integer]]
    cycles: int | None
    utilisation: float | None
    counters: dict[str, int] = field(default_factory=dict)
    operator_cycles: dict[str, int] = field(default_factory=dict)
    bit_exact: bool | None = None
    mismatches: tuple[Mismatch, ...] = ()
    bytes_checked: int = 0
    wall_s: float = 0.0
    cycles_per_s: float | None = None
    check_s: float = 0.0
    build_s: float | None = None
    simulator: str
    outputs_sha256: str | None
    memory: MemoryModel
    stages: tuple["Run", ...] = ()
    host_s: float = 0.0
    sizes: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Run(engine={self.engine!r}, arch={self.arch.name!r}, cycles={self.cycles}, utilisation={self.utilisation}, "
            f"bit_exact={self.bit_exact})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but tensors, as plain values for JSON."""
        plain = (
            "engine", "cycles", "utilisation", "counters", "operator_cycles", "bit_exact", "bytes_checked", "outputs_sha256",
            "wall_s", "cycles_per_s", "check_s", "build_s", "simulator", "host_s", "sizes",
        )  # fmt: skip
        return {
            **{name: getattr(self, name) for name in plain},
            "arch": self.arch.name,
            "mismatches": [str(mismatch) for mismatch in self.mismatches],
            "memory": self.memory.to_dict(),
        }


def simulate(
    program: Program | PartitionedProgram | DynamicProgram,
    inputs: Inputs | None = None,
    *,
    engine: Engine = "verilator",
    check: bool = True,
    memory: MemoryModel | None = None,
    max_cycles: int | None = None,
    trace: Trace | str | None = None,
    progress: Progress | bool = False,
) -> Run:
    """Run a program.

    Parameters
    ----------
    program : Program, PartitionedProgram or DynamicProgram
        Of the second, each program runs on the engine and the host parts run in torch, with the values that the engine
        gave. Of the last, the variant for the inputs' shapes runs.
    inputs
        The model's inputs: a tensor, tensors in order, or a dict by name; shapes and dtypes are the model's. The engine
        "cycle" needs none and looks at none, but for the shapes that choose a variant.
    engine : str
        ``"verilator"`` is the RTL, cycle by cycle; ``"isa"`` is functional; ``"reference"`` is the integer
        reference alone, the fastest; ``"cycle"`` has the RTL's timing without data.
    check : bool
        Compare every tensor with the integer reference and every written byte between the engines (not "reference", "cycle").
    memory : MemoryModel
        Timing of the memory (engines "verilator" and "cycle").
    max_cycles : int
        Give up after so many; None allows 10 million and 200 times the ideal.
    trace : Trace or path
        Record waveforms (engine "verilator").
    progress : bool or callable
        True shows progress on stderr.

    Raises
    ------
    ValueError
        Bad inputs, an unknown engine, a trace of an engine without signals, no inputs for an engine with data.
    AcceleratorError
        The accelerator stopped the program; `IsaError` from the ISA engine.
    CycleLimitError
        `max_cycles` are over.
    ProtocolError
        The accelerator broke a rule of AXI.
    ToolMissingError, BuildError
        The simulator cannot be built.
    """
    _check_engine(engine, trace)
    if max_cycles is not None and max_cycles < 1:
        raise ValueError(f"max_cycles must be at least 1, not {max_cycles!r}")
    report, memory, trace = _reporter(progress), memory or MemoryModel(), _as_trace(trace)
    if isinstance(program, DynamicProgram):
        if inputs is None:
            raise ValueError(f"this program has several shapes: give inputs of one, or simulate program.at({_example(program)})")
        sizes = program.sizes_of(inputs)
        run = simulate(
            program.at(**sizes), inputs, engine=engine, check=check, memory=memory, max_cycles=max_cycles, trace=trace,
            progress=progress,
        )  # fmt: skip
        return replace(run, sizes=sizes)
    if isinstance(program, PartitionedProgram):
        return _partitioned_run(program, inputs, engine, check, memory, max_cycles, trace, report)
    if engine == "cycle":
        return _cycle_run(program, memory, max_cycles)
    if inputs is None:
        raise ValueError(f"the engine {engine!r} needs inputs: {', '.join(spec.name for spec in program.inputs)}")
    integers = quantise_inputs(program, inputs)
    if engine == "reference":
        return _reference_run(program, integers, memory)
    image = _padded(program.memory_image(integers), program.arch.bus_bytes)
    start = time.monotonic()
    record = _record(program, image, integers if check else None, report) if check or engine == "isa" else None
    seconds = time.monotonic() - start
    if engine == "isa" and record is not None:
        return _isa_run(program, record, check, seconds, memory)
    return _Verilator(program, image, record, memory, trace, max_cycles, report).run(seconds)


def _example(program: DynamicProgram) -> str:
    return ", ".join(f"{dim.name}={dim.values[-1]}" for dim in program.shapes.dims)


def _check_engine(engine: str, trace: Trace | str | None) -> None:
    if engine not in get_args(Engine):
        raise ValueError(f"unknown engine {engine!r}; the engines are {', '.join(get_args(Engine))}")
    if engine != "verilator" and trace is not None:
        raise ValueError(f"the engine {engine!r} has no signals to trace; use 'verilator'")


def _as_trace(trace: Trace | str | None) -> Trace | None:
    return trace if trace is None or isinstance(trace, Trace) else Trace(trace)


def _padded(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.concatenate([image, np.zeros(-len(image) % size, np.uint8)])


def _reporter(progress: Progress | bool) -> Progress:
    if callable(progress):
        return progress
    return _ProgressLine() if progress else lambda stage, done, end: None


class _ProgressLine:
    """One line on stderr, rewritten a few times a second."""

    def __init__(self) -> None:
        self._stage, self._began, self._shown = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, end: int | None) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._shown = stage, now, 0.0
        if now - self._shown < 0.3 and done != end:
            return
        self._shown = now
        unit = "cycles" if stage == "verilator" else "instructions"
        amount = f"{done:,} of {end:,} {unit}" if end is not None else f"{done:,} {unit}" if done else "running"
        sys.stderr.write(f"\r{stage}: {amount}, {now - self._began:.1f} s\x1b[K" + ("\n" if done == end else ""))
        sys.stderr.flush()


def _record(
    program: Program, image: NDArray[np.uint8], integers: dict[str, NDArray[np.integer]] | None, report: Progress
) -> IsaRecord:
    """ISA engine on a copy of the image, against the reference if there are `integers` to feed it."""
    reference = None
    if integers is not None:
        report("reference", 0, None)
        reference = run_reference(program.network, integers)
    return record_isa(program, image.copy(), reference, lambda done: report("isa", done, program.instruction_count - 1))


def _reference_run(program: Program, integers: dict[str, NDArray[np.integer]], memory: MemoryModel) -> Run:
    start, wanted = time.monotonic(), set(program.network.outputs)
    tensors = run_reference(program.network, integers, keep=wanted.__contains__)
    return Run(
        engine="reference", cycles=None, utilisation=None, wall_s=time.monotonic() - start, memory=memory,
        simulator="nmforge integer reference", arch=program.arch, tensors=tensors,
        outputs=dequantise_outputs(program, tensors), outputs_sha256=_sha256(tensors),
    )


def _partitioned_run(
    program: PartitionedProgram, inputs: Inputs | None, engine: Engine, check: bool, memory: MemoryModel,
    max_cycles: int | None, trace: Trace | None, report: Progress,
) -> Run:
    runs: list[Run] = []

    def run(number: int, part: Program, values: dict[str, Any]) -> tuple[Any, ...]:
        runs.append(simulate(
            part, values or None, engine=engine, check=check, memory=memory, max_cycles=max_cycles, progress=report,
        ))  # fmt: skip
        return runs[-1].outputs

    if trace is not None:
        raise ValueError("a partitioned program cannot be traced as a whole: simulate one of its programs")
    if engine == "cycle":
        for number, part in enumerate(program.programs):
            run(number, part, {})
        return _summed(program, runs, (), 0.0)
    if inputs is None:
        raise ValueError(f"the engine {engine!r} needs inputs: {', '.join(spec.name for spec in program.inputs)}")
    return _summed(program, runs, *run_stages(program, inputs, run))


def _summed(program: PartitionedProgram, runs: list[Run], outputs: tuple[torch.Tensor, ...], host_s: float) -> Run:
    """The runs of a partitioned program's parts as one."""
    first, counted = runs[0], all(run.cycles is not None for run in runs)
    cycles = sum(run.cycles or 0 for run in runs) if counted else None
    exact = [run.bit_exact for run in runs if run.bit_exact is not None]
    counters = {name: sum(run.counters.get(name, 0) for run in runs) for name in first.counters}
    by_operator = {
        f"{name} [{number}]" if any(name in other.operator_cycles for other in runs[:number]) else name: value
        for number, run in enumerate(runs) for name, value in run.operator_cycles.items()
    }  # fmt: skip
    wall = sum(run.wall_s for run in runs)
    tensors = {f"{number}.{name}": value for number, run in enumerate(runs) for name, value in run.tensors.items()}
    return Run(
        engine=first.engine, arch=first.arch, outputs=outputs, tensors=tensors, cycles=cycles, counters=counters,
        operator_cycles=by_operator, bit_exact=all(exact) if exact else None,
        utilisation=program.effective_macs / (first.arch.macs * cycles) if cycles else None,
        mismatches=tuple(mismatch for run in runs for mismatch in run.mismatches),
        bytes_checked=sum(run.bytes_checked for run in runs), wall_s=wall,
        cycles_per_s=cycles / wall if cycles and wall else None, check_s=sum(run.check_s for run in runs),
        build_s=first.build_s, simulator=first.simulator, outputs_sha256=_sha256(tensors) if tensors else None,
        memory=first.memory, stages=tuple(runs), host_s=host_s,
    )  # fmt: skip


def _isa_run(program: Program, record: IsaRecord, check: bool, seconds: float, memory: MemoryModel) -> Run:
    mismatches = (record.mismatch,) if record.mismatch is not None else ()
    return Run(
        engine="isa", cycles=None, utilisation=None, wall_s=seconds, simulator="nmforge ISA engine", memory=memory,
        bit_exact=not mismatches if check else None, mismatches=mismatches,
        bytes_checked=record.bytes_written if check else 0, **_results(program, record.image),
    )


def _cycle_run(program: Program, memory: MemoryModel, max_cycles: int | None) -> Run:
    run = run_cycles(program, memory, max_cycles=max_cycles or _cycles_allowed(program))
    completed = dict(zip(run.storing.tolist(), run.completed.tolist()))
    return Run(
        engine="cycle", arch=program.arch, outputs=(), tensors={}, cycles=run.cycles, counters=run.counters,
        operator_cycles=cycles_by_operator(program, completed, run.cycles), memory=memory,
        utilisation=program.effective_macs / (program.arch.macs * run.cycles), wall_s=run.wall_s,
        cycles_per_s=run.cycles_per_s, check_s=run.check_s, simulator="nmforge cycle engine", outputs_sha256=None,
    )


def _cycles_allowed(program: Program) -> int:
    return int(_CYCLES_ALLOWED + _SLOWDOWN_ALLOWED * program.ideal_cycles)


def _results(program: Program, image: NDArray[np.uint8]) -> dict[str, Any]:
    """Fields that come from the final memory."""
    tensors = {name: program.read_tensor(image, name) for name in program.network.outputs}
    return {
        "arch": program.arch,
        "tensors": tensors,
        "outputs": dequantise_outputs(program, tensors),
        "outputs_sha256": _sha256(tensors),
    }


def _sha256(tensors: dict[str, NDArray[np.integer]]) -> str:
    digest = hashlib.sha256()
    for name, values in tensors.items():
        digest.update(f"{name} {values.dtype.name} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class _Verilator:
    """One run of the RTL. record : what it must write; None checks nothing."""

    program: Program
    image: NDArray[np.uint8]
    record: IsaRecord | None
    memory: MemoryModel
    trace: Trace | None
    max_cycles: int | None
    report: Progress

    def run(self, check_s: float) -> Run:
        program = self.program
        with VerilatorEngine(
            program.arch, self.image, model=self.memory, log_writes=self.record is not None,
            trace=self.trace is not None,
        ) as engine:
            start = time.monotonic()
            result = self._run_program(engine)
            wall = time.monotonic() - start
            self.report("verilator", result.cycles, result.cycles)
            mismatches = self._compare(engine)
            build = engine.harness.build
            times = engine.harness.write_times()
        checked = self.record is not None
        return Run(
            engine="verilator", cycles=result.cycles, counters=result.counters, memory=self.memory,
            operator_cycles=operator_cycles(program, times, result.statistics.started, result.cycles),
            utilisation=program.effective_macs / (program.arch.macs * result.cycles),
            bit_exact=not mismatches if checked else None, mismatches=mismatches,
            bytes_checked=self.record.bytes_written if self.record is not None else 0,
            wall_s=wall, cycles_per_s=result.cycles / wall, check_s=check_s + time.monotonic() - start - wall,
            build_s=build.seconds, simulator=f"Verilator {build.version}", **_results(program, self.image),
        )

    def _run_program(self, engine: VerilatorEngine) -> EngineRun:
        return engine.run(
            code_address=self.program.code_address,
            instructions=self.program.instruction_count,
            max_cycles=_cycles_allowed(self.program) if self.max_cycles is None else self.max_cycles,
            trace=self.trace,
            progress=lambda cycles: self.report("verilator", cycles, None),
        )

    def _compare(self, engine: VerilatorEngine) -> tuple[Mismatch, ...]:
        if self.record is None:
            return ()
        found = (
            self.record.mismatch,
            compare_log(self.program, self.record, engine.harness.write_log()),
            compare_image(self.program, self.record, self.image),
        )
        return tuple(mismatch for mismatch in found if mismatch is not None)
