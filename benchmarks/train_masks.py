"""Pyramid Fusion Transformer against MaskFormer on nuclei, from random weights, at equal steps and at equal time.

``python -m benchmarks.train_masks [--minutes M]``: every cell (arm, seed) is a run of its own, kept in
``benchmarks/results/train_masks/``; cells that are there are not run again, so it can be stopped at any time, and ``--minutes``
starts no cell after so many. ``python -m benchmarks train_masks`` runs what is missing and writes the tables of
docs/models-masks.md.

Data: `algo.nuclei`, tiles of 64 pixels scaled to 128; the held-out tiles come from columns of the image that no training tile has
a pixel of. Three classes: background, nucleus, border. All arms of a seed see the same batches, turned and mirrored at random.
Nothing is chosen by the held-out tiles.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algo.checkpoint import write_json
from algo.count import count
from algo.nuclei import NUCLEI_CLASSES, NucleiTiles, nuclei_tiles
from algo.segmentation import SegmentationReport, SegmentationScore
from benchmarks import DOCS, RESULTS, Table, environment, write_page
from models import MaskTarget, Segmenter, create_model
from models.masks import semantic_map

__all__ = ["ARMS", "Cell", "overfit", "run"]

CELLS = RESULTS / "train_masks"
TILE, SIZE, BATCH = 64, 128, 4
STEPS, RATE, CLIP = 200, 5e-4, 0.1
SEEDS = 2
ARMS: dict[str, tuple[str, dict[str, object], float]] = {
    "MaskFormer": ("maskformer_small", {}, 1.0),
    "PFT": ("pft_small", {}, 1.0),
    "PFT, all queries": ("pft_small", {"exchange": "all"}, 1.0),
    "MaskFormer, more steps": ("maskformer_small", {}, 1.7),
}
"""Model, its options, and steps over ``STEPS``."""


@dataclass(frozen=True)
class Tiles:
    """Images (N, 3, SIZE, SIZE) about zero, classes (N, TILE, TILE) as they are and (N, SIZE, SIZE) for training."""

    images: Tensor
    truth: Tensor
    classes: Tensor

    @classmethod
    def of(cls, tiles: NucleiTiles) -> "Tiles":
        """From bytes; the image's mean and deviation are 33 and 24."""
        images = F.interpolate((tiles.images.float() - 33) / 24, size=SIZE, mode="bilinear").expand(-1, 3, -1, -1)
        scale = SIZE // TILE
        return cls(images, tiles.classes, tiles.classes.repeat_interleave(scale, 1).repeat_interleave(scale, 2))


