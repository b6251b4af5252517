"""Which way of training N:M sparse weights loses least: methods side by side at equal steps, on three real tasks.

``python -m benchmarks.sparse_training [--tier quick|variants|full] [--task NAME] [--minutes M]``: every cell (task, pattern,
method, protocol, seed) is a run of its own, kept in ``benchmarks/results/sparse_training/``; cells that are there are not run
again, so it can be stopped at any time. ``--minutes`` stops before a cell that would start later than that.
``python -m benchmarks sparse_training`` runs what is missing of the quick tier and writes the page and its plot.

All cells of a task and seed start from one dense model, fine-tuned on the task, and take the same number of steps with the same
optimiser; the learning rate is chosen among ``rates`` on the odd held-out batches, accuracy is reported on the even ones.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.progress import Progress
from torch import nn

from algo.checkpoint import difference, load_model, save_model, write_json
from algo.distill import DistillConfig, distillation
from algo.idp import IDPConfig, idp_schedule, run_idp
from algo.layers import HEADS, match_patterns
from algo.nm import NM
from algo.permute import permute_channels
from algo.plots import save_panels
from algo.sparsify import finalize, mask_schedule, sparsify
from algo.tasks import Task
from algo.train import LossFn, TrainConfig, progress_bars, train
from algo.verify import verify
from benchmarks import DOCS, RESULTS, Table, environment, write_page
from nmforge.tasks import get_task

__all__ = ["METHODS", "TASKS", "Cell", "dense_model", "load_task", "run"]

CELLS = RESULTS / "sparse_training"
WORK = Path(__file__).parent.parent / "out" / "sparse_training"
FREEZE = 0.25
"""Share of the steps, at the end, in which masks of the dynamic methods stay."""
UNITS = 12
"""Into so many epochs a cell's steps are cut: the levels of IDP share them."""


@dataclass(frozen=True)
class Setup:
    """One task: its data, its dense training, and the steps and learning rates of a cell."""

    title: str
    data: Mapping[str, int | bool]
    dense: TrainConfig
    dense_size: int
    steps: int
    rates: tuple[float, ...]
    weight_decay: float


TASKS = {
    "movies": Setup("MiniLM-L6, movie sentences", {"batch_size": 16, "max_length": 40, "test_size": 1024},
                    TrainConfig(epochs=1, lr=1e-4), 4096, 120, (1e-4,), 0.01),
    "r8": Setup("MiniLM-L6, R8", {"batch_size": 16, "max_length": 32, "test_size": 1024},
                TrainConfig(epochs=1, lr=1e-4), 4096, 120, (1e-4,), 0.01),
    "mnist5k": Setup("ViT, MNIST-5k", {"batch_size": 64, "test_size": 1000, "augment": True},
                     TrainConfig(epochs=20, lr=1.5e-3, weight_decay=0.05, schedule="cosine"), 4000, 240, (1e-3,), 0.05),
}
QUICK = ("2:4", "1:4", "1:8")
FULL = ("2:4", "1:4", "2:8", "1:8", "1:16")
FULL_RATES = (0.5, 1.0, 2.0)
METHODS = ("one-shot", "gradual", "sr-ste", "s-ste", "wanda", "sparsegpt", "idp")
VARIANTS = ("idp-late", "idp-late-obs", "idp-late-obs-distil", "idp-late-obs-distil-permuted", "sparsegpt-distil")
"""Tried as well: most steps for IDP's last level, second-order inheritance, the dense model as teacher, channels reordered."""
TITLES = {"one-shot": "one-shot magnitude + fine-tune", "gradual": "gradual magnitude", "sr-ste": "SR-STE from dense",
          "s-ste": "S-STE from dense", "wanda": "Wanda + fine-tune", "sparsegpt": "SparseGPT + fine-tune", "idp": "IDP",
          "idp-late": "IDP, 3/4 of the steps at the last level", "idp-late-obs": "IDP, the same, second-order inheritance",
          "idp-late-obs-distil": "IDP, the same, taught by the dense model",
          "idp-late-obs-distil-permuted": "IDP, the same, channels reordered first",
          "sparsegpt-distil": "SparseGPT + fine-tune, taught by the dense model"}


