import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from algo.channels import channel_groups
from algo.sparsify import finalize, sparsify
from models import create_model
from models.boxes import paired_iou
from models.detection import Target
from models.fcos import assign_cells
from models.losses import sigmoid_focal_loss
from tests.models.sparse_checks import check_fisher


def tiny(**overrides):
    return create_model("fcos_small", **{"width": 4, "channels": 8, "convs": 1, "norm_groups": 2} | overrides)


def target(*boxes, labels=None, size=64):
    corners = torch.tensor(boxes, dtype=torch.float).view(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return Target.from_corners(labels, corners, height=size, width=size)


def test_parameters_are_those_of_torchvision():
    with torch.device("meta"):
        model = create_model("fcos_r50", num_classes=91)
    # 32,269,600 of fcos_resnet50_fpn; there batch norm has no parameters (53,120 in the backbone) and levels no factors (5)
    assert sum(parameter.numel() for parameter in model.parameters()) - 53_120 - 5 == 32_269_600


def test_output_shapes_and_units():
    torch.manual_seed(0)
    images, model = torch.randn(2, 3, 64, 96), tiny(num_classes=3)
    outputs = model(images)
    assert [tuple(output.logits.shape) for output in outputs] == [(2, 3, 8, 12), (2, 3, 4, 6), (2, 3, 2, 3), (2, 3, 1, 2)]
    assert outputs[0].distances.shape == (2, 4, 8, 12) and outputs[0].centre.shape == (2, 1, 8, 12)
    plain = tiny(num_classes=3, normalised=False)
    plain.load_state_dict(model.state_dict())
    for one, other, stride in zip(outputs, plain(images), model.strides):
        torch.testing.assert_close(one.distances, other.distances * stride)


def slow_assignment(place, boxes, low, high):
    best, area = -1, math.inf
    for number, (left, top, right, bottom) in enumerate(boxes.tolist()):
        distances = (place[0] - left, place[1] - top, right - place[0], bottom - place[1])
        size = (right - left) * (bottom - top)
        if min(distances) > 0 and low <= max(distances) <= high and size < area:
            best, area = number, size
    return best


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6))
def test_assignment_equals_a_loop(seed, count):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 40, (count, 2), generator=generator).float()
    boxes = torch.cat([low, low + torch.randint(1, 60, (count, 2), generator=generator)], 1)
    places = torch.randint(0, 64, (30, 2), generator=generator).float()
    limits = torch.tensor([[0.0, 16], [16, 32], [32, math.inf]]).repeat(10, 1)
    expected = [slow_assignment(place.tolist(), boxes, *limit.tolist()) for place, limit in zip(places, limits)]
    assert assign_cells(places, boxes, limits).tolist() == expected


def test_losses_equal_a_direct_sum():
    torch.manual_seed(0)
    model, images = tiny(num_classes=2), torch.randn(2, 3, 64, 64)
    boxes = torch.tensor([[4.0, 4, 40, 36], [20, 30, 62, 60]])
    targets = [target(*boxes.tolist(), labels=[1, 0]), target()]
    classes = box_loss = centres = count = total = 0
    for level, (logits, distances, centre) in enumerate(model(images)):
        stride = model.strides[level]
        low, high = (4 * stride if level else 0), (8 * stride if level < 3 else math.inf)
        for image in range(2):
            for y in range(logits.shape[2]):
                for x in range(logits.shape[3]):
                    place = ((x + 0.5) * stride, (y + 0.5) * stride)
                    who = -1 if image else slow_assignment(place, boxes, low, high)
                    truth = torch.zeros(2)
                    if who >= 0:
                        truth[targets[0].labels[who]] = 1
                        left, top, right, bottom = boxes[who].tolist()
                        across, down = (place[0] - left, right - place[0]), (place[1] - top, bottom - place[1])
                        central = math.sqrt(min(across) / max(across) * min(down) / max(down))
                        d = distances[image, :, y, x]
                        found = torch.stack([place[0] - d[0], place[1] - d[1], place[0] + d[2], place[1] + d[3]])
                        box_loss -= paired_iou(found, boxes[who]).clamp(min=1e-6).log() * central
                        centres += F.binary_cross_entropy_with_logits(centre[image, 0, y, x], torch.tensor(central))
                        count, total = count + 1, total + central
                    classes += sigmoid_focal_loss(logits[image, :, y, x], truth).sum()
    losses = model.losses(images, targets)
    for name, wanted in (("class", classes / count), ("box", box_loss / total), ("centre", centres / count)):
        torch.testing.assert_close(losses[name], wanted, rtol=1e-4, atol=1e-5)


