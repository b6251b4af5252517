"""Deformable-DETR on aerial tree boxes, from random weights, with and without FeatAug and DataAug.

``python -m benchmarks.train_detr [--tier quick|full] [--minutes M]``: every cell (arm, seed) is a run of its own, kept in
``benchmarks/results/train_detr/``; cells that are there are not run again, so it can be stopped at any time, and ``--minutes``
starts no cell after so many. ``python -m benchmarks train_detr`` runs what is missing of the quick tier and makes the tables.

Data: `algo.trees`, tiles of 256 pixels scaled to 128; the held-out tiles come from rows of the images that no training tile has a
pixel of. All arms mirror the training images at random both ways, and see the same batches of a seed. An augmented arm passes two
copies through the transformer, so a step costs more: ``plain, more steps`` has the time of the copies in steps instead.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algo.checkpoint import write_json
from algo.detection import Detections, Truths, average_precision
from algo.trees import tree_tiles
from benchmarks import RESULTS, Table
from models import Target, create_model
from models.detection import Detector

__all__ = ["ARMS", "Cell", "overfit", "run"]

CELLS = RESULTS / "train_detr"
TILE, SIZE, BATCH = 256, 128, 4
STEPS, RATE, CLIP = 800, 5e-4, 0.5
MODEL = {"queries": 60, "two_stage": True, "mixed_selection": True}
"""Changes of ``deformable_detr_tiny``."""
ARMS: dict[str, tuple[dict[str, str], float]] = {
    "plain": ({}, 1.0),
    "plain, more steps": ({}, 1.6),
    "FeatAug-Flip": ({"feataug": "flip"}, 1.0),
    "FeatAug-FC": ({"feataug": "flip_crop"}, 1.0),
    "DataAug-Flip": ({"dataaug": "flip"}, 1.0),
}
"""Options of the detector, and steps over ``STEPS``."""
QUICK, FULL = 1, 3
"""Seeds."""


@dataclass(frozen=True)
class Tiles:
    """Images (N, 3, SIZE, SIZE) about zero, boxes of each in their pixels (k, 4)."""

    images: Tensor
    boxes: list[Tensor]

    @classmethod
    def of(cls, images: Tensor, boxes: Sequence[Tensor]) -> "Tiles":
        """From bytes and boxes at another scale."""
        scaled = F.interpolate(images.float() / 255, size=SIZE, mode="area")
        return cls((scaled - 0.45) / 0.2, [box * SIZE / images.shape[-1] for box in boxes])

    def targets(self, chosen: Sequence[int]) -> list[Target]:
        """What a detector learns from."""
        return [
            Target.from_corners(torch.zeros(len(self.boxes[n]), dtype=torch.int64), self.boxes[n], height=SIZE, width=SIZE)
            for n in chosen
        ]


@dataclass(frozen=True)
class Cell:
    """One training."""

    arm: str
    seed: int = 0
    steps: int = STEPS

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        name = self.arm.replace(", ", "-").replace(" ", "-").lower()
        return CELLS / f"{name}-{self.steps}-s{self.seed}.json"

    @property
    def setting(self) -> dict[str, object]:
        """All that decides the result, as JSON has it."""
        sizes = {"tile": TILE, "size": SIZE, "batch": BATCH, "rate": RATE, "clip": CLIP, "model": MODEL, "arm": ARMS[self.arm]}
        return json.loads(json.dumps({"cell": asdict(self), **sizes}))

    @property
    def result(self) -> dict | None:
        """The result, if there is one of this very setting."""
        if not self.path.is_file():
            return None
        found = json.loads(self.path.read_text())
        return found if found["setting"] == self.setting else None


def _detector(options: dict[str, str], seed: int) -> Detector:
    torch.manual_seed(seed)
    model = create_model("deformable_detr_tiny", **MODEL, **options)
    assert isinstance(model, Detector)
    return model


def _optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW; the places of deformable attention learn ten times slower, as the authors have it."""
    slow = [value for name, value in model.named_parameters() if "sampling_offsets" in name or "reference_points" in name]
    known = {id(value) for value in slow}
    rest = [value for value in model.parameters() if id(value) not in known]
    return torch.optim.AdamW([{"params": rest, "lr": rate}, {"params": slow, "lr": rate / 10}], weight_decay=1e-4)


