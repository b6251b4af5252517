"""Group R-CNN on aerial images of trees: from points to boxes, and what a student learns from them.

Tiles of 128 pixels; a part of the training tiles has boxes, the others a point in each. The teacher (``group_rcnn_small``) learns
from the tiles with boxes and makes boxes of the points; a student (``fcos_small``) learns from them. Random initial weights.

Every training keeps its result in ``benchmarks/results/train_group_rcnn`` and its weights in ``out/train_group_rcnn``: what has a
result is not done again. ``python -m benchmarks.train_group_rcnn NAME ...`` does single trainings of `RUNS`.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from algo.detection import Detections, Truths, average_precision
from algo.folders import DEVIATION, MEAN
from algo.trees import BoxTiles, tree_tiles
from benchmarks import DOCS, RESULTS, Table, write_page
from models import create_model
from models.boxes import paired_iou
from models.detection import Level, Target
from models.feataug import crop_level, crop_targets, random_windows
from models.points import PointTarget, choose_annotated, pseudo_target, sample_points

__all__ = ["RUNS", "run"]

SIZE, BATCH, RATE = 128, 8, 1e-3
RATIOS = (30, 10)
"""Percent of the training tiles that have boxes; each is a study of its own."""
STEPS = {"overfit": 300, "teacher": 1500, "student": 1200}
WINDOW = (0.6, 1.0)
"""Side of the windows that training tiles are cropped to, over the tile's."""
RECORDS, WEIGHTS = RESULTS / "train_group_rcnn", Path("out/train_group_rcnn")

Data = tuple[Tensor, list[Target]]


