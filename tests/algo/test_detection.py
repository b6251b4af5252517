import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from algo import detection
from algo.detection import Detections, Truths, average_precision, overlaps


def reference(found, truths, limits=(1, 10, 100)):
    """COCO's twelve figures by pycocotools; its -1 (nothing to measure) as NaN."""
    classes = sorted({int(label) for truth in truths for label in truth.labels})
    boxes = lambda corners: torch.cat([corners[:2], corners[2:] - corners[:2]]).tolist()
    notes, rows = [], []
    for image, (one, two) in enumerate(zip(found, truths)):
        for box, label in zip(two.boxes, two.labels):
            note = {"id": len(notes) + 1, "image_id": image, "category_id": int(label), "bbox": boxes(box), "iscrowd": 0}
            notes.append(note | {"area": note["bbox"][2] * note["bbox"][3]})
        for box, score, label in zip(*one):
            rows.append({"image_id": image, "category_id": int(label), "bbox": boxes(box), "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(len(found))],
            "categories": [{"id": label} for label in range(5)],
            "annotations": notes,
        }
        truth.createIndex()
        if rows:
            results = truth.loadRes(rows)
        else:
            results = COCO()
            results.dataset = truth.dataset | {"annotations": []}
            results.createIndex()
        run = COCOeval(truth, results, "bbox")
        run.params.catIds = classes
        run.params.maxDets = list(limits)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return np.where(run.stats == -1, np.nan, run.stats), run


def ours(report):
    ap = [report.ap, report.ap50, report.ap75, report.ap_small, report.ap_medium, report.ap_large]
    return np.array([*ap, *report.ar, report.ar_small, report.ar_medium, report.ar_large])


def scene(seed, images=6, classes=3, most=8, levels=None):
    """Random images: boxes near true ones and elsewhere, on a grid of eighths (exact in COCO's width form as well)."""
    generator = np.random.default_rng(seed)
    found, truths = [], []
    for _ in range(images):
        count, extra = generator.integers(0, most, 2)
        corners = generator.integers(0, 800, (count, 2)) / 8
        true = np.concatenate([corners, corners + generator.integers(8, 1200, (count, 2)) / 8], 1)
        moved = np.repeat(true, 2, 0) + generator.integers(-40, 40, (2 * count, 4)) / 8
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2])
        other = generator.integers(0, 800, (extra, 2)) / 8
        boxes = np.concatenate([moved, np.concatenate([other, other + generator.integers(0, 900, (extra, 2)) / 8], 1)])
        labels = generator.integers(0, classes, count)
        guessed = np.concatenate([np.repeat(labels, 2), generator.integers(0, classes, extra)])
        scores = generator.random(len(boxes))
        if levels:
            scores = np.floor(scores * levels) / levels  # ties
        found.append(Detections(*map(torch.from_numpy, (boxes, scores, guessed))))
        truths.append(Truths(torch.from_numpy(true), torch.from_numpy(labels)))
    return found, truths


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 3, 12]), st.sampled_from([None, 1, 4])
)
def test_equals_pycocotools(seed, images, classes, most, levels):
    found, truths = scene(seed, images, classes, most, levels)
    if not any(len(truth.labels) for truth in truths):
        assert np.isnan(ours(average_precision(found, truths))).all()
        return
    expected, _ = reference(found, truths)
    np.testing.assert_allclose(ours(average_precision(found, truths)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("limits", [(1, 2, 3), (1, 5, 40)])
def test_limits_and_classes_equal_pycocotools(limits):
    found, truths = scene(5, images=150, classes=2, most=14, levels=20)  # more images than are matched at once
    assert len(found) > 2 * detection._GROUPS
    report = average_precision(found, truths, limits=limits)
    expected, run = reference(found, truths, limits)
    assert report.limits == limits
    # pycocotools takes AP over all ranges with 100 detections only, and -1 if that limit is not asked for.
    np.testing.assert_allclose(ours(report)[1:], expected[1:], rtol=0, atol=1e-12)
    precision = run.eval["precision"][:, :, :, 0, -1]
    assert report.ap == pytest.approx(precision.mean(), abs=1e-12)
    for row, label in enumerate(sorted(report.per_class)):
        assert report.per_class[label] == pytest.approx(precision[:, :, row].mean(), abs=1e-12)


def truth(*boxes, label=0):
    return Truths(torch.tensor(boxes, dtype=torch.float).view(-1, 4), torch.full((len(boxes),), label))


def detections(*rows, label=0):
    rows = torch.tensor(rows, dtype=torch.float).view(-1, 5)
    return Detections(rows[:, :4], rows[:, 4], torch.full((len(rows),), label))


def test_perfect_empty_and_absent():
    box = (0, 0, 50, 50)
    perfect = average_precision([detections((*box, 0.9))], [truth(box)])
    assert perfect.ap == pytest.approx(1) and perfect.ap50 == pytest.approx(1) and perfect.ar == (1, 1, 1)
    assert np.isnan(perfect.ap_small) and np.isnan(perfect.ar_large) and list(perfect.per_class) == [0]
    assert average_precision([detections()], [truth(box)]).ap == 0
    assert average_precision([detections((*box, 0.9), label=1)], [truth(box)]).ap == 0  # a class nobody has counts for nothing
    assert np.isnan(average_precision([detections((*box, 0.9))], [truth()]).ap)
    assert np.isnan(average_precision([], []).ap)


def test_a_wrong_detection_before_the_right_one_halves_precision():
    report = average_precision([detections((0, 0, 9, 9, 0.9), (20, 20, 30, 30, 0.5))], [truth((20, 20, 30, 30))])
    assert report.ap == pytest.approx(0.5)


def test_overlaps_of_empty_and_nested_boxes():
    boxes = np.array([[0.0, 0, 4, 4], [1, 1, 3, 3], [2, 2, 2, 5]])
    assert overlaps(boxes, boxes).tolist() == [[1, 0.25, 0], [0.25, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("found", "truths", "message"),
    [
        ([detections()], [], "1 images have detections and 0 have true boxes"),
        ([detections((5, 0, 1, 1, 0.5))], [truth()], "detections of image 0: a box is not finite or has x2 < x1"),
        ([detections((0, 0, 1, float("nan"), 0.5))], [truth()], "detections of image 0: a box is not finite"),
        ([detections((0, 0, 1, 1, float("inf")))], [truth()], "detections of image 0: a score is not finite"),
        ([detections()], [Truths(torch.zeros(2, 4), torch.zeros(1))], r"true boxes of image 0: boxes must be \(1, 4\) for 1 lab"),
        ([Detections(torch.zeros(1, 4), torch.zeros(2), torch.zeros(1))], [truth()], "2 scores and 1 labels"),
    ],
)
def test_wrong_input(found, truths, message):
    with pytest.raises(ValueError, match=message):
        average_precision(found, truths)


@pytest.mark.parametrize("limits", [(), (0, 1), (10, 1), (1, 1)])
def test_wrong_limits(limits):
    with pytest.raises(ValueError, match=r"limits must be ascending integers >= 1, not \("):
        average_precision([], [], limits=limits)
