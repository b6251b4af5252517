import itertools

import pytest
import torch
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import HungarianMatcher
from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher

from models.matcher import BoxMatcher, MaskMatcher, assign


def scene(seed, *, queries=9, objects=4, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(queries, classes, generator=generator)
    boxes = torch.rand(queries, 4, generator=generator) * 0.5 + 0.05
    labels = torch.randint(classes, (objects,), generator=generator)
    return logits, boxes, labels, torch.rand(objects, 4, generator=generator) * 0.5 + 0.05


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("focal", [False, True])
def test_boxes_are_matched_as_by_transformers(seed, focal):
    logits, boxes, labels, targets = scene(seed, objects=seed)  # 0 objects, and as many as queries
    kind = DeformableDetrHungarianMatcher if focal else HungarianMatcher
    reference = kind(class_cost=2, bbox_cost=5, giou_cost=2)
    outputs = {"logits": logits[None], "pred_boxes": boxes[None]}
    expected = reference(outputs, [{"class_labels": labels, "boxes": targets}])[0]
    ours = BoxMatcher(class_weight=2, focal=focal)(logits, boxes, labels, targets)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("seed", range(5))
def test_masks_are_matched_as_by_transformers(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, masks = torch.randn(6, 4, generator=generator), 3 * torch.randn(6, 5, 7, generator=generator)
    labels, targets = torch.randint(3, (seed + 1,), generator=generator), torch.rand(seed + 1, 5, 7, generator=generator) > 0.6
    reference = MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=1.0)
    expected = reference(masks[None], logits[None], [targets.float()], [labels])[0]
    ours = MaskMatcher()(logits, masks, labels, targets)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_no_other_assignment_is_cheaper():
    cost = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    rows, columns = assign(cost)
    best = min(sum(cost[row, column] for column, row in enumerate(chosen)) for chosen in itertools.permutations(range(5), 3))
    assert cost[rows, columns].sum().item() == pytest.approx(best.item())


def test_no_objects_no_pairs():
    rows, columns = BoxMatcher()(*scene(0, objects=0))
    assert rows.shape == columns.shape == (0,) and rows.dtype == columns.dtype == torch.int64


def test_more_objects_than_predictions():
    rows, columns = BoxMatcher()(*scene(1, queries=2, objects=6))
    assert rows.tolist() == [0, 1] and len(set(columns.tolist())) == 2


def test_costs_that_are_no_numbers_are_refused():
    logits, boxes, labels, targets = scene(0)
    boxes[2, 1] = float("nan")
    with pytest.raises(ValueError, match="the cost of prediction 2 for object 0 is nan"):
        BoxMatcher()(logits, boxes, labels, targets)


def test_masks_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"one size, not \(4, 4\) and \(8, 8\): resize"):
        MaskMatcher()(torch.zeros(2, 3), torch.zeros(2, 4, 4), torch.tensor([0]), torch.zeros(1, 8, 8))
