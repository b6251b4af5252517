import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from algo.channels import channel_groups
from algo.sparsify import finalize, sparsify, sparsity_report
from models import GroupRCNN, create_model
from models.anchors import cell_anchors, decode_boxes, encode_boxes
from models.boxes import pairwise_iou
from models.detection import Target
from models.group_rcnn import (
    Groups,
    ImagePart,
    StageOutput,
    assign_instances,
    group_proposals,
    instance_convolution,
    nearest_cells,
    relative_places,
)
from models.points import PointTarget, sample_points
from models.roi import pyramid_roi_align
from tests.models.sparse_checks import check_fisher


def tiny(**overrides):
    sizes = {"width": 4, "channels": 8, "convs": 1, "hidden": 16, "norm_groups": 2, "roi_size": 3, "group": 6}
    return create_model("group_rcnn_small", **sizes | overrides)


def scene(*counts, classes=1, seed=0, size=64):
    """Images, targets and points with so many objects in each image."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        low = torch.rand(count, 2, generator=generator) * 0.6 * size
        corners = torch.cat([low, low + (0.1 + 0.25 * torch.rand(count, 2, generator=generator)) * size], 1)
        labels = torch.randint(classes, (count,), generator=generator)
        targets.append(Target.from_corners(labels, corners, height=size, width=size))
    points = [sample_points(target, generator=generator) for target in targets]
    return torch.randn(len(counts), 3, size, size, generator=generator), targets, points


def test_published_parameters():
    with torch.device("meta"):
        model = create_model("group_rcnn_r50")
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    head = model.instances
    parts = {
        "RetinaNet": count(model) - count(head) - count(model.projection),
        "heads": count(head.heads),
        "generators": count(head.generators),
        "fuse": count(head.fuse),
        "place": count(head.place),
        "projection": count(model.projection),
        "embedding": count(head.embedding),
        "norm": count(head.norm),
    }
    assert parts == {
        "RetinaNet": 37_968_692,
        "heads": 41_948_415,
        "generators": 50_528_256,
        "fuse": 131_328,
        "place": 594_688,
        "projection": 590_080,
        "embedding": 20_480,
        "norm": 512,
    }
    assert count(model) == 131_782_451


def test_proposals_around_a_point():
    model = create_model("group_rcnn_small", extra_levels=2)
    images, _, points = scene(2, 1, size=160)
    outputs = model.head(model.extract(images))
    pixels = points[0].points * 160
    boxes, scores = model.proposals(outputs, 0, torch.tensor([160.0, 160.0]), pixels, points[0].labels)
    assert boxes.shape == (2, 135, 4) and scores.shape == (2, 135)
    # One by one: level, cell, anchor.
    row = 0
    for (logits, offsets), stride in zip(outputs, model.strides):
        width = logits.shape[3]
        cells = nearest_cells(pixels[:1], size=logits.shape[2:], stride=stride, count=3)[:, 0]
        for cell in cells.tolist():
            y, x = divmod(cell, width)
            for number, anchor in enumerate(cell_anchors(stride)):
                placed = anchor + torch.tensor([x, y, x, y]) * stride
                offset = offsets[0, 4 * number : 4 * number + 4, y, x]
                torch.testing.assert_close(boxes[0, row], decode_boxes(offset, placed).clamp(0, 160), rtol=1e-4, atol=1e-3)
                torch.testing.assert_close(scores[0, row], logits[0, number, y, x].sigmoid())
                row += 1
    assert row == 135


def test_nearest_cells_by_hand():
    assert set(nearest_cells(torch.tensor([[9.0, 1.0]]), size=(4, 4), stride=8, count=3)[:, 0].tolist()) == {1, 2, 5}
    assert nearest_cells(torch.tensor([[9.0, 1.0]]), size=(1, 2), stride=8, count=3).shape == (2, 1)
    assert nearest_cells(torch.zeros(0, 2), size=(4, 4), stride=8, count=3).shape == (3, 0)


def slow_groups(boxes, scores, labels, size, threshold, limit):
    count, each = scores.shape
    rows = sorted(((instance, place) for instance in range(count) for place in range(each)), key=lambda row: -float(scores[row]))
    kept = []
    for row in rows:
        rivals = [other for other in kept if labels[other[0]] == labels[row[0]]]
        if all(pairwise_iou(boxes[row][None], boxes[other][None]) <= threshold for other in rivals):
            kept.append(row)
    kept = kept[:limit]
    groups = []
    for instance in range(count):
        own = [place for owner, place in kept if owner == instance][:size] or [int(scores[instance].argmax())]
        groups.append([boxes[instance, place].tolist() for place in own])
    return groups


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 5), st.integers(1, 12), st.integers(1, 6), st.booleans())
def test_groups_equal_a_loop(seed, count, each, size, close):
    threshold = 0.05 if close else 0.5
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, each, 2, generator=generator) * (3 if close else 30)
    boxes = torch.cat([low, low + 5 + torch.rand(count, each, 2, generator=generator) * 10], 2)
    scores, labels = torch.rand(count, each, generator=generator), torch.randint(2, (count,), generator=generator)
    grouped, real = group_proposals(boxes, scores, labels, size=size, threshold=threshold, limit=20)
    assert grouped.shape == (count, size, 4) and real.shape == (count, size)
    expected = slow_groups(boxes, scores, labels, size, threshold, 20)
    assert [group[mine].tolist() for group, mine in zip(grouped, real)] == expected
    assert (grouped[~real] == 0).all()


def test_a_suppressed_instance_keeps_its_best():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9.9]], [[0, 0, 10, 10], [0, 0, 9.9, 10]]])
    scores = torch.tensor([[0.9, 0.8], [0.3, 0.4]])
    grouped, real = group_proposals(boxes, scores, torch.zeros(2, dtype=torch.int64), size=3)
    assert real.tolist() == [[True, False, False]] * 2 and grouped[1, 0].tolist() == pytest.approx([0, 0, 9.9, 10])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 4), st.integers(1, 5))
def test_grouped_convolution_equals_a_loop(seed, instances, each):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(instances, each, 6, 3, 3, generator=generator)
    kernels = torch.randn(instances, 5, 6, generator=generator)
    result = instance_convolution(x, kernels)
    assert result.shape == (instances, each, 5, 3, 3)
    for one, kernel, own in zip(x, kernels, result):
        torch.testing.assert_close(own, F.conv2d(one, kernel[:, :, None, None]), rtol=1e-4, atol=1e-5)


def test_relative_places_equal_a_map_for_each_point():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.zeros(1, 1, 20, 24), torch.zeros(1, 1, 10, 12)]
    low = torch.rand(8, 2, generator=generator) * 60
    boxes = torch.cat([low, low + torch.rand(8, 2, generator=generator) * 130], 1)
    boxes[0] = 0  # padding
    points = low + 7
    result = relative_places(maps, boxes, points, strides=[8, 16], size=3)
    for number, (box, point) in enumerate(zip(boxes, points)):
        own = []
        for x, stride in zip(maps, (8, 16)):
            grid = torch.zeros(1, 2, *x.shape[2:])
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    grid[0, :, row, column] = (point - torch.tensor([column, row]) * stride) / stride
            own.append(grid)
        wanted = pyramid_roi_align(own, box[None], torch.zeros(1, dtype=torch.int64), strides=[8, 16], size=3)[0]
        torch.testing.assert_close(result[number], wanted, rtol=1e-4, atol=1e-4)


def test_assignment_follows_the_rule():
    truth = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    rois = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5.1], [100, 100, 110, 110], [0, 0, 0, 0]]]).repeat(2, 1, 1)
    labels, positive = assign_instances(rois, truth, torch.tensor([3, 1]), threshold=0.5, background=9)
    # Exactly 0.5 is not above it; another instance's box is background however well it fits.
    assert labels.tolist() == [[3, 9, 3, 9, 9], [9, 9, 9, 1, 9]]
    assert torch.equal(positive, labels < 9)


def test_stage_losses_equal_a_loop():
    torch.manual_seed(0)
    model = tiny(num_classes=3)
    truth = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 50]])
    rois = truth[:, None] + torch.randn(2, 6, 4) * 2
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    rois[~real] = 0
    groups = Groups(rois, real, torch.zeros(2, dtype=torch.int64), torch.tensor([2, 0]), truth[:, :2])
    output = StageOutput(rois, torch.randn(2, 6, 4), torch.randn(2, 6, 4))
    for stage, (least, weight) in enumerate(zip((0.5, 0.6, 0.7), (1, 0.5, 0.25))):
        classes = boxes = count = 0
        for instance in range(2):
            for place in range(6):
                if not real[instance, place]:
                    continue
                good = float(pairwise_iou(rois[instance, place][None], truth[instance][None])) > least
                label = groups.labels[instance] if good else torch.tensor(3)
                classes += F.cross_entropy(output.logits[instance, place], label)
                if good:
                    wanted = encode_boxes(truth[instance], rois[instance, place], deviations=model.config.stage_deviations[stage])
                    boxes += F.smooth_l1_loss(output.offsets[instance, place], wanted, reduction="sum")
                    count += 1
        assert count > 1
        losses = model._stage_losses(stage, output, groups, truth)
        torch.testing.assert_close(losses[f"class_{stage}"], weight * classes / count)
        torch.testing.assert_close(losses[f"box_{stage}"], weight * boxes / count)


def test_images_and_padding_do_not_mix():
    torch.manual_seed(0)
    model = tiny(num_classes=2)
    images, _, points = scene(3, 0, 2, classes=2)
    together = model.predict(images, points)
    for image, one in enumerate(together):
        alone = model.predict(images[image : image + 1], points[image : image + 1])[0]
        assert one.labels.tolist() == points[image].labels.tolist() and one.boxes.shape == (len(points[image].points), 4)
        for mine, other in zip(one, alone):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
        assert one.boxes.numel() == 0 or (0 <= one.boxes.min() and one.boxes.max() <= 64)
    # Groups twice as large, most of it padding: the outputs for what is real stay.
    groups, stages = model(images, points)
    larger = Groups(F.pad(groups.boxes, (0, 0, 0, 6)), F.pad(groups.real, (0, 6)), *groups[2:])
    maps = [F.relu(model.projection(x)) for x in model.extract(images)[:3]]
    again = model.instances(maps, larger, torch.full((3, 2), 64.0), model.strides)
    for one, other in zip(stages, again):
        torch.testing.assert_close(one.logits[groups.real], other.logits[:, :6][groups.real], rtol=1e-3, atol=1e-3)


def test_score_is_the_mean_over_stages():
    torch.manual_seed(0)
    model = tiny()
    images, _, points = scene(1)
    groups, stages = model(images, points)
    found = model.predict(images, points)[0]
    chances = torch.stack([stage.logits.softmax(-1)[0, :, 0] for stage in stages]).mean(0)[groups.real[0]]
    assert found.scores[0] == pytest.approx(float(chances.max()), abs=1e-5)


def test_losses_train_all_parts_but_not_the_levels():
    torch.manual_seed(0)
    model = tiny().train()
    images, targets, points = scene(3, 2)
    losses = model.losses(images, targets, points)
    assert set(losses) == {"class", "box", *(f"{kind}_{stage}" for kind in ("class", "box") for stage in range(3))}
    sum(value for name, value in losses.items() if "_" in name).backward()
    assert model.instances.place.weight.grad.abs().max() > 0 and model.instances.generators[2].weight.grad.abs().max() > 0
    assert model.fpn.output[0].weight.grad is None and model.backbone.conv1.weight.grad is None


def test_no_instances_and_objects_without_area():
    model = tiny()
    images, targets, points = scene(0, 0)
    losses = model.losses(images, targets, points)
    assert all(losses[f"{kind}_{stage}"] == 0 for kind in ("class", "box") for stage in range(3))
    sum(losses.values()).backward()
    assert [one.boxes.shape for one in model.predict(images, points)] == [(0, 4), (0, 4)]
    flat = Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.0, 0.2]]))
    losses = model.losses(images[:1], [flat], [PointTarget(flat.labels, flat.boxes[:, :2])])
    assert all(value.isfinite() for value in losses.values()) and losses["box_0"] == 0


def test_detect_needs_no_points():
    images, _, _ = scene(1)
    assert len(tiny().detect(images, threshold=0.0, top=7)[0].boxes) == 7


def test_wrong_input():
    model = tiny(num_classes=2)
    images, targets, points = scene(2, 1)
    with pytest.raises(ValueError, match="2 images need as many entries of points, not 1"):
        model.predict(images, points[:1])
    outside = PointTarget(torch.tensor([0]), torch.tensor([[0.5, 1.2]]))
    with pytest.raises(ValueError, match="point 0 of image 1 must be in the image"):
        model.predict(images, [points[0], outside])
    with pytest.raises(ValueError, match="image 1 has other labels with its points than with its boxes"):
        model.losses(images, targets, [points[0], PointTarget(torch.tensor([1]), points[1].points)])
    broken = [targets[0], Target(torch.tensor([0]), torch.tensor([[0.9, 0.5, 0.6, 0.2]]))]
    with pytest.raises(ValueError, match="boxes of image 1 .* must be inside the image"):
        model.losses(images, broken, points)
    with pytest.raises(ValueError, match="image 0 has a pixel that is not finite"):
        model.predict(images * float("inf"), points)
    torch.nn.init.constant_(model.instances.heads[1].classes.bias, float("nan"))
    with pytest.raises(ValueError, match="the loss 'class_1' is not finite"):
        model.losses(images, targets, points)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_groups": 3}, "channels must be a multiple of norm_groups 3, not 8"),
        ({"stage_weights": (1.0,)}, "must have one entry for each stage"),
        ({"roi_levels": 9}, "roi_levels must be at most 4, the levels there are, not 9"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_sparsify():
    model = tiny()
    images, targets, points = scene(2)
    sparsify(model, "2:4", method="sr-ste")
    sum(model.losses(images, targets, points).values()).backward()
    finalize(model)
    rows = {row.layer: row for row in sparsity_report(model)}
    assert rows["instances.generators.0"].violations == 0 and str(rows["instances.generators.0"].pattern) == "2:4"
    assert len(model.predict(images, points)[0].boxes) == 2


def test_fisher_pruning_of_what_comes_before_the_points():
    """The whole cannot be recorded (NMS depends on values), what it computes of images can; it is trained as a whole."""
    torch.manual_seed(0)
    model, (images, targets, points) = tiny().train(), scene(2, 1)
    assert isinstance(model, GroupRCNN)
    graph = channel_groups(ImagePart(model), images)
    assert set(graph.group("model.fpn.lateral.0").producers) == {f"model.fpn.lateral.{level}" for level in range(3)}  # are added
    readers = graph.group("model.fpn.output.0").consumers
    assert {"model.head.class_tower.0.0", "model.head.box_tower.0.0", "model.projection"} <= set(readers)
    check_fisher(
        ImagePart(model), images, lambda part: sum(part.model.losses(images, targets, points).values()), target=0.8,
        parts=("model.backbone.layer2", "model.fpn.output", "model.head.box_tower"),
    )  # fmt: skip
    assert [len(found.boxes) for found in model.eval().predict(images, points)] == [2, 1]