@dataclass(frozen=True)
class Cell:
    """One training."""

    arm: str
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of this arm."""
        return round(STEPS * ARMS[self.arm][2])

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        return CELLS / f"{self.arm.replace(', ', '-').replace(' ', '-').lower()}-s{self.seed}.json"

    @property
    def setting(self) -> dict[str, object]:
        """All that decides the result, as JSON has it."""
        sizes = {"tile": TILE, "size": SIZE, "batch": BATCH, "steps": self.steps, "rate": RATE, "clip": CLIP}
        return json.loads(json.dumps({"cell": asdict(self), "arm": ARMS[self.arm], **sizes}))

    @property
    def result(self) -> dict | None:
        """The result, if there is one of this very setting."""
        if not self.path.is_file():
            return None
        found = json.loads(self.path.read_text())
        return found if found["setting"] == self.setting else None


def _model(arm: str, seed: int) -> Segmenter:
    name, options, _ = ARMS[arm]
    torch.manual_seed(seed)
    model = create_model(name, num_classes=len(NUCLEI_CLASSES), **options)
    assert isinstance(model, Segmenter)
    return model


def fit(model: Segmenter, tiles: Tiles, *, steps: int, seed: int, turn: bool = True) -> Iterator[float]:
    """Train; gives the loss of every step. AdamW, warm-up over a twentieth, then a half-cosine."""
    chance = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(tiles.images), generator=chance).tolist()
        chosen, order = order[:BATCH], order[BATCH:]
        images, classes = tiles.images[chosen], tiles.classes[chosen]
        if turn:
            quarters, mirror = (int(torch.randint(limit, (), generator=chance)) for limit in (4, 2))
            images, classes = (part.rot90(quarters, (-2, -1)) for part in (images, classes))
            images, classes = (part.flip(-1) if mirror else part for part in (images, classes))
        losses = model.train().losses(images, [MaskTarget.from_semantic(one) for one in classes])
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())


@torch.no_grad()
def evaluate(model: Segmenter, tiles: Tiles) -> SegmentationReport:
    """Against the true classes, at their own size."""
    model.eval()
    score = SegmentationScore(len(NUCLEI_CLASSES))
    for images, truth in zip(tiles.images.split(8), tiles.truth.split(8)):
        output = model(images)
        score.add(semantic_map(output.logits, output.masks, (TILE, TILE)), truth)
    return score.report()


def _percent(report: SegmentationReport) -> dict[str, object]:
    return {"miou": round(100 * report.mean_iou, 2), "iou": [round(100 * value, 2) for value in report.iou]}


def _data() -> tuple[Tiles, Tiles]:
    train, test = nuclei_tiles(size=TILE, stride=TILE // 4)
    return Tiles.of(train), Tiles.of(test)


def overfit(arm: str, *, tiles: int = 4, steps: int = 120, seed: int = 0) -> dict[str, object]:
    """Learn a few tiles by heart: mean IoU in percent on these very tiles, before and after, and the losses."""
    train, _ = nuclei_tiles(size=TILE)
    rich = train.classes.ne(0).flatten(1).sum(1).topk(tiles).indices
    few = Tiles.of(NucleiTiles(*(part[rich] for part in train)))
    model = _model(arm, seed)
    before = evaluate(model, few)
    losses = list(fit(model, few, steps=steps, seed=seed, turn=False))
    after = evaluate(model, few)
    return {"before": _percent(before), "after": _percent(after), "loss": [losses[0], losses[-1]]}


def run_cell(cell: Cell) -> None:
    """Learn four tiles by heart; then train and measure on the held-out tiles after each fifth; kept in its file."""
    train, test = _data()
    by_heart = overfit(cell.arm, seed=cell.seed) if cell.arm in ("MaskFormer", "PFT") and cell.seed == 0 else None
    model = _model(cell.arm, cell.seed)
    cost = count(model, test.images[:1])
    curve, losses, spent = [{"step": 0, **_percent(evaluate(model, test))}], [], 0.0
    start = time.process_time()
    for step, loss in enumerate(fit(model, train, steps=cell.steps, seed=cell.seed), 1):
        losses.append(loss)
        if step % (cell.steps // 5) == 0:
            spent += time.process_time() - start
            curve.append({"step": step, "cpu_s": round(spent, 1), **_percent(evaluate(model, test))})
            print(cell.arm, cell.seed, curve[-1], round(loss, 2), flush=True)
            start = time.process_time()
    CELLS.mkdir(parents=True, exist_ok=True)
    write_json(cell.path, {
        "setting": cell.setting, "curve": curve, "loss": [round(mean(losses[:20]), 3), round(mean(losses[-20:]), 3)],
        "by_heart": by_heart, "parameters": cost.parameters, "macs": cost.macs, "cpu_s": round(spent, 1),
        "environment": environment(),
    })  # fmt: skip


def run_missing(minutes: float = float("inf"), arms: tuple[str, ...] = tuple(ARMS)) -> None:
    """Run cells that have no result, as long as time is left: all arms of one seed, then of the next."""
    end = time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    for cell in (Cell(arm, seed) for seed in range(SEEDS) for arm in arms):
        if cell.result is None and time.monotonic() < end:
            run_cell(cell)


def run() -> list[Table]:
    """Do what is missing; the tables, also on their page."""
    run_missing()
    found = tables()
    write_page(DOCS / "models-masks.md", "train_masks", found)
    return found


def tables() -> list[Table]:
    """Held-out mean IoU of every arm that has results, and a few tiles learnt by heart."""
    rows, heart = [], []
    for arm in ARMS:
        found = [result for seed in range(SEEDS) if (result := Cell(arm, seed).result)]
        if not found:
            continue
        last = [result["curve"][-1] for result in found]
        values = [part["miou"] for part in last]
        classes = [mean(part["iou"][number] for part in last) for number in range(len(NUCLEI_CLASSES))]
        start = mean(result["curve"][0]["miou"] for result in found)
        cost = (found[0]["parameters"] / 1e6, found[0]["macs"] / 1e6, mean(result["cpu_s"] for result in found))
        spread = f"{min(values):.2f} to {max(values):.2f}"
        rows.append((arm, Cell(arm).steps, len(found), start, mean(values), spread, *classes, *cost))
        if found[0]["by_heart"]:
            learnt = found[0]["by_heart"]
            heart.append((arm, learnt["before"]["miou"], learnt["after"]["miou"], *learnt["loss"]))
    columns = ("arm", "steps", "seeds", "mIoU before (%)", "mIoU (%)", "all seeds (%)",
               *(f"{name} (%)" for name in NUCLEI_CLASSES), "parameters (M)", "MACs (M)", "CPU time (s)")  # fmt: skip
    note = (
        f"Held-out tiles after training, means over the seeds. ResNet-18 of a quarter of the width, from random weights; batches "
        f"of {BATCH} tiles of {SIZE} x {SIZE} pixels. CPU time of training on one core of a shared machine."
    )
    by_heart = Table(
        "Four tiles learnt by heart, 120 steps", ("arm", "mIoU before (%)", "mIoU (%)", "first loss", "last loss"), tuple(heart)
    )
    return [Table("PFT and MaskFormer on nuclei", columns, tuple(rows), note), by_heart]


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_masks", description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--arm", choices=tuple(ARMS), action="append", help="only these; default: all")
    given = parser.parse_args()
    run_missing(given.minutes, tuple(given.arm or ARMS))


if __name__ == "__main__":
    main()