def _data(tiles: BoxTiles) -> Data:
    """Normalised images (N, 3, SIZE, SIZE) and their targets."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    label = lambda boxes: torch.zeros(len(boxes), dtype=torch.int64)
    targets = [Target.from_corners(label(boxes), boxes, height=SIZE, width=SIZE) for boxes in tiles.boxes]
    return (tiles.images / 255 - shift) / scale, targets


def _subset(data: Data, rows: Tensor) -> Data:
    return data[0][rows], [data[1][row] for row in rows.tolist()]


def _turn(image: Tensor, target: Target, kind: int) -> tuple[Tensor, Target]:
    """One of the eight symmetries of a square: ``kind`` 0..7."""
    box = target.boxes.clone()
    if kind & 1:
        image, box[:, 0] = image.flip(2), 1 - box[:, 0]
    if kind & 2:
        image, box[:, 1] = image.flip(1), 1 - box[:, 1]
    if kind & 4:
        image, box = image.transpose(1, 2), box[:, [1, 0, 3, 2]]
    return image, Target(target.labels, box)


def _varied(images: Tensor, targets: list[Target]) -> Data:
    """Each image turned or mirrored, and a window of it scaled to the whole, all at random."""
    windows = random_windows(len(images), WINDOW)
    everywhere = torch.ones(len(images), SIZE, SIZE, dtype=torch.bool)
    images, targets = crop_level(Level(images, everywhere), windows).features, crop_targets(targets, windows)
    turned = [_turn(image, target, int(torch.randint(8, ()))) for image, target in zip(images, targets)]
    return torch.stack([image for image, _ in turned]), [target for _, target in turned]


def _train(
    model: nn.Module, data: Data, steps: int, losses: Callable[..., dict[str, Tensor]], *, seed: int = 0, vary: bool = True
) -> list[float]:
    """AdamW with warm-up and cosine; gives the loss of every 10 steps, averaged."""
    torch.manual_seed(seed)
    size = min(BATCH, len(data[0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    curve, order = [], torch.empty(0, dtype=torch.int64)
    model.train()
    for step in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(data[0]))])
        rows, order = order[:size], order[size:]
        images, targets = _varied(*_subset(data, rows)) if vary else _subset(data, rows)
        loss = torch.stack(list(losses(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}: loss {sum(curve[-50:]) / 50:.3f}", file=sys.stderr, flush=True)
    model.eval()
    return [sum(curve[start : start + 10]) / 10 for start in range(0, steps, 10)]


def _points(targets: list[Target], seed: int) -> list[PointTarget]:
    generator = torch.Generator().manual_seed(seed)
    return [sample_points(target, generator=generator) for target in targets]


def _annotate(teacher: nn.Module, data: Data, *, views: int = 8, seed: int = 1) -> list[Detections]:
    """A box for each point: the mean, by score, of those in ``views`` symmetries of a tile."""
    points = _points(data[1], seed)
    boxes, scores = ([torch.zeros(len(entry.labels), size) for entry in points] for size in (4, 1))
    for view in range(views):
        turned = [_turn(image, Target(entry.labels, entry.points.repeat(1, 2)), view) for image, entry in zip(data[0], points)]
        images = torch.stack([image for image, _ in turned])
        entries = [PointTarget(target.labels, target.boxes[:, :2]) for _, target in turned]
        found = [one for start in range(0, len(entries), 16)
                 for one in teacher.predict(images[start : start + 16], entries[start : start + 16])]  # fmt: skip
        for number, one in enumerate(found):
            boxes[number] += _turned_back(one.boxes, view) * one.scores[:, None]
            scores[number] += one.scores[:, None]
    return [
        Detections(boxes=box / total.clamp(min=1e-6), scores=total[:, 0] / views, labels=entry.labels)
        for box, total, entry in zip(boxes, scores, points)
    ]


def _turned_back(corners: Tensor, kind: int) -> Tensor:
    """Boxes found in what `_turn` made, in pixels of the tile."""
    if kind & 4:
        corners = corners[:, [1, 0, 3, 2]]
    if kind & 2:
        corners = torch.stack([corners[:, 0], SIZE - corners[:, 3], corners[:, 2], SIZE - corners[:, 1]], 1)
    if kind & 1:
        corners = torch.stack([SIZE - corners[:, 2], corners[:, 1], SIZE - corners[:, 0], corners[:, 3]], 1)
    return corners


def _detect(predict: Callable[..., list[Detections]], data: Data) -> list[Detections]:
    return [one for images in data[0].split(16) for one in predict(images, threshold=0.01)]


def _corners(target: Target) -> Tensor:
    half = target.boxes[:, 2:] / 2
    return torch.cat([target.boxes[:, :2] - half, target.boxes[:, :2] + half], 1) * SIZE


def _measure(found: list[Detections], targets: list[Target]) -> dict[str, float]:
    """AP of detections; of one box for each object in order, moreover how well it fits."""
    truths = [Truths(_corners(target), target.labels) for target in targets]
    report = average_precision([Detections(one.boxes, one.scores, one.labels) for one in found], truths)
    return {"ap": report.ap, "ap50": report.ap50, "ap75": report.ap75, "ar": report.ar[-1]}


def _quality(found: list[Detections], targets: list[Target]) -> dict[str, float]:
    overlaps = torch.cat([paired_iou(one.boxes, _corners(target)) for one, target in zip(found, targets)])
    share = lambda least: float((overlaps >= least).float().mean())
    return {"mean_iou": float(overlaps.mean()), "iou50": share(0.5), "iou75": share(0.75), **_measure(found, targets)}


def _parts(percent: int) -> tuple[Data, Data, Data]:
    """Training tiles with boxes, training tiles with points, held-out tiles; of the first two only those with trees."""
    train, test = tree_tiles(size=SIZE)
    data = _data(train)
    boxed = choose_annotated(len(data[0]), ratio=percent / 100)
    filled = torch.tensor([len(target.labels) > 0 for target in data[1]])
    return _subset(data, (boxed & filled).nonzero()[:, 0]), _subset(data, (~boxed & filled).nonzero()[:, 0]), _data(test)


def _teach(data: Data, steps: int, *, vary: bool = True) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = create_model("group_rcnn_small")
    losses = lambda images, targets: model.losses(images, targets, list(map(sample_points, targets)))
    return model, _train(model, data, steps, losses, vary=vary)


def _overfit(steps: int) -> tuple[nn.Module, dict]:
    data = _subset(_parts(RATIOS[0])[0], torch.arange(4))
    model, curve = _teach(data, steps, vary=False)
    fit = _quality(_annotate(model, data, views=1), data[1])
    return model, {"curve": curve, "trees": sum(len(target.labels) for target in data[1]), "fit": fit}


def _teacher(percent: int, steps: int) -> tuple[nn.Module, dict]:
    model, curve = _teach(_parts(percent)[0], steps)
    return model, {"curve": curve, **_judge(model, percent)}


def _judge(model: nn.Module, percent: int) -> dict[str, dict[str, float]]:
    """How good a teacher's boxes are, from one view of a tile and from eight, and what it finds without points."""
    boxed, pointed, held = _parts(percent)
    parts = {"own": boxed, "points": pointed, "held_out": held}
    fit = {f"{name}_{views}": _quality(_annotate(model, data, views=views), data[1])
           for name, data in parts.items() for views in (1, 8)}  # fmt: skip
    return {**fit, "retinanet": _measure(_detect(model.detect, held), held[1])}


def _annotated(percent: int, data: Data) -> list[Target]:
    """What the teacher makes of the points of tiles."""
    path = WEIGHTS / f"teacher_{percent}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: delete {RECORDS / path.stem}.json and train the teacher again")
    teacher = create_model("group_rcnn_small")
    teacher.load_state_dict(load_file(path))
    return [pseudo_target(one, height=SIZE, width=SIZE) for one in _annotate(teacher, data)]


def _student(labels: str, percent: int, steps: int) -> tuple[nn.Module, dict]:
    boxed, pointed, held = _parts(percent)
    targets = _annotated(percent, pointed) if labels == "pseudo" else pointed[1]
    data = boxed if labels == "few" else (torch.cat([boxed[0], pointed[0]]), boxed[1] + targets)
    torch.manual_seed(0)
    model = create_model("fcos_small")
    curve = _train(model, data, steps, model.losses)
    return model, {"curve": curve, "tiles": len(data[0]), "held_out": _measure(_detect(model.predict, held), held[1])}