def fit(model: Detector, tiles: Tiles, *, steps: int, seed: int, rate: float = RATE, mirror: bool = True) -> Iterator[float]:
    """Train; gives the loss of every step. Warm-up over a twentieth, then a half-cosine."""
    batches = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate, rate / 10], total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(tiles.images), generator=batches).tolist()
        chosen, order = order[:BATCH], order[BATCH:]
        images, targets = tiles.images[chosen], tiles.targets(chosen)
        if mirror:
            images, targets = _mirrored(images, targets, torch.rand(2, generator=batches) < 0.5)
        loss = torch.stack(list(model.train().losses(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())


def _mirrored(images: Tensor, targets: list[Target], axes: Tensor) -> tuple[Tensor, list[Target]]:
    """Images and boxes mirrored left to right, and top to bottom."""
    for axis, mirror in enumerate(axes.tolist()):
        if mirror:
            images = images.flip(3 - axis)
            sign = torch.tensor([1 - 2 * (axis == 0), 1 - 2 * (axis == 1), 1, 1])
            targets = [Target(target.labels, target.boxes * sign + (sign < 0)) for target in targets]
    return images, targets


@torch.no_grad()
def evaluate(model: Detector, tiles: Tiles) -> dict[str, float]:
    """Average precision in percent: ``ap`` (0.5 to 0.95) and ``ap50``."""
    model.eval()
    found = [
        Detections(one.boxes, one.scores, one.labels) for batch in tiles.images.split(16) for one in model.predict(batch, top=100)
    ]
    report = average_precision(found, [Truths(boxes, torch.zeros(len(boxes), dtype=torch.int64)) for boxes in tiles.boxes])
    return {"ap": 100 * report.ap, "ap50": 100 * report.ap50}


def overfit(*, tiles: int = 4, steps: int = 250, seed: int = 0, **options: str) -> dict[str, float]:
    """Learn a few tiles by heart: AP on these very tiles before and after, in percent."""
    train, _ = _data()
    rich = sorted(range(len(train.images)), key=lambda n: -len(train.boxes[n]))[:tiles]
    few = Tiles(train.images[rich], [train.boxes[n] for n in rich])
    model = _detector(options, seed)
    before = evaluate(model, few)
    losses = list(fit(model, few, steps=steps, seed=seed, rate=1e-3, mirror=False))
    after = evaluate(model, few)
    return {"ap_before": before["ap"], **after, "first_loss": losses[0], "last_loss": losses[-1]}


def _data() -> tuple[Tiles, Tiles]:
    train, test = tree_tiles(size=TILE, stride=TILE // 4)
    return Tiles.of(*train), Tiles.of(*test)


def run_cell(cell: Cell) -> dict:
    """Train and measure on the held-out tiles after each quarter; kept in its file."""
    options, _ = ARMS[cell.arm]
    train, test = _data()
    model = _detector(options, cell.seed)
    curve, losses, start = [{"step": 0, **evaluate(model, test)}], [], time.process_time()
    for step, loss in enumerate(fit(model, train, steps=cell.steps, seed=cell.seed), 1):
        losses.append(loss)
        if step % (cell.steps // 4) == 0:
            curve.append({"step": step, "cpu_s": time.process_time() - start, **evaluate(model, test)})
            print(cell.arm, cell.seed, curve[-1], flush=True)
    result = {"setting": cell.setting, "curve": curve, "loss": [mean(losses[:20]), mean(losses[-20:])]}
    result["cpu_s"] = curve[-1]["cpu_s"]
    CELLS.mkdir(parents=True, exist_ok=True)
    write_json(cell.path, result)
    return result


def cells(seeds: int) -> list[Cell]:
    """All arms for one seed, then for the next."""
    return [Cell(arm, seed, round(STEPS * factor)) for seed in range(seeds) for arm, (_, factor) in ARMS.items()]


def run_missing(seeds: int, minutes: float = float("inf")) -> None:
    """Run cells that have no result, as long as time is left."""
    end = time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    for cell in cells(seeds):
        if cell.result is None and time.monotonic() < end:
            run_cell(cell)


def run() -> list[Table]:
    """Held-out AP of every arm, and a few tiles learnt by heart."""
    run_missing(QUICK)
    rows = []
    for arm, (_, factor) in ARMS.items():
        found = [cell.result for cell in cells(FULL) if cell.arm == arm and cell.result]
        last = [result["curve"][-1] for result in found]
        middle = [mean(float(part[key]) for part in last) for key in ("ap", "ap50")]
        low, high = (choose(float(part["ap50"]) for part in last) for choose in (min, max))
        seconds = mean(float(result["cpu_s"]) for result in found)
        rows.append((arm, round(STEPS * factor), len(found), *middle, f"{low:.1f} to {high:.1f}", seconds))
    columns = ("arm", "steps", "seeds", "AP (%)", "AP50 (%)", "AP50, all seeds (%)", "CPU time (s)")
    note = (
        f"Held-out tiles, mean over the seeds. Deformable-DETR in two stages on a ResNet-18 of a quarter of the width, from "
        f"random weights; batches of {BATCH} tiles of {SIZE} x {SIZE} pixels. Random mirroring in all arms. CPU time on one core "
        "of a shared machine, evaluation of the quarters included."
    )
    heart = tuple((name, *(overfit(**options)[key] for key in ("ap_before", "ap", "ap50"))) for name, options in
                  (("plain", {}), ("FeatAug-Flip", {"feataug": "flip"})))
    by_heart = Table("Four tiles learnt by heart, 250 steps", ("arm", "AP before (%)", "AP (%)", "AP50 (%)"), heart)
    return [Table("Deformable-DETR on trees", columns, tuple(rows), note), by_heart]


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_detr", description=__doc__)
    parser.add_argument("--tier", choices=("quick", "full"), default="quick")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    run_missing(FULL if given.tier == "full" else QUICK, given.minutes)


if __name__ == "__main__":
    main()