def test_no_objects_objects_without_area_and_padding():
    model, images = tiny(), torch.randn(1, 3, 64, 64)
    for nothing in (target(), target((5, 5, 5, 30))):
        losses = model.losses(images, [nothing])
        assert losses["box"] == 0 == losses["centre"] and losses["class"] > 0
        sum(losses.values()).backward()
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :32] = True
    assert model.losses(images, [target()], mask)["class"] < losses["class"]


def test_a_perfect_output_gives_the_boxes():
    model = tiny()
    boxes = torch.tensor([[4.0, 8, 44, 40]])

    def perfect(images):
        outputs = model.head(model.extract(images))
        places = model._points(outputs)
        result = []
        for output, place in zip(outputs, places):
            distances = torch.cat([place - boxes[:, :2], boxes[:, 2:] - place], 1)
            inside = (distances > 0).all(1)
            shape = output.logits.shape[2:]
            result.append(
                output._replace(
                    logits=torch.where(inside, 9.0, -9.0).view(1, 1, *shape), distances=distances.T.reshape(1, 4, *shape),
                    centre=torch.full((1, 1, *shape), 9.0),
                )
            )
        return result

    model.forward = perfect
    found = model.predict(torch.randn(1, 3, 64, 64))[0]
    torch.testing.assert_close(found.boxes, boxes)
    assert found.labels.tolist() == [0] and found.scores[0] > 0.99


def test_wrong_input():
    model, images = tiny(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="1 images need as many targets"):
        model.losses(images, [])
    with pytest.raises(ValueError, match="image 0 has a pixel that is not finite"):
        model.predict(images * float("nan"))
    with pytest.raises(ValueError, match="channels must be a multiple of norm_groups 3, not 8"):
        tiny(norm_groups=3)
    torch.nn.init.constant_(model.head.centre.bias, float("nan"))
    with pytest.raises(ValueError, match="the loss 'centre' is not finite"):
        model.losses(images, [target((4, 4, 40, 36))])


def test_fisher_pruning_takes_channels_of_backbone_and_pyramid():
    torch.manual_seed(0)
    model, images = tiny(), torch.randn(2, 3, 64, 64)
    targets = [target((4, 4, 40, 36)), target((10, 20, 30, 60), (0, 0, 20, 20))]
    loss = lambda model: sum(model.losses(images, targets).values())
    check_fisher(model, images, loss, target=0.8, parts=("backbone.layer1", "fpn.output"))
    assert len(model.eval().predict(images, threshold=0.0, top=5)[0].boxes) == 5


def test_sparsify_and_channels():
    model, images = tiny(), torch.randn(1, 3, 64, 64)
    graph = channel_groups(model, images)
    assert graph.group("backbone.layer1.0.conv1").kept is None and graph.group("fpn.output.0").kept is None
    assert "group_norm normalises over them" in graph.group("head.class_tower.0.0").kept
    assert set(sparsify(model, {"*": "2:4"}, method="magnitude")) >= {"fpn.lateral.1", "head.box_tower.0.0"}
    finalize(model)
    assert len(model.predict(images, threshold=0.0, top=5)[0].boxes) == 5