@dataclass(frozen=True)
class Cell:
    """One run; ``frozen_head``: the output head stays that of the dense model."""

    task: str
    pattern: str
    method: str
    seed: int = 0
    frozen_head: bool = False
    rates: tuple[float, ...] = ()

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        head = "-frozen-head" if self.frozen_head else ""
        return CELLS / f"{self.task}-{self.pattern.replace(':', 'of')}-{self.method}{head}-s{self.seed}.json"

    @property
    def result(self) -> dict[str, object] | None:
        """The result, if there is one of this very setting."""
        if not self.path.is_file():
            return None
        found = json.loads(self.path.read_text())
        return found if difference(found["setting"], self.setting) is None else None

    @property
    def setting(self) -> dict[str, object]:
        """All that decides the result, as JSON has it."""
        return json.loads(json.dumps({"cell": asdict(self), "task": asdict(TASKS[self.task]), "units": UNITS, "freeze": FREEZE}))


def quick() -> Iterator[Cell]:
    """One seed, three patterns, fine-tuned heads."""
    for task, setup in TASKS.items():
        for pattern in QUICK:
            for method in METHODS:
                yield Cell(task, pattern, method, rates=setup.rates)


def variants() -> Iterator[Cell]:
    """The same for the variants."""
    for task, setup in TASKS.items():
        for pattern in QUICK:
            for method in VARIANTS:
                yield Cell(task, pattern, method, rates=setup.rates)


def full() -> Iterator[Cell]:
    """Everything: three seeds, five patterns, both protocols, three learning rates; and the variants."""
    for task, setup in TASKS.items():
        for seed in range(3):
            for pattern in FULL:
                for frozen in (False, True):
                    for method in (*METHODS, *VARIANTS):
                        yield Cell(task, pattern, method, seed, frozen, tuple(rate * setup.rates[0] for rate in FULL_RATES))


