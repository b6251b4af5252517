import pytest
import torch

from algo.channels import channel_groups
from algo.fisher import FisherPruner
from algo.sparsify import finalize, sparsify, sparsity_report
from models import RetinaNet, create_model
from models.anchors import assign_anchors, encode_boxes
from models.detection import Target
from models.losses import sigmoid_focal_loss
from models.retinanet import CONFIGS


def tiny(**overrides):
    return create_model("retinanet_small", **{"width": 4, "channels": 8, "convs": 1} | overrides)


def target(*boxes, labels=None, size=64):
    corners = torch.tensor(boxes, dtype=torch.float).view(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return Target.from_corners(labels, corners, height=size, width=size)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_parameters():
    with torch.device("meta"):
        assert parameters(create_model("retinanet_r50")) == 37_968_692
        # torchvision's retinanet_resnet50_fpn, whose batch norm has no parameters (53,120 in the backbone)
        other = create_model("retinanet_r50", num_classes=91, extra="output", relu_extra=True)
    assert parameters(other) - 53_120 == 34_014_999


def test_output_shapes_and_frozen_parts():
    model = tiny(num_classes=3)
    shapes = [(logits.shape, offsets.shape) for logits, offsets in model(torch.randn(2, 3, 64, 96))]
    sizes = [(8, 12), (4, 6), (2, 3), (1, 2)]
    assert shapes == [((2, 27, *size), (2, 36, *size)) for size in sizes]
    assert model.strides == (8, 16, 32, 64)
    frozen = create_model("retinanet_small", frozen_stages=2, frozen_statistics=True).train()
    assert not frozen.backbone.bn1.training and not frozen.backbone.layer1[0].conv1.weight.requires_grad
    assert frozen.backbone.layer2[0].bn1.weight.requires_grad and not frozen.backbone.layer2[0].bn1.training
    assert tiny().train().backbone.bn1.training


def test_losses_equal_a_direct_sum():
    torch.manual_seed(0)
    model = tiny(num_classes=3)
    images = torch.randn(2, 3, 64, 64)
    targets = [target((4, 4, 40, 36), (20, 30, 60, 62), labels=[2, 0]), target()]
    outputs = model(images)
    anchors = torch.cat(model.level_anchors(outputs))
    inside = (((anchors[:, :2] + anchors[:, 2:]) / 2) < 64).all(1)
    classes = boxes = count = 0
    for image in range(2):
        corners = torch.tensor([[4.0, 4, 40, 36], [20, 30, 60, 62]]) if not image else torch.zeros(0, 4)
        who = assign_anchors(anchors, corners)
        row = 0
        for level in outputs:
            for y in range(level[0].shape[2]):
                for x in range(level[0].shape[3]):
                    for anchor in range(9):
                        if inside[row] and who[row] > -2:
                            truth = torch.zeros(3)
                            if who[row] >= 0:
                                truth[targets[image].labels[who[row]]] = 1
                                offsets = level[1][image, 4 * anchor : 4 * anchor + 4, y, x]
                                boxes += (offsets - encode_boxes(corners[who[row]], anchors[row])).abs().sum()
                                count += 1
                            classes += sigmoid_focal_loss(level[0][image, 3 * anchor : 3 * anchor + 3, y, x], truth).sum()
                        row += 1
    losses = model.losses(images, targets)
    torch.testing.assert_close(losses["class"], classes / count, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["box"], boxes / count, rtol=1e-4, atol=0)


def test_no_objects_objects_without_area_and_padding():
    model, images = tiny(), torch.randn(1, 3, 64, 64)
    empty = model.losses(images, [target()])
    assert empty["box"] == 0 and empty["class"] > 0
    sum(empty.values()).backward()
    flat = model.losses(images, [target((5, 5, 5, 30))])  # no area: nothing to regress to, no infinities
    assert all(value.isfinite() for value in flat.values())
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :32] = True
    assert model.losses(images, [target()], mask)["class"] < empty["class"]  # anchors of the padding do not count


def test_predictions_are_sorted_and_inside():
    torch.manual_seed(0)
    model = tiny(num_classes=3)
    mask = torch.ones(2, 64, 64, dtype=torch.bool)
    mask[1, :, 40:] = False
    found = model.predict(torch.randn(2, 3, 64, 64), mask, threshold=0.0, top=30)
    for one, width in zip(found, (64, 40)):
        assert len(one.scores) == 30 and (one.scores.diff() <= 0).all() and one.boxes[:, 2].max() <= width
        assert one.boxes.min() >= 0 and set(one.labels.tolist()) <= {0, 1, 2}
    assert model.predict(torch.randn(1, 3, 64, 64), threshold=0.9)[0].boxes.shape == (0, 4)


def test_wrong_input():
    model, images = tiny(), torch.randn(1, 3, 64, 64)
    outside = Target(torch.tensor([0]), torch.tensor([[0.9, 0.5, 0.6, 0.2]]))
    for targets, message in (([], "1 images need as many targets"), ([outside], "boxes of image 0 .* must be inside the image")):
        with pytest.raises(ValueError, match=message):
            model.losses(images, targets)
    with pytest.raises(ValueError, match="image 0 has a pixel that is not finite"):
        model.losses(images * float("nan"), [target()])
    with pytest.raises(ValueError, match="images must be"):
        model.losses(images[0], [target()])
    torch.nn.init.constant_(model.head.classes.bias, float("nan"))
    with pytest.raises(ValueError, match="the loss 'class' is not finite"):
        model.losses(images, [target()])
    for options, message in (({"convs": 0}, "convs must be an integer >= 1"), ({"frozen_stages": -1}, "frozen_stages")):
        with pytest.raises(ValueError, match=message):
            tiny(**options)


def test_named_sizes_build():
    assert set(CONFIGS) == {"retinanet_r50", "retinanet_small"}
    assert isinstance(create_model("retinanet_small"), RetinaNet)


def test_sparsify():
    model = tiny()
    sparsify(model, {"head.*_tower.*": "2:4", "*": "2:4"}, method="sr-ste")  # by default a module named head stays dense
    finalize(model)
    rows = {row.layer: row for row in sparsity_report(model)}
    assert rows["head.class_tower.0.0"].violations == 0 and str(rows["head.class_tower.0.0"].pattern) == "2:4"
    assert model(torch.randn(1, 3, 64, 64))[0][0].shape == (1, 9, 8, 8)


def test_fisher_pruning_with_a_head_used_on_every_level():
    torch.manual_seed(0)
    model, images = tiny(), torch.randn(2, 3, 64, 64)
    graph = channel_groups(model, images)
    groups = {group.name: group for group in graph.prunable}
    tower = graph.group("head.class_tower.0.0")
    assert tower.kept is None and tower.consumers == ("head.classes",) and tower.units == 8
    assert graph.group("head.classes").kept is not None  # what comes out of the network stays
    assert "backbone.layer1.0.conv1" in groups
    pruner = FisherPruner(model, images, target=0.85, interval=1, units=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(60):
        outputs = model(images)
        loss = sum(part.square().mean() for output in outputs for part in output)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        if pruner.done:
            break
    pruner.finish()
    assert pruner.remaining <= 0.86 and len(pruner.history) > 3
    logits, offsets = model(images)[0]
    assert logits.shape == (2, 9, 8, 8) and offsets.shape == (2, 36, 8, 8)
