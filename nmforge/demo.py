"""The main job: train sparse, quantise, compile, simulate, prove every byte, report.

Everything that takes time is kept under the output folder, together with a key of all that decides it: the code, the
settings, the weights. A second run reuses what still has the same key; `fresh` starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from algo.checkpoint import read_json, write_json
from algo.finetune import PipelineResult
from algo.nm import NM
from compiler.listing import bound_of
from compiler.program import Program, load
from hw.arch import Arch
from hw.verilog import verilog
from models.bert import CONFIGS, BertClassifier
from nmforge.arguments import pattern_text
from nmforge.console import Report, Stages, reporter, write_text
from nmforge.encoder import (
    calibration_batches,
    choose_sentences,
    compile_encoder,
    encoder_inputs,
    int8_logits,
    pad,
)
from nmforge.errors import BadInputError
from nmforge.sentiment import Batch, SentimentConfig, SentimentData, collate, prepare, train
from sim.engine import VerilatorEngine
from sim.memory import MemoryModel
from sim.report import run_record, write_report
from sim.simulate import simulate
from sim.verilator import verilator_version

__all__ = ["DemoConfig", "run_demo"]

Kind = Literal["sparse", "dense"]

_ROOT = Path(__file__).resolve().parent.parent
_STAGES = 7


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo runs.

    Parameters
    ----------
    pattern
        Patterns by glob of layer names; see `nmforge.arguments.parse_pattern`.
    out
        Folder of everything that is written.
    batch, length
        Sentences simulated at once, and the tokens that each is padded to.
    test_size
        Held-out sentences for the accuracies.
    calibration
        Training sentences from which activation scales are chosen.
    engine
        "isa" leaves out everything that needs Verilator, for tests.
    """

    pattern: Mapping[str, NM]
    arch: Arch
    out: Path = Path("out/demo")
    batch: int = 8
    length: int = 32
    test_size: int = 2000
    calibration: int = 128
    seed: int = 0
    engine: Literal["verilator", "isa"] = "verilator"
    memory: MemoryModel = field(default_factory=MemoryModel)
    training: SentimentConfig = field(default_factory=SentimentConfig)

    def __post_init__(self) -> None:
        for name in ("batch", "length", "test_size", "calibration"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, not {getattr(self, name)!r}")


def run_demo(
    config: DemoConfig,
    *,
    fresh: bool = False,
    data: SentimentData | None = None,
    model: BertClassifier | None = None,
) -> dict[str, Any]:
    """Run the whole job; returns what ``summary.json`` holds.

    Parameters
    ----------
    fresh
        Forget what earlier runs left.
    data, model
        Instead of the real sentences and the pretrained model, for tests.
    """
    return _Demo(config, fresh=fresh, data=data, model=model).run()


class _Kept:
    """Results of stages by name, each with the key it belongs to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reused: list[str] = []

    def get(
        self,
        name: str,
        key: str,
        compute: Callable[[], dict[str, Any]],
        *,
        valid: Callable[[dict[str, Any]], bool] = lambda result: True,
    ) -> dict[str, Any]:
        """The kept result if its key is the same and it is still valid, else a new one."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            try:
                kept = read_json(path)
            except ValueError:
                kept = {}
            if kept.get("key") == key and valid(kept["result"]):
                self.reused.append(name)
                return dict(kept["result"])
        result = compute()
        write_json(path, {"key": key, "result": result})
        return result


class _Demo:
    """State of one run of the demo: each method is a stage."""

    def __init__(
        self, config: DemoConfig, *, fresh: bool, data: SentimentData | None, model: BertClassifier | None
    ) -> None:
        self.config = config
        self.fresh = fresh
        self.stages = Stages(_STAGES)
        self.kept = _Kept(config.out / "kept")
        self.sources = _source_key()
        self._data, self._model = data, model

    def run(self) -> dict[str, Any]:
        start = time.monotonic()
        if self.config.engine == "verilator":
            verilator_version()  # a missing tool should not show up after minutes of training
        if self.fresh:
            shutil.rmtree(self.kept.folder, ignore_errors=True)
        data = self.load()
        trained = self.train(data)
        programs = self.compile(data, trained)
        accuracy = self.accuracy(data, trained, programs)
        build = self.build()
        tokens, numbers = self.sentences(data)
        runs = {kind: self.simulate(kind, trained, programs[kind], tokens) for kind in _KINDS}
        summary = self.summary(data, trained, programs, accuracy, runs, numbers, build)
        summary["wall_s"] = round(time.monotonic() - start, 1)
        self.write(summary)
        return summary

    # -- stages ------------------------------------------------------------------------------------------------------

    def load(self) -> SentimentData:
        config, settings = self.config, self.config.training
        with self.stages.stage("load", "Load the sentences and the tokenizer"):
            data = self._data or prepare(
                config.seed, test_size=config.test_size, max_length=settings.max_length, model=settings.model
            )
        self.stages.say(f"{len(data.train):,} sentences to train on, {len(data.test):,} held out")
        # What does not fit should show up now, not after minutes of training.
        positions = (self._model.bert.config if self._model else CONFIGS[settings.model]).positions
        if config.length > positions:
            raise BadInputError(f"length must be <= {positions}, the positions of the model, not {config.length}")
        choose_sentences(data.test, config.batch, config.length)
        return data

    def train(self, data: SentimentData) -> PipelineResult:
        title = f"Fine-tune dense, prune to {pattern_text(dict(self.config.pattern))} by inherited dynamic pruning"
        with self.stages.stage("train", title) as progress:
            result = train(
                dict(self.config.pattern), self.config.out / "train", data=data, model=self._model, fresh=self.fresh,
                config=self.config.training, progress=progress,
            )  # fmt: skip
        for stage in result.stages:
            spent = f", {stage.seconds:.0f} s" if stage.seconds else ", reused"
            self.stages.say(f"{stage.name:<8} accuracy {stage.accuracy:.1%}{spent}")
        return result

    def compile(self, data: SentimentData, trained: PipelineResult) -> dict[Kind, Program]:
        with self.stages.stage("compile", f"Quantise and compile for {self.config.arch.name}") as progress:
            programs: dict[Kind, Program] = {}
            for kind in _KINDS:
                labels = {name: f"{kind}: {name}" for name in ("trace", "passes", "calibrate", "lower")}
                programs[kind] = self._program(kind, data, trained, reporter(progress, labels))
        for kind, program in programs.items():
            before, after = program.weight_bytes
            self.stages.say(
                f"{kind:<7} {program.instruction_count:,} instructions, weights {before / 1e6:.2f} MB as int8, "
                f"{after / 1e6:.2f} MB stored"
            )
        return programs

    def _program(self, kind: Kind, data: SentimentData, trained: PipelineResult, report: Report) -> Program:
        config, model = self.config, _model_of(kind, trained)
        path = config.out / f"{kind}.nmf"

        def compute() -> dict[str, Any]:
            start = time.monotonic()
            config.out.mkdir(parents=True, exist_ok=True)
            batches = calibration_batches(model.bert, data.train, count=config.calibration)
            program = compile_encoder(
                model.bert, batch=config.batch, length=config.length, arch=config.arch, calibration=batches,
                progress=report,
            )  # fmt: skip
            program.save(path)
            return {"seconds": round(time.monotonic() - start, 2), "sha256": _file_key(path)}

        key = _key(
            self.sources, _weights_key(model), config.arch.to_dict(), config.batch, config.length, config.calibration,
            data.seed, len(data.train),
        )  # fmt: skip
        self.kept.get(f"compile-{kind}", key, compute, valid=lambda kept: _file_key(path) == kept["sha256"])
        return load(path)

    def accuracy(
        self, data: SentimentData, trained: PipelineResult, programs: Mapping[Kind, Program]
    ) -> dict[str, Any]:
        title = f"Accuracy of the integer network on {len(data.test):,} held-out sentences"
        with self.stages.stage("accuracy", title) as progress:
            model = _model_of("sparse", trained)

            def compute() -> dict[str, Any]:
                task = progress.add_task("sparse, int8", total=len(data.test), note="")
                logits = int8_logits(
                    programs["sparse"].network, model, data.test,
                    progress=lambda done, _: progress.update(task, completed=done),
                )  # fmt: skip
                return {"int8_sparse": _accuracy(logits, data)}

            key = _key(self.sources, _network_key(programs["sparse"]), _weights_key(model), data.seed, len(data.test))
            kept = self.kept.get("accuracy", key, compute)
        found = {
            "float_dense": trained.dense_accuracy,
            "float_sparse": trained.sparse_accuracy,
            "int8_sparse": float(kept["int8_sparse"]),
            "sentences": len(data.test),
        }
        self.stages.say(
            f"float dense {found['float_dense']:.1%}, float sparse {found['float_sparse']:.1%}, "
            f"int8 sparse {found['int8_sparse']:.1%}"
        )
        return found

    def build(self) -> dict[str, Any]:
        """Verilog of the accelerator, and its simulator."""
        arch = self.config.arch
        with self.stages.stage("build", f"Generate Verilog and build the simulator of {arch.name}"):
            start = time.monotonic()
            text = verilog(arch)
            seconds = time.monotonic() - start
            write_text(self.config.out / f"{arch.name}.v", text)
            build = None
            if self.config.engine == "verilator":
                with VerilatorEngine(arch, np.zeros(arch.bus_bytes, np.uint8)) as engine:
                    build = engine.harness.build
        self.stages.say(f"{arch.name}.v: {text.count(chr(10)):,} lines")
        if build is None:
            return {"version": "none", "build_s": None, "verilog_s": round(seconds, 2)}
        return {"version": build.version, "build_s": round(build.seconds, 1), "verilog_s": round(seconds, 2)}

    def sentences(self, data: SentimentData) -> tuple[Batch, list[int]]:
        """Held-out sentences of different lengths, padded to the program's."""
        numbers = choose_sentences(data.test, self.config.batch, self.config.length)
        batch = collate(data.test, numbers)
        ids, mask = pad((batch.ids, batch.mask), self.config.length)
        return batch._replace(ids=ids, mask=mask), numbers

    def simulate(self, kind: Kind, trained: PipelineResult, program: Program, tokens: Batch) -> dict[str, Any]:
        """One program: simulated, checked, and its sentences classified."""
        config, model = self.config, _model_of(kind, trained)
        inputs = encoder_inputs(model.bert, (tokens.ids, tokens.mask))
        with self.stages.stage(f"simulate-{kind}", f"Simulate and check the {kind} network") as progress:
            totals = {"verilator": bound_of(program.instructions, program.arch).cycles}
            labels = {"reference": "integer reference", "isa": "ISA engine, instructions", "verilator": "RTL, cycles"}
            report = reporter(progress, labels, totals)

            def compute() -> dict[str, Any]:
                run = simulate(program, inputs, engine=config.engine, check=True, memory=config.memory, progress=report)
                with torch.no_grad():
                    logits = model.classify(torch.as_tensor(run.outputs[0]), tokens.mask)
                return run_record(program, run) | {"logits": logits.tolist()}

            key = _key(
                self.sources, _file_key(config.out / f"{kind}.nmf"), _tensor_key(*inputs.values()), config.engine,
                config.memory.to_dict(), _tensor_key(*model.head.parameters()),
            )  # fmt: skip
            record = self.kept.get(f"simulate-{kind}", key, compute)
        self.stages.say(_run_line(record))
        return record

    # -- results -----------------------------------------------------------------------------------------------------

    def summary(
        self,
        data: SentimentData,
        trained: PipelineResult,
        programs: Mapping[Kind, Program],
        accuracy: dict[str, Any],
        runs: Mapping[Kind, dict[str, Any]],
        numbers: list[int],
        build: dict[str, Any],
    ) -> dict[str, Any]:
        config = self.config
        sparse, dense = programs["sparse"], programs["dense"]
        cycles = {kind: runs[kind]["cycles"] for kind in _KINDS}
        before, after = sparse.weight_bytes
        model = _model_of("sparse", trained)
        tokens, _ = self.sentences(data)
        return {
            "kind": "nmforge demo",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": _model_facts(config.training.model, model),
            "task": "sentiment of movie sentences",
            "pattern": pattern_text(dict(config.pattern)),
            "patterns": {name: str(nm) for name, nm in trained.patterns.items()},
            "arch": config.arch.to_dict(),
            "batch": config.batch,
            "length": config.length,
            "bit_exact": all(runs[kind]["bit_exact"] for kind in _KINDS),
            "bytes_checked": {kind: runs[kind]["bytes_checked"] for kind in _KINDS},
            "accuracy": accuracy,
            "training": _training_facts(config.training, trained, data),
            "cycles": cycles,
            "sparse_speedup": _ratio(cycles["dense"], cycles["sparse"]),
            "ideal_speedup": dense.effective_macs / sparse.effective_macs,
            "utilisation": {kind: runs[kind]["utilisation"] for kind in _KINDS},
            "bytes": {"dense_int8": before, "compressed": after},
            "cpu": _cpu(model, tokens, config.batch),
            "accelerator": _accelerator(config, cycles),
            "simulator": {
                "version": build["version"],
                "cycles_per_s": _speed(runs),
                "build_s": build["build_s"],
            },
            "verilog_s": build["verilog_s"],
            "memory": config.memory.to_dict(),
            "sentences": _sentence_rows(data, numbers, model, runs["sparse"]["logits"]),
            "runs": dict(runs),
            "environment": _environment(),
            "stages": [{"name": name, "seconds": seconds} for name, seconds in self.stages.seconds.items()],
            "reused": self.kept.reused,
        }

    def write(self, summary: dict[str, Any]) -> None:
        """Summary and report."""
        out = self.config.out
        summary["files"] = {
            "report": str(out / "report.html"),
            "summary": str(out / "summary.json"),
            "verilog": str(out / f"{self.config.arch.name}.v"),
            "sparse": str(out / "sparse.nmf"),
            "dense": str(out / "dense.nmf"),
        }
        write_report(summary, out / "report.html")
        write_json(out / "summary.json", summary)


_KINDS: tuple[Kind, ...] = ("sparse", "dense")


def _model_of(kind: Kind, trained: PipelineResult) -> BertClassifier:
    model = trained.sparse if kind == "sparse" else trained.dense
    if not isinstance(model, BertClassifier):
        raise TypeError(f"the demo runs a BertClassifier, not a {type(model).__name__}")
    return model


def _accuracy(logits: Tensor, data: SentimentData) -> float:
    labels = torch.tensor([sentence.label for sentence in data.test])
    return float((logits.argmax(1) == labels).double().mean())


def _ratio(dense: int | None, sparse: int | None) -> float | None:
    return None if dense is None or sparse is None else dense / sparse


def _speed(runs: Mapping[Kind, dict[str, Any]]) -> float | None:
    """Simulated cycles a second, over both runs."""
    cycles = [record["cycles"] for record in runs.values()]
    return None if None in cycles else sum(cycles) / sum(record["wall_s"] for record in runs.values())


def _run_line(record: Mapping[str, Any]) -> str:
    exact = f"{record['bytes_checked']:,} bytes equal" if record["bit_exact"] else "NOT bit-exact"
    if record["cycles"] is None:
        return exact
    return f"{record['cycles']:,} cycles, utilisation {record['utilisation']:.3f}, {exact}"


def _model_facts(name: str, model: BertClassifier) -> dict[str, Any]:
    sizes = model.bert.config
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "encoder": sum(parameter.numel() for parameter in model.bert.encoder.parameters()),
        "layers": sizes.layers,
        "hidden": sizes.hidden,
        "heads": sizes.heads,
        "intermediate": sizes.intermediate,
    }