RUNS: dict[str, Callable[[int], tuple[nn.Module, dict]]] = {
    "overfit": _overfit,
    **{f"teacher_{percent}": partial(_teacher, percent) for percent in RATIOS},
    "student_true": partial(_student, "true", RATIOS[0]),
    **{f"student_{labels}_{percent}": partial(_student, labels, percent) for percent in RATIOS for labels in ("pseudo", "few")},
}
"""Trainings by name, in an order in which each finds what it needs."""


def _result(name: str) -> dict:
    """Read a training's result, or train first."""
    path = RECORDS / f"{name}.json"
    if not path.exists():
        start, steps = time.process_time(), STEPS[name.split("_")[0]]
        model, result = RUNS[name](steps)
        for folder in (RECORDS, WEIGHTS):
            folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), WEIGHTS / f"{name}.safetensors")
        facts = {"steps": steps, "cpu_seconds": round(time.process_time() - start), "threads": torch.get_num_threads()}
        path.write_text(json.dumps(facts | result, indent=1) + "\n")
    return json.loads(path.read_text())


def _squares(percent: int) -> dict[str, float]:
    """How well a square of the median size of the true boxes fits, its middle on the point: what needs no network."""
    boxed, _, held = _parts(percent)
    corners = torch.cat([_corners(target) for target in boxed[1]])
    half = (corners[:, 2:] - corners[:, :2]).median() / 2
    found = []
    for target, entry in zip(held[1], _points(held[1], 1)):
        place = entry.points * SIZE
        boxes = torch.cat([place - half, place + half], 1).clamp(0, SIZE)
        found.append(Detections(boxes, torch.ones(len(boxes)), target.labels))
    return _quality(found, held[1])


def run() -> list[Table]:
    """Train what is not trained yet, and tell how good boxes and students are."""
    results = {name: _result(name) for name in RUNS}
    count = lambda data: sum(len(target.labels) for target in data[1])
    rows = [("the same 4 tiles, learnt by heart", "4", 1, results["overfit"]["trees"], results["overfit"]["fit"])]
    titles = {"own": "the same tiles", "points": "training tiles with points only", "held_out": "held-out tiles"}
    for percent in RATIOS:
        parts = dict(zip(titles, _parts(percent)))
        trained = f"{percent} %: {len(parts['own'][0])} tiles, {count(parts['own'])} boxes"
        rows += [(titles[name], trained, views, count(data), results[f"teacher_{percent}"][f"{name}_{views}"])
                 for name, data in parts.items() for views in (1, 8)]  # fmt: skip
    held = _parts(RATIOS[0])[2]
    rows.append(("held-out tiles", "no network: a square of the median size on the point", 1, count(held), _squares(RATIOS[0])))
    fits = Table(
        "Boxes of points (group_rcnn_small)",
        ("tiles", "trained on", "views", "trees", "mean IoU", "IoU >= .5", "IoU >= .75", "AP", "AP50", "AP75"),
        tuple((name, trained, views, trees, *(round(fit[key], 3) for key in ("mean_iou", "iou50", "iou75", "ap", "ap50", "ap75")))
              for name, trained, views, trees, fit in rows),
        "One random point in each box. Eight views: the mean, by score, of the boxes in the symmetries of a tile.",
    )
    measured = [("true boxes of all tiles", results["student_true"])]
    for percent in RATIOS:
        measured += [(f"true boxes of {percent} %, boxes of points of the others", results[f"student_pseudo_{percent}"]),
                     (f"true boxes of {percent} %, the others unused", results[f"student_few_{percent}"])]  # fmt: skip
        teacher, tiles = results[f"teacher_{percent}"], len(_parts(percent)[0][0])
        alone = {"tiles": tiles, "steps": teacher["steps"], "held_out": teacher["retinanet"]}
        measured.append((f"true boxes of {percent} %: the teacher's RetinaNet part", alone))
    students = Table(
        "Students (fcos_small) on held-out tiles",
        ("trained on", "tiles", "steps", "AP", "AP50", "AP75", "AR100"),
        tuple((text, one["tiles"], one["steps"], *(round(one["held_out"][key], 3) for key in ("ap", "ap50", "ap75", "ar")))
              for text, one in measured),
        f"{len(held[0])} tiles, {count(held)} trees, size {SIZE}; one seed.",
    )
    seconds = Table(
        "Training time",
        ("training", "steps", "CPU seconds", "loss at first", "loss at last"),
        tuple((name, one["steps"], one["cpu_seconds"], round(one["curve"][0], 2), round(one["curve"][-1], 2))
              for name, one in results.items()),
    )
    tables = [fits, students, seconds]
    write_page(DOCS / "models-group-rcnn.md", "train_group_rcnn", tables)
    return tables


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        print(chosen, {key: value for key, value in _result(chosen).items() if key != "curve"})