def load_task(cell: Cell) -> Task:
    """The data of a cell."""
    setup = TASKS[cell.task]
    return get_task(cell.task, **setup.data, seed=cell.seed, train_size=setup.steps // UNITS * int(setup.data["batch_size"]))


def dense_model(cell: Cell, task: Task, progress: Progress) -> tuple[nn.Module, tuple[float, float]]:
    """The dense model of a task and seed, trained once; its accuracies."""
    folder, setup = WORK / f"{cell.task}-s{cell.seed}", TASKS[cell.task]
    model, identity = task.model(cell.seed), json.loads(json.dumps(asdict(setup)))
    try:
        facts = load_model(model, folder)
        if difference(facts["identity"], identity) is None:
            return model.eval(), tuple(facts["scores"])
        model = task.model(cell.seed)
    except FileNotFoundError:
        pass
    whole = get_task(cell.task, **setup.data, seed=cell.seed, train_size=setup.dense_size)
    train(model, whole.batches, whole.loss, replace(setup.dense, seed=cell.seed), progress=progress, label=f"{cell.task} dense")
    scores = _scores(task, model)
    save_model(model, folder, {"identity": identity, "scores": scores})
    return model, scores


def _scores(task: Task, model: nn.Module) -> tuple[float, float]:
    """Accuracy on the odd held-out batches, for choices, and on the even ones, for reports."""
    batches = list(task.held_out())
    odd, even = (replace(task, held_out=lambda part=part: part).evaluate(model) for part in (batches[1::2], batches[::2]))
    return odd, even


def run_cell(cell: Cell, progress: Progress) -> None:
    """Train one cell at each learning rate; keep the best by the odd batches."""
    torch.manual_seed(cell.seed)
    task, runs = load_task(cell), []
    dense, dense_scores = dense_model(cell, task, progress)
    for rate in cell.rates:
        model, started = copy.deepcopy(dense), time.perf_counter()
        if cell.frozen_head:
            _freeze_head(model)
        before = _sparse(cell, task, model, dense, rate, progress)
        patterns = finalize(model)
        verify(model, patterns)
        choice, accuracy = _scores(task, model)
        runs.append({"rate": rate, "choice": choice, "accuracy": accuracy, "untrained": before,
                     "seconds": round(time.perf_counter() - started, 1)})
    best = max(runs, key=lambda found: found["choice"])
    write_json(cell.path, {"setting": cell.setting, "dense": dense_scores[1], "accuracy": best["accuracy"], "best": best,
                           "runs": runs, "environment": environment()})


def _freeze_head(model: nn.Module) -> None:
    from fnmatch import fnmatchcase

    for name, module in model.named_modules():
        if any(fnmatchcase(name, glob) for glob in HEADS):
            module.requires_grad_(False)


def _sparse(cell: Cell, task: Task, model: nn.Module, dense: nn.Module, rate: float, progress: Progress) -> float | None:
    """Make the model sparse and train it; accuracy right after pruning, of methods that prune at once."""
    setup, pattern = TASKS[cell.task], {task.layers: cell.pattern}
    base = cell.method.partition("-")[0] if cell.method.startswith("idp") else cell.method.removesuffix("-distil")
    config = TrainConfig(epochs=UNITS, lr=rate, weight_decay=setup.weight_decay, seed=cell.seed + 1)
    loss: LossFn = task.loss
    if "-distil" in cell.method:
        loss = distillation(copy.deepcopy(dense), task.logits, task.labels, DistillConfig(alpha=0.5, temperature=2.0))
    label = f"{cell.task} {cell.pattern} {cell.method}"
    if cell.method.endswith("-permuted"):
        first = task.inputs(task.batches(0)[0])
        permute_channels(model, pattern, tuple(x[:2] for x in first), seconds=20, seed=cell.seed)
    if base == "idp":
        _idp(cell, task, model, loss, config, progress)
        return None
    before = None
    if base in ("one-shot", "wanda", "sparsegpt"):
        samples = _samples(task)
        method = "magnitude" if base == "one-shot" else base
        sparsify(model, pattern, method=method, calibration=samples, hold=True)  # type: ignore[arg-type]
        before = _scores(task, model)[1]
    else:
        sparsify(model, pattern, method=base)  # type: ignore[arg-type]
    train(model, task.batches, loss, config, before_step=mask_schedule(FREEZE), progress=progress, label=label)
    return before


def _samples(task: Task) -> list[tuple[torch.Tensor, ...]]:
    """Calibration data: 32 training batches."""
    return [task.inputs(batch) for unit in range(4) for batch in task.batches(unit)[:8]]


def _idp(cell: Cell, task: Task, model: nn.Module, loss: LossFn, config: TrainConfig, progress: Progress) -> None:
    levels = [str(level) for level in idp_schedule(NM(cell.pattern))]
    last = 3 * UNITS // 4 if "-late" in cell.method and len(levels) > 1 else UNITS // len(levels)
    rest = (UNITS - last) // max(1, len(levels) - 1)
    budget = dict.fromkeys(levels, max(1, rest)) | {levels[-1]: UNITS - rest * (len(levels) - 1)}
    second = "-obs" in cell.method
    run_idp(model, dict(match_patterns(model, {task.layers: cell.pattern})), task.batches, loss,
            IDPConfig(train=config, freeze=FREEZE, budget=budget, inherit="second-order" if second else "weights"),
            calibration=_samples(task) if second else None, progress=progress)


def execute(cells: list[Cell], *, minutes: float | None = None) -> list[Cell]:
    """Run what is missing; the cells that are still missing afterwards."""
    stop = None if minutes is None else time.monotonic() + 60 * minutes
    missing = [cell for cell in cells if cell.result is None]
    with progress_bars() as progress:
        bar = progress.add_task("cells", total=len(cells), completed=len(cells) - len(missing), note="")
        for cell in missing:
            if stop is not None and time.monotonic() > stop:
                break
            run_cell(cell, progress)
            progress.advance(bar)
    return [cell for cell in cells if cell.result is None]


# -- the report --------------------------------------------------------------------------------------------------------


def _found(cells: list[Cell]) -> dict[tuple[str, str, str, bool], list[dict[str, object]]]:
    """Results of all seeds by (task, pattern, method, frozen head)."""
    found: dict[tuple[str, str, str, bool], list[dict[str, object]]] = {}
    for cell in cells:
        if (result := cell.result) is not None:
            found.setdefault((cell.task, cell.pattern, cell.method, cell.frozen_head), []).append(result)
    return found


def _value(results: list[dict[str, object]] | None, key: Callable[[dict], float | None]) -> str | None:
    """Mean in per cent, with the spread of several seeds."""
    values = [100 * value for result in results or () if (value := key(result)) is not None]
    if not values:
        return None
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def tables(cells: list[Cell], *, frozen: bool = False) -> list[Table]:
    """Accuracy of every cell, means by method, accuracy without any training."""
    found = _found(cells)
    patterns = list(dict.fromkeys(cell.pattern for cell in cells))
    methods = [m for m in (*METHODS, *VARIANTS) if any(key[2] == m and key[3] == frozen for key in found)]
    columns = [(task, pattern) for task in TASKS for pattern in patterns]
    heads = tuple(f"{task} {pattern}" for task, pattern in columns)
    dense = {task: next((r for key, r in found.items() if key[0] == task), None) for task in TASKS}
    rows: list[tuple[str | int | float | None, ...]] = [
        ("dense", *(_value(dense[task], lambda r: r["dense"]) for task, _ in columns), None)]
    whole = [at for at in columns if all((*at, m, frozen) in found for m in METHODS)]
    means: dict[str, float] = {}
    for method in methods:
        cellwise = [found.get((task, pattern, method, frozen)) for task, pattern in columns]
        values = [mean(100 * r["accuracy"] for r in found[*at, method, frozen]) for at in whole if (*at, method, frozen) in found]
        if whole and len(values) == len(whole):
            means[method] = mean(values)
        rows.append((TITLES[method], *(_value(part, lambda r: r["accuracy"]) for part in cellwise),
                     f"{means[method]:.2f}" if method in means else None))
    steps = ", ".join(f"{TASKS[task].steps} on {task}" for task in TASKS)
    note = f"Held-out accuracy in per cent; steps of training: {steps}. Empty: not run. "
    note += f"Mean: of the {len(whole)} of {len(columns)} columns in which every method was run. "
    note += "One accuracy has a standard error of 1 to 2 points."
    result = [Table("Accuracy by task and pattern", ("method", *heads, "mean"), tuple(rows), note)]
    untrained = [(TITLES[m], *(_value(found.get((task, pattern, m, frozen)), lambda r: r["best"]["untrained"])
                               for task, pattern in columns))
                 for m in ("one-shot", "wanda", "sparsegpt") if m in methods]
    if untrained:
        result.append(Table("Right after pruning, the dense model's head, no training", ("method", *heads), tuple(untrained)))
    others = [means[m] for m in METHODS if m in means and m != "idp"]
    if "idp" in means and others:
        best = max((m for m in means), key=lambda m: means[m])
        best_idp = sorted((m for m in means if m.startswith("idp-")), key=lambda m: -means[m])[:1]
        result.append(Table("IDP against the rest", ("", "points"), (
            ("IDP less the mean of the other methods", f"{means['idp'] - mean(others):+.2f}"),
            ("IDP less the best other method", f"{means['idp'] - max(others):+.2f}"),
            *((f"the best variant of IDP less the mean of the other methods ({TITLES[variant]})",
               f"{means[variant] - mean(others):+.2f}") for variant in best_idp),
            (f"best of all, variants included: {TITLES[best]}", f"{means[best]:.2f}"),
        ), "The paper's claim for the first is +6.7."))
    return result


def plot(cells: list[Cell], path: Path) -> None:
    """Mean accuracy over tasks against the pattern would hide tasks: one panel each, IDP and the best and mean of the others."""
    found, patterns = _found(cells), list(dict.fromkeys(cell.pattern for cell in cells))
    names = [m for m in METHODS if any(key[2] == m for key in found)]
    panels, lines = {}, {}
    for task, setup in TASKS.items():
        for pattern in patterns:
            values = [found.get((task, pattern, m, False)) for m in names]
            if any(values):
                title = f"{setup.title.split(', ')[1]}, {pattern}"
                panels[title] = [mean(100 * r["accuracy"] for r in part) if part else None for part in values]
                lines[title] = ("dense", 100 * next(part for part in values if part)[0]["dense"])
    if panels:
        save_panels(path, names, panels, lines=lines, joined=False)


def run() -> list[Table]:
    """Complete the quick tier; tables of it, on the page too."""
    cells = list(quick())
    missing = execute(cells)
    return report(cells, missing)


def report(cells: list[Cell], missing: list[Cell]) -> list[Table]:
    """Write the page and the plot of what is there."""
    found = tables([*cells, *variants()])
    if missing:
        found.append(Table("Not run", ("cells",), ((str(len(missing)),),)))
    plot(cells, DOCS / "sparse-training.png")
    write_page(DOCS / "sparse-training.md", "sparse_training", found)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run cells of a tier and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_training", description=__doc__)
    parser.add_argument("--tier", choices=("quick", "full", "variants"), default="quick")
    parser.add_argument("--task", choices=tuple(TASKS), help="only this one")
    parser.add_argument("--method", choices=(*METHODS, *VARIANTS), help="only this one")
    parser.add_argument("--pattern", help="only this one")
    parser.add_argument("--minutes", type=float, help="start no cell later than that")
    parser.add_argument("--threads", type=int, help="of torch")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    cells = {"quick": quick, "variants": variants, "full": full}[given.tier]()
    chosen = [cell for cell in cells if given.task in (None, cell.task) and given.method in (None, cell.method)
              and given.pattern in (None, cell.pattern)]
    missing = execute(chosen, minutes=given.minutes)
    print(f"{len(chosen) - len(missing)} of {len(chosen)} cells done", file=sys.stderr)
    if given.tier != "full":
        report(list(quick()), [cell for cell in quick() if cell.result is None])
    return 0


if __name__ == "__main__":
    sys.exit(main())