def _training_facts(config: SentimentConfig, trained: PipelineResult, data: SentimentData) -> dict[str, Any]:
    stages = [{"name": s.name, "accuracy": s.accuracy, "seconds": round(s.seconds, 3)} for s in trained.stages]
    return {
        "sentences": len(data.train),
        "per_epoch": min(config.sentences, len(data.train)),
        "dense_epochs": config.dense.epochs,
        "epochs_per_level": config.idp.train.epochs,
        "seed": data.seed,
        "seconds": round(trained.seconds, 1),
        "stages": stages,
    }


def _cpu(model: BertClassifier, tokens: Batch, batch: int, repeats: int = 9) -> dict[str, Any]:
    """PyTorch's float32 encoder on the same batch, on this machine: median of several runs."""
    inputs = encoder_inputs(model.bert, (tokens.ids, tokens.mask))
    times = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            start = time.perf_counter()
            model.bert.encoder(**inputs)
            times.append(time.perf_counter() - start)
    return {
        "seconds_per_sentence": statistics.median(times[2:]) / batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": "float32",
        "processor": _processor(),
    }


def _accelerator(config: DemoConfig, cycles: Mapping[Kind, int | None]) -> dict[str, Any]:
    hertz = config.arch.clock_mhz * 1e6
    seconds = {kind: None if count is None else count / hertz / config.batch for kind, count in cycles.items()}
    return {
        "clock_mhz_assumed": config.arch.clock_mhz,
        "seconds_per_sentence": seconds["sparse"],
        "seconds_per_sentence_dense": seconds["dense"],
    }


