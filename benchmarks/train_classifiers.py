"""Do CeiT, ODConv and DG-Net learn better than the networks they extend? Each beside its base at equal budget, on real digits.

``python -m benchmarks.train_classifiers [NETWORK ...] [--seeds N] [--minutes M]``: every run (network, seed) is kept in
``benchmarks/results/train_classifiers/``; runs that are there are not run again, so it can be stopped at any time. ``--minutes``
stops before a run that would start later than that. ``python -m benchmarks train_classifiers`` runs what is missing and writes
the table of docs/models-classifiers.md.

Data: MNIST-5k (`algo.data`), 4,000 digits to train on, 1,000 held out, shifted by up to 2 pixels in training. A base and what
extends it have the same data in the same order, epochs, batch, optimiser and learning rate; nothing is chosen by the held-out
digits.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

from algo.checkpoint import difference, write_json
from algo.count import count
from algo.train import StepFn, TrainConfig, progress_bars, train
from benchmarks import DOCS, RESULTS, Table, environment, write_page
from models import create_model
from models.dgnet import RouterConfig, edge_density, graphs, skip_edges
from models.odconv import temperature_schedule
from nmforge.tasks import get_task

__all__ = ["NETWORKS", "Run", "run"]

RUNS = RESULTS / "train_classifiers"
SEEDS = 3
DATA = {"batch_size": 64, "augment": True, "test_size": 1000}
TRANSFORMER = TrainConfig(epochs=20, lr=1.5e-3, weight_decay=0.05, schedule="cosine")
CONVOLUTIONAL = TrainConfig(epochs=10, lr=4e-3, weight_decay=0.05, schedule="cosine")
SMALL: dict[str, object] = {"channels": 1, "small_stem": True, "width": 8, "num_classes": 10}


@dataclass(frozen=True)
class Network:
    """What is trained: a registered model with options; ``base`` is the network that it extends."""

    title: str
    model: str
    options: dict[str, object]
    train: TrainConfig
    base: str = ""
    anneal: bool = False


NETWORKS = {
    "vit": Network("ViT, 4 layers of 96 channels", "vit_mnist", {}, TRANSFORMER),
    "ceit": Network("CeiT of the same size", "ceit_mnist", {}, TRANSFORMER, "vit"),
    "resnet18": Network("ResNet-18, 8 channels", "resnet18", SMALL, CONVOLUTIONAL),
    "odconv1": Network("the same with ODConv 1x", "odconv_resnet18_1x", SMALL, CONVOLUTIONAL, "resnet18", anneal=True),
    "odconv4": Network("the same with ODConv 4x", "odconv_resnet18_4x", SMALL, CONVOLUTIONAL, "resnet18", anneal=True),
    "resnet444": Network("ResNet, 3 stages of 4 blocks, 8 channels", "resnet18", SMALL | {"blocks": (4, 4, 4)}, CONVOLUTIONAL),
    "dgnet444": Network(
        "the same as DG-Net", "dgnet_resnet18", SMALL | {"blocks": (4, 4, 4)}, CONVOLUTIONAL, "resnet444"
    ),
    "dgnet444-03": Network(
        "the same, threshold 0.3, straight through", "dgnet_resnet18",
        SMALL | {"blocks": (4, 4, 4), "threshold": 0.3, "straight_through": True}, CONVOLUTIONAL, "resnet444",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training."""

    network: str
    seed: int

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        return RUNS / f"{self.network}-s{self.seed}.json"

    @property
    def setting(self) -> dict[str, object]:
        """All that decides the result, as JSON has it."""
        return json.loads(json.dumps({"run": asdict(self), "network": asdict(NETWORKS[self.network]), "data": DATA}))

    @property
    def result(self) -> dict | None:
        """The result, if there is one of this very setting."""
        if not self.path.is_file():
            return None
        found = json.loads(self.path.read_text())
        return found if difference(found["setting"], self.setting) is None else None


