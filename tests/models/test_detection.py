import pytest
import torch
from torch import distributed

from models import Target, create_model, pad_images
from models.detection import DetectionCriterion, DetectorOutput, Prediction, check_targets, resize_mask
from models.matcher import BoxMatcher


def prediction(seed, *, images=2, queries=6, classes=3):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, queries, classes, generator=generator)
    return Prediction(logits, torch.rand(images, queries, 4, generator=generator) * 0.5 + 0.1)


def target(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Target(torch.randint(2, (count,), generator=generator), torch.rand(count, 4, generator=generator) * 0.4 + 0.2)


def test_targets_from_pixels():
    boxes = torch.tensor([[10.0, 0, 30, 20], [0, 0, 40, 20]])
    made = Target.from_corners(torch.tensor([0, 1]), boxes, height=20, width=40)
    assert torch.allclose(made.boxes, torch.tensor([[0.5, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]]))
    with pytest.raises(ValueError, match="inside the image, 40 wide and 20 high: clip them; box 1"):
        Target.from_corners(torch.tensor([0, 1]), boxes + torch.tensor([1.0, 0, 1, 0]), height=20, width=40)


@pytest.mark.parametrize(
    ("labels", "boxes", "error", "message"),
    [
        (torch.tensor([0.0]), torch.zeros(1, 4), TypeError, "labels of image 1 must be int64, not torch.float32"),
        (torch.tensor([0, 1]), torch.zeros(1, 4), ValueError, r"image 1 has labels \(2,\) for boxes \(1, 4\)"),
        (torch.tensor([3]), torch.full((1, 4), 0.5), ValueError, r"labels of image 1 must be in 0 to 2, not \[3\]"),
        (torch.tensor([0]), torch.tensor([[0.9, 0.5, 0.4, 0.2]]), ValueError, "boxes of image 1 .* inside the image"),
        (torch.tensor([0]), torch.tensor([[0.5, 0.5, -0.1, 0.2]]), ValueError, "boxes of image 1 .* x2 >= x1"),
    ],
)
def test_wrong_targets_are_refused(labels, boxes, error, message):
    with pytest.raises(error, match=message):
        check_targets([target(0), Target(labels, boxes)], images=2, classes=3)


def test_as_many_targets_as_images():
    with pytest.raises(ValueError, match="2 images need as many targets, not 1"):
        check_targets([target(1)], images=2, classes=3)


def test_padding():
    images = [torch.ones(3, 4, 6), torch.ones(3, 5, 2)]
    batch, mask = pad_images(images)
    assert batch.shape == (2, 3, 5, 6) and mask.dtype == torch.bool
    assert torch.equal(mask, batch[:, 0].bool()) and mask.sum((1, 2)).tolist() == [24, 10]
    assert resize_mask(mask, (3, 3))[1].tolist() == [[True, False, False]] * 3
    with pytest.raises(ValueError, match=r"images must be \(3, H, W\), not \(1, 5, 2\) \(image 1\)"):
        pad_images([images[0], torch.ones(1, 5, 2)])
    with pytest.raises(ValueError, match="at least one image"):
        pad_images([])


@pytest.mark.parametrize("focal", [False, True])
def test_no_objects_leave_the_loss_of_the_classes(focal):
    criterion = DetectionCriterion(matcher=BoxMatcher(focal=focal))
    losses = criterion(DetectorOutput((prediction(0),)), [target(0), target(0)])
    assert losses["l1"] == losses["giou"] == 0 and losses["class"] > 0


def test_sums_are_over_the_number_of_objects():
    criterion = DetectionCriterion(matcher=BoxMatcher(focal=True))
    output = DetectorOutput((prediction(0),))
    both = criterion(output, [target(3), target(1, 1)])
    first = criterion(output.images(0, 1), [target(3)])
    second = criterion(output.images(1, 2), [target(1, 1)])
    for name in both:
        assert both[name].item() == pytest.approx((3 * first[name] + second[name]).item() / 4, rel=1e-5)


def test_processes_that_train_together_share_the_number_of_objects(monkeypatch):
    output, targets = DetectorOutput((prediction(0),)), [target(3), target(1, 1)]
    criterion = DetectionCriterion(matcher=BoxMatcher(focal=True))
    alone = criterion(output, targets)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda count: count.add_(8))  # the other process has 8
    together = criterion(output, targets)
    for name in alone:
        assert together[name].item() == pytest.approx(4 / 6 * alone[name].item(), rel=1e-5)