def _sentence_rows(
    data: SentimentData, numbers: list[int], model: nn.Module, logits: list[list[float]]
) -> list[dict[str, Any]]:
    """What the accelerator says of each sentence, beside the float model."""
    batch = collate(data.test, numbers)
    with torch.no_grad():
        floats = model(batch.ids, batch.mask).softmax(1)[:, 1].tolist()
    simulated = torch.tensor(logits).softmax(1)[:, 1].tolist()
    return [
        {
            "text": data.test[number].text,
            "tokens": len(data.test[number].ids),
            "label": data.test[number].label,
            "positive_float": floats[row],
            "positive_accelerator": simulated[row],
        }
        for row, number in enumerate(numbers)
    ]


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
        "processor": _processor(),
        "cpus": os.cpu_count(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# -- keys ------------------------------------------------------------------------------------------------------------


def _source_key() -> str:
    """Hash of the code that results depend on."""
    digest = hashlib.sha256()
    for folder in ("algo", "compiler", "hw", "models", "sim/cpp", "sim"):
        for path in sorted((_ROOT / folder).rglob("*.*" if folder == "sim/cpp" else "*.py")):
            if path.is_file() and not path.name.startswith(("report", "plots")):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file_key(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"


def _tensor_key(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.detach().numpy()).tobytes())
    return digest.hexdigest()


def _weights_key(model: nn.Module) -> str:
    return _tensor_key(*model.state_dict().values())


def _network_key(program: Program) -> str:
    return hashlib.sha256(program.to_bytes()).hexdigest()
