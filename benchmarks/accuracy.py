"""What int8 costs: networks trained on real data, compiled, every held-out example by the integer reference; dense and 2:4.

``python -m benchmarks.accuracy [--minutes M] [--network NAME | --options]``: every cell (network,
pattern) is kept in ``benchmarks/results/accuracy/``, the trained models in ``out/accuracy/``; what is there is not done
again, so it can be stopped at any time. ``python -m benchmarks accuracy`` does what is missing and writes the tables of
docs/accuracy.md.

Scales come from training examples; nothing is chosen by the held-out ones. The integer reference is what ISA engine and RTL equal
byte for byte.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import nmforge as nf
from algo.checkpoint import difference, load_model, save_model, write_json
from algo.data import movie_sentences
from algo.instruct import token_loss, train_tokenizer, window_batches
from algo.sparsify import finalize, sparsify
from algo.train import StepFn, TrainConfig, progress_bars, train
from benchmarks import DOCS, RESULTS, Table, environment, write_page
from benchmarks import train_classifiers as classifiers
from benchmarks.sparse_training import Cell as SparseCell
from benchmarks.sparse_training import dense_model, load_task
from compiler.frontend import trace
from compiler.passes import optimise
from compiler.quantise import quantise
from models import create_model
from models.odconv import temperature_schedule
from nmforge.tasks import get_task
from sim.reference import dequantise, quantise_inputs, run_reference

__all__ = ["CELLS", "NETWORKS", "Cell", "Problem", "evaluate", "run"]

RESULT = RESULTS / "accuracy"
WORK = Path(__file__).parent.parent / "out" / "accuracy"
BATCH, SMALLER = 16, {"odconv4": 4}
"""Examples in one run of a program; fewer of a network that has kernels, and so operators, for each example."""
CALIBRATION = 128
"""Training examples to calibrate with."""
EPOCHS, MORE_EPOCHS = 5, {"vit": 20}
"""Epochs of training, and of the networks that need more to learn anything."""
FINE_TUNING = 3
"""Epochs after pruning to 2:4, at a third of the learning rate."""
DIGITS = ("vit", "ceit", "resnet18", "odconv4", "dgnet444")
OPTIONS: dict[str, dict[str, Any]] = {
    "mse": {}, "minmax": {"observer": "minmax"}, "percentile:99.99": {"observer": "percentile"},
    "percentile:99.9": {"observer": "percentile:99.9"}, "entropy": {"observer": "entropy"},
    "no bias correction": {"bias_correction": False}, "smooth 0.3": {"smooth": 0.3}, "smooth 0.5": {"smooth": 0.5},
    "smooth 0.75": {"smooth": 0.75}, "residual_bits 16": {"residual_bits": 16},
    "residual_bits 16, smooth 0.5": {"residual_bits": 16, "smooth": 0.5}, "bits16 auto": {"bits16": "auto"},
    "bits16 *": {"bits16": "*"}, "bits16 *, smooth 0.5": {"bits16": "*", "smooth": 0.5},
}  # fmt: skip
"""Options of `compiler.quantise.quantise` by name, compared on MiniLM-L6."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """A network and its data.

    Members
    -------
    model
        Makes the network to train.
    dense
        Trains it, in place.
    batches, loss, config
        For fine-tuning the sparse network: an epoch's batches, the loss, and how.
    layers
        Glob of the layers that 2:4 is about.
    held_out
        Inputs and labels, ready for the program's shapes but for the number of examples; labels (N,) or (N, tokens).
    calibration
        Inputs like them, of training examples.
    """

    model: Callable[[], nn.Module]
    dense: Callable[[nn.Module], None]
    batches: Callable[[int], list[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    config: TrainConfig
    layers: str
    held_out: Callable[[], Iterable[tuple[tuple[Tensor, ...], Tensor]]]
    calibration: Callable[[], Iterable[tuple[Tensor, ...]]]


def _digits(name: str) -> Problem:
    """A network of `benchmarks.train_classifiers` on MNIST-5k."""
    network = classifiers.NETWORKS[name]
    config = replace(network.train, epochs=MORE_EPOCHS.get(name, EPOCHS))
    task = get_task("mnist5k", **classifiers.DATA)
    hook: StepFn | None = temperature_schedule() if network.anneal else None

    def model() -> nn.Module:
        torch.manual_seed(0)
        return create_model(network.model, **network.options)

    return Problem(
        model=model, dense=lambda model: _fit(name, model, task.batches, task.loss, config, hook),
        batches=task.batches, loss=task.loss, config=config, layers="*",
        held_out=lambda: ((task.inputs(batch), task.labels(batch)) for batch in task.held_out()),
        calibration=lambda: (task.inputs(batch) for batch in task.batches(0)),
    )  # fmt: skip


def _movies() -> Problem:
    """MiniLM-L6 with published weights, fine-tuned on movie sentences as in `benchmarks.sparse_training`."""
    cell = SparseCell("movies", "2:4", "one-shot")
    task, length = load_task(cell), 40

    def padded(batch: Any) -> tuple[Tensor, ...]:
        return tuple(F.pad(part, (0, length - part.shape[1])) for part in task.inputs(batch))

    def dense(model: nn.Module) -> None:
        with progress_bars() as progress:
            model.load_state_dict(dense_model(cell, task, progress)[0].state_dict())

    return Problem(
        model=lambda: task.model(0), dense=dense, batches=task.batches, loss=task.loss,
        layers=task.layers,
        config=TrainConfig(epochs=2 * EPOCHS, lr=1e-4), calibration=lambda: (padded(batch) for batch in task.batches(0)),
        held_out=lambda: ((padded(batch), task.labels(batch)) for batch in task.held_out()),
    )  # fmt: skip


def _llama() -> Problem:
    """The small LLaMA on movie sentences: next token."""
    length = 64
    model_name = "llama_small"
    trained, held = ([text for text, _ in part] for part in movie_sentences(seed=0, test_size=1000))
    tokenizer = train_tokenizer(trained, create_model(model_name).config.vocabulary)
    streams = [torch.tensor([token for code in tokenizer.encode_batch(part) for token in code.ids]) for part in (trained, held)]
    batches = window_batches(streams[0], length=length, size=2048, batch_size=32, seed=0)
    config = TrainConfig(epochs=EPOCHS, lr=2e-3, weight_decay=0.1, beta2=0.95, schedule="cosine")

    def model() -> nn.Module:
        torch.manual_seed(0)
        return create_model(model_name)

    def held_out() -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for batch in window_batches(streams[1], length=length, size=None, batch_size=64, seed=0)(0):
            yield (batch.tokens,), batch.labels

    return Problem(
        model=model, batches=batches, loss=token_loss,
        config=config, dense=lambda model: _fit("llama", model, batches, token_loss, config), layers="layers.*",
        held_out=held_out, calibration=lambda: ((batch.tokens,) for batch in batches(0)),
    )  # fmt: skip


def _fit(
    name: str, model: nn.Module, batches: Any, loss: Any, config: TrainConfig, hook: StepFn | None = None
) -> None:
    """Train; goes on where it was stopped."""
    checkpoint = WORK / f"{name}.safetensors"
    with progress_bars() as progress:
        train(model, batches, loss, config, checkpoint=checkpoint, before_step=hook, progress=progress, label=name)


@cache
def problem(name: str) -> Problem:
    """A network by name, its data loaded once."""
    return _movies() if name == "minilm" else _llama() if name == "llama" else _digits(name)


TITLES = {
    "minilm": "MiniLM-L6, movie sentences", **{name: classifiers.NETWORKS[name].title for name in DIGITS},
    "odconv4": "ResNet-18, 8 channels, ODConv 4x", "dgnet444": "DG-Net, 3 stages of 4 blocks, 8 channels",
    "llama": "LLaMA, 6 layers of 128, next token",
}  # fmt: skip
NETWORKS = tuple(TITLES)


@dataclass(frozen=True)
class Cell:
    """One network, compiled in one way."""

    network: str
    pattern: str = "dense"

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        return RESULT / f"{self.network}-{self.pattern.replace(':', 'of')}.json"

    @property
    def batch(self) -> int:
        """Examples in one run of its program."""
        return SMALLER.get(self.network, BATCH)

    @property
    def setting(self) -> dict[str, Any]:
        """All that decides the result, as JSON has it."""
        training = {"epochs": MORE_EPOCHS.get(self.network, EPOCHS), "fine_tuning": FINE_TUNING,
                    "calibration": CALIBRATION // self.batch, "batch": self.batch}
        return json.loads(json.dumps({"cell": asdict(self), "training": training}))

    @property
    def result(self) -> dict[str, Any] | None:
        """The result, if there is one of this very setting."""
        if not self.path.is_file():
            return None
        found = json.loads(self.path.read_text())
        return found if difference(found["setting"], self.setting) is None else None


CELLS = tuple(Cell(network, pattern) for pattern in ("dense", "2:4") for network in NETWORKS)


def trained(name: str, pattern: str) -> nn.Module:
    """The network of a cell, trained or from its file."""
    found, title = problem(name), f"{name}-{pattern.replace(':', 'of')}"
    if (WORK / title / "model.json").is_file():
        model = found.model()
        load_model(model, WORK / title)
        return model.eval()
    if pattern == "dense":
        model = found.model()
        found.dense(model)
    else:
        model = trained(name, "dense")
        sparsify(model, {found.layers: pattern}, method="magnitude", hold=True)
        config = replace(found.config, epochs=FINE_TUNING, lr=found.config.lr / 3)
        _fit(title, model, found.batches, found.loss, config)
        finalize(model)
    save_model(model, WORK / title)
    return model.eval()


@torch.no_grad()
def evaluate(
    model: nn.Module, program: Any, held_out: Iterable[tuple[tuple[Tensor, ...], Tensor]], batch: int = BATCH
) -> dict[str, float]:
    """Accuracies in float and in integers, the share of equal answers, and the cosine of the logits, over all examples, of which
    the program takes ``batch`` at a time."""
    sums: Counter[str] = Counter()
    with parametrize.cached():
        for inputs, labels in held_out:
            for start in range(0, len(labels), batch):
                part, wanted = [x[start : start + batch] for x in inputs], labels[start : start + batch]
                missing = batch - len(wanted)
                full = tuple(torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) for x in part)
                logits = torch.as_tensor(nf.simulate(program, full, engine="reference").outputs[0])[: len(wanted)]
                sums.update(_scores(model(*part).double(), logits.double(), wanted))
    cosine = sums["dot"] / math.sqrt(sums["norm"] * sums["norm8"])
    shares = {name: sums[name] / sums["count"] for name in ("float", "int8", "same")}
    return {**shares, "cosine": cosine, "count": sums["count"]}


def _scores(exact: Tensor, integers: Tensor, labels: Tensor) -> dict[str, float]:
    """Sums over the examples of one run; logits (..., classes)."""
    answer, answer8 = exact.argmax(-1), integers.argmax(-1)
    return {
        "float": int((answer == labels).sum()), "int8": int((answer8 == labels).sum()), "same": int((answer == answer8).sum()),
        "count": labels.numel(), "dot": float((exact * integers).sum()), "norm": float((exact**2).sum()),
        "norm8": float((integers**2).sum()),
    }  # fmt: skip


def run_cell(cell: Cell) -> None:
    """Train or load, compile, evaluate; kept in its file."""
    model, found = trained(cell.network, cell.pattern), problem(cell.network)
    first = (_first(inputs, cell.batch) for inputs in found.calibration())
    calibration = [inputs for inputs, _ in zip(first, range(CALIBRATION // cell.batch))]
    start = time.process_time()
    program = nf.compile(model, calibration[0], calibration=calibration, order="operator")
    seconds = time.process_time() - start
    scores = evaluate(model, program, found.held_out(), cell.batch)
    worst = nf.compare(program, model, calibration[0]).worst(3)
    RESULT.mkdir(parents=True, exist_ok=True)
    write_json(cell.path, {
        "setting": cell.setting, **scores, "compile_s": round(seconds, 1), "programs": len(getattr(program, "programs", (1,))),
        "worst": [{"layer": layer.source or layer.name, "sqnr": round(layer.sqnr, 2)} for layer in worst],
        "environment": environment(),
    })  # fmt: skip
    print(cell, scores, flush=True)


def _first(inputs: tuple[Tensor, ...], batch: int = BATCH) -> tuple[Tensor, ...]:
    return tuple(x[:batch].contiguous() for x in inputs)


def run_missing(cells: Iterable[Cell], minutes: float = float("inf")) -> None:
    """Run cells that have no result, as long as time is left."""
    end = time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    for cell in cells:
        if cell.result is None and time.monotonic() < end:
            run_cell(cell)


def run() -> list[Table]:
    """Do what is missing; the tables, also on their page."""
    run_missing(CELLS)
    if not OPTIONS_FILE.is_file():
        compare_options()
    found = tables()
    write_page(DOCS / "accuracy.md", "accuracy", found)
    return found


def tables() -> list[Table]:
    """Of the cells that have results."""
    return [_main_table(), *([_options_table()] if OPTIONS_FILE.is_file() else [])]


def _main_table() -> Table:
    rows = []
    for cell in CELLS:
        result = cell.result
        if result is None:
            continue
        worst, difference = result["worst"][0], 100 * (result["int8"] - result["float"])
        rows.append((
            TITLES[cell.network], cell.pattern, result["count"], f"{100 * result['float']:.2f}",
            f"{100 * result['int8']:.2f}", f"{difference:+.2f}", f"{100 * result['same']:.2f}", f"{result['cosine']:.5f}",
            f"{worst['layer']} ({worst['sqnr']:.1f} dB)",
        ))  # fmt: skip
    columns = (
        "network", "weights", "held out", "float (%)", "int8 (%)", "difference (points)", "same answer (%)", "cosine",
        "worst layer",
    )  # fmt: skip
    note = (
        f"All held-out examples (of LLaMA: tokens), calibrated with {CALIBRATION} training examples. The networks were trained "
        f"for {EPOCHS} epochs (MiniLM: one, ViT: {MORE_EPOCHS['vit']}), and {FINE_TUNING} more after pruning by magnitude: they "
        "are here for the difference, not for their accuracy."
    )
    return Table("int8 against float", columns, tuple(rows), note)


OPTIONS_FILE = RESULT / "options.json"


def compare_options(sentences: int = 32) -> None:
    """What options of quantisation do to the encoder of MiniLM-L6, dense, on some held-out sentences; kept in `OPTIONS_FILE`."""
    torch.set_num_threads(1)
    model, found = trained("minilm", "dense"), problem("minilm")

    def embedded(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return model.bert.embeddings(inputs[0]).detach(), inputs[1]

    calibration = [embedded(_first(inputs)) for inputs, _ in zip(found.calibration(), range(CALIBRATION // BATCH // 2))]
    inputs, _ = next(iter(found.held_out()))
    hidden = embedded(tuple(x[:sentences] for x in inputs))
    graph = optimise(trace(model.bert.encoder, hidden))
    (exact,), keep = graph.run(hidden).values(), hidden[1].bool()
    rows = []
    for name, options in OPTIONS.items():
        network = quantise(graph, calibration, **options)
        output = network.outputs[0]
        integers = run_reference(network, quantise_inputs(network, graph.bind(hidden)), keep=lambda n, last=output: n == last)
        got = dequantise(network, output, integers[output])
        with torch.no_grad():
            logits = [model.classify(value, hidden[1]) for value in (exact, got)]
        rows.append({
            "options": name, "operators": len(network.ops), "encoder": _sqnr(exact[keep], got[keep]), "logits": _sqnr(*logits),
            "cosine": float(torch.cosine_similarity(exact[keep].flatten(), got[keep].flatten(), dim=0)),
        })  # fmt: skip
        print(rows[-1], flush=True)
    RESULT.mkdir(parents=True, exist_ok=True)
    write_json(OPTIONS_FILE, {"sentences": sentences, "rows": rows, "environment": environment()})


def _sqnr(exact: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(exact.double().square().sum() / (exact - got).double().square().sum()))


def _options_table() -> Table:
    found = json.loads(OPTIONS_FILE.read_text())
    rows = tuple(
        (row["options"], row["operators"], f"{row['encoder']:.2f}", f"{row['cosine']:.5f}", f"{row['logits']:.2f}")
        for row in found["rows"]
    )
    note = (
        f"Encoder of the dense MiniLM-L6, {found['sentences']} held-out sentences, {CALIBRATION // 2} calibration "
        "examples; signal to quantisation noise of the encoder's result without padding, and of the classifier's logits."
    )
    return Table("Options", ("options", "operators", "encoder (dB)", "cosine", "logits (dB)"), rows, note)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--network", choices=NETWORKS, action="append", help="only these; default: all")
    parser.add_argument("--options", action="store_true", help="compare options of quantisation instead, on MiniLM-L6")
    given = parser.parse_args()
    if given.options:
        compare_options()
    else:
        run_missing((cell for cell in CELLS if cell.network in (given.network or NETWORKS)), given.minutes)


if __name__ == "__main__":
    main()