def test_names_and_weights_of_the_parts():
    layers, many = (prediction(0), prediction(1)), (prediction(2), prediction(3))
    output = DetectorOutput(layers, prediction(4), many)
    targets = [target(2), target(1, 1)]
    focal = BoxMatcher(focal=True)
    losses = DetectionCriterion(matcher=focal, many_weight=0.5, repeats=2)(output, targets)
    kinds = ("class", "l1", "giou")
    assert set(losses) == {
        f"{many}{kind}{layer}" for many in ("", "many_") for kind in kinds for layer in ("", "_0")
    } | {f"{kind}_encoder" for kind in kinds}  # fmt: skip
    # one-to-many: the same criterion on twice the objects, half the weight
    twice = [Target(part.labels.repeat(2), part.boxes.repeat(2, 1)) for part in targets]
    plain = DetectionCriterion(matcher=focal)(DetectorOutput(many), twice)
    assert all(losses[f"many_{name}"].item() == pytest.approx(value.item() / 2) for name, value in plain.items())
    # proposals: whatever the class, it is an object
    anything = [Target(torch.zeros_like(part.labels), part.boxes) for part in targets]
    proposals = DetectionCriterion(matcher=focal)(DetectorOutput((output.encoder,)), anything)
    assert all(losses[f"{name}_encoder"] == value for name, value in proposals.items())


def test_predictions_that_are_no_numbers_are_refused():
    bad = prediction(0)
    bad.boxes[0, 2, 1] = float("nan")
    with pytest.raises(ValueError, match="prediction 2 for object 0 is nan"):
        DetectionCriterion()(DetectorOutput((bad,)), [target(1), target(0)])
    bad = prediction(0)
    bad.logits[1, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="the loss 'class' is not finite"):
        DetectionCriterion(matcher=BoxMatcher(focal=True))(DetectorOutput((bad,)), [target(1), target(0)])


@pytest.mark.parametrize("name", ["detr_tiny", "deformable_detr_tiny"])
def test_results_are_sorted_and_in_pixels(name):
    model = create_model(name, num_classes=2, width=4)
    output = DetectorOutput((prediction(0, queries=5, classes=2 + (name == "detr_tiny")),))
    sizes = torch.tensor([[100, 50], [10, 20]])
    found = model.results(output, sizes, top=4)
    for image, (scores, labels, boxes) in enumerate(found):
        assert torch.equal(scores, scores.sort(descending=True).values) and len(scores) == 4 and labels.max() < 2
        width, height = sizes[image].tolist()
        logits = output.logits[image]
        for score, label, box in zip(scores, labels, boxes):
            table = logits.softmax(-1)[:, :-1] if name == "detr_tiny" else logits.sigmoid()
            query = int((table[:, label] - score).abs().argmin())
            cx, cy, w, h = output.boxes[image, query].tolist()
            expected = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
            assert table[query, label] == score and box.tolist() == pytest.approx(expected, abs=1e-4)
    assert all(len(one.scores) == 0 for one in model.results(output, sizes, threshold=1.0))


def test_wrong_images_are_refused():
    model = create_model("detr_tiny", width=4)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), not \(2, 1, 32, 32\)"):
        model(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"the mask must be bool \(2, 32, 32\)"):
        model(torch.zeros(2, 3, 32, 32), torch.ones(2, 32, 32))
    images = torch.zeros(2, 3, 32, 32)
    images[1, 0, 3, 4] = float("nan")
    nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    for use in (lambda: model.losses(images, [nothing] * 2), lambda: model.predict(images)):
        with pytest.raises(ValueError, match="image 1 has a pixel that is not finite"):
            use()