def execute(run: Run) -> None:
    """Train and keep accuracy, cost and, of a DG-Net, what its routers chose."""
    network = NETWORKS[run.network]
    task = get_task("mnist5k", **DATA)
    torch.manual_seed(run.seed)
    model = create_model(network.model, **network.options)
    hook: StepFn | None = temperature_schedule() if network.anneal else None
    config = TrainConfig(**(asdict(network.train) | {"seed": run.seed}))
    with progress_bars() as progress:
        label = f"{run.network} {run.seed}"
        found = train(model, task.batches, task.loss, config, before_step=hook, progress=progress, label=label)
    cost = count(model, next(iter(task.held_out())).pixels[:1])
    facts = {
        "accuracy": task.evaluate(model), "losses": [round(loss, 5) for loss in found.losses], "parameters": cost.parameters,
        "macs": cost.macs, "cpu_seconds": round(found.cpu_seconds, 1),
    }  # fmt: skip
    if "dgnet" in network.model:
        facts |= _routing(model, task)
    write_json(run.path, {"setting": run.setting, **facts, "environment": environment()})


def _routing(model: nn.Module, task) -> dict[str, object]:
    """Edges kept on the held-out digits, and accuracy when the others are not computed."""
    chosen = [graphs(model, batch.pixels) for batch in task.held_out()]
    rows = edge_density({name: torch.cat([part[name] for part in chosen]) for name in chosen[0]})
    skip_edges(model)
    skipped = task.evaluate(model)
    skip_edges(model, False)
    return {"density": [asdict(row) for row in rows], "accuracy_skipping": skipped}


def missing(seeds: int, minutes: float | None = None, networks: Sequence[str] = tuple(NETWORKS)) -> list[Run]:
    """Do the runs that are not there, seed by seed; those that are left."""
    stop = None if minutes is None else time.monotonic() + 60 * minutes
    runs = [Run(network, seed) for seed in range(seeds) for network in networks]
    for one in runs:
        if one.result is None and (stop is None or time.monotonic() < stop):
            execute(one)
    return [one for one in runs if one.result is None]


def run() -> list[Table]:
    """Do what is missing; the table, also on its page."""
    missing(SEEDS)
    tables = [_accuracies(), _densities()]
    write_page(DOCS / "models-classifiers.md", "train_classifiers", tables)
    return tables


def _results(network: str) -> list[dict]:
    return [result for seed in range(SEEDS) if (result := Run(network, seed).result) is not None]


def _accuracies() -> Table:
    rows = []
    for name, network in NETWORKS.items():
        results = _results(name)
        if not results:
            continue
        base = {result["setting"]["run"]["seed"]: result["accuracy"] for result in _results(network.base)} if network.base else {}
        gains = [result["accuracy"] - base[seed] for result in results if (seed := result["setting"]["run"]["seed"]) in base]
        rows.append((
            network.title, results[0]["parameters"], round(results[0]["macs"] / 1e6, 2), network.train.epochs, len(results),
            _percent(results, lambda result: result["accuracy"]), f"{100 * mean(gains):+.2f}" if gains else "",
            round(mean(result["cpu_seconds"] for result in results)),
        ))  # fmt: skip
    return Table(
        "Digits",
        ("network", "parameters", "M MACs", "epochs", "seeds", "accuracy (%)", "over its base (points)", "CPU s"),
        tuple(rows),
        "MNIST-5k, 1,000 held-out digits: one digit is 0.1 points, one accuracy has a standard error of about 0.4 points. "
        "± is the standard deviation over seeds.",
    )


def _percent(results: list[dict], value: Callable[[dict], float]) -> str:
    found = [100 * value(result) for result in results]
    return f"{mean(found):.2f}" + (f" ± {stdev(found):.2f}" if len(found) > 1 else "")


def _densities() -> Table:
    rows = []
    for name, network in NETWORKS.items():
        results = _results(name) if "dgnet" in network.model else []
        for parts in zip(*(result["density"] for result in results)):
            kept, needed = (100 * mean(part[key] for part in parts) for key in ("density", "needed"))
            threshold = network.options.get("threshold", RouterConfig.threshold)
            rows.append((f"threshold {threshold}, {parts[0]['stage']}", parts[0]["nodes"], parts[0]["edges"], len(parts),
                         round(kept, 1), round(needed, 1), _percent(results, lambda result: result["accuracy_skipping"])))
    return Table(
        "What the routers of DG-Net keep",
        ("stage", "nodes", "edges", "seeds", "edges kept (%)", "nodes needed (%)", "accuracy with skipping (%)"),
        tuple(rows),
        "Mean over the held-out digits and seeds.",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs without the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_classifiers", description=__doc__)
    parser.add_argument("networks", nargs="*", choices=[*NETWORKS, []], metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--minutes", type=float)
    given = parser.parse_args(arguments)
    left = missing(given.seeds, given.minutes, given.networks or tuple(NETWORKS))
    print(f"{len(left)} runs are left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
