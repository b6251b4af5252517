import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.loss.loss_for_object_detection import generalized_box_iou as reference_giou

from models.boxes import (
    box_area,
    check_boxes,
    clip_boxes,
    crop_boxes,
    cxcywh_to_xyxy,
    flip_boxes,
    paired_giou,
    paired_iou,
    pairwise_giou,
    pairwise_iou,
    xyxy_to_cxcywh,
)


def random_boxes(count, seed, size=100.0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, count, 2, generator=generator) * size
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1)


def pixels(box, size):
    grid = torch.zeros(size, size, dtype=torch.bool)
    x1, y1, x2, y2 = box
    grid[y1:y2, x1:x2] = True
    return grid


sides = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted)
corner_boxes = st.builds(lambda x, y: (x[0], y[0], x[1], y[1]), sides, sides)


@given(corner_boxes, corner_boxes)
def test_areas_and_overlaps_are_those_of_the_pixels(a, b):
    grid_a, grid_b = pixels(a, 12), pixels(b, 12)
    shared, union = int((grid_a & grid_b).sum()), int((grid_a | grid_b).sum())  # their quotient in double precision
    first, second = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    assert box_area(first).item() == grid_a.sum()
    assert paired_iou(first, second).item() == pytest.approx(shared / union if union else 0.0)
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    expected = (shared / union if union else 0.0) - ((hull - union) / hull if hull else 0.0)
    assert paired_giou(first, second).item() == pytest.approx(expected, abs=1e-12)


def test_all_pairs_equal_the_reference():
    a, b = random_boxes(7, 0), random_boxes(5, 1)
    assert torch.allclose(pairwise_giou(a, b), reference_giou(a, b), atol=1e-6)
    assert torch.equal(pairwise_iou(a, b).diagonal(), paired_iou(a[:5], b))
    assert pairwise_iou(a, b[:0]).shape == (7, 0)


def test_notations_are_inverse():
    boxes = random_boxes(9, 2)
    assert torch.allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes, atol=1e-4)
    assert xyxy_to_cxcywh(torch.tensor([[1.0, 2.0, 5.0, 4.0]])).tolist() == [[3.0, 3.0, 4.0, 2.0]]


def test_gradients_of_boxes_without_area_are_finite():
    boxes = torch.zeros(2, 4, requires_grad=True)
    paired_giou(boxes, torch.zeros(2, 4)).sum().backward()
    assert boxes.grad.isfinite().all()


@given(corner_boxes)
def test_flip_moves_the_pixels_and_is_its_own_inverse(box):
    boxes = torch.tensor([box], dtype=torch.float64)
    flipped = flip_boxes(boxes, width=12)
    assert torch.equal(pixels(box, 12).flip(1), pixels(flipped[0].int().tolist(), 12))
    assert torch.equal(flip_boxes(flipped, width=12), boxes)


@given(corner_boxes)
def test_crop_cuts_the_pixels_and_drops_by_centre(box):
    boxes = torch.tensor([box], dtype=torch.float64)
    cropped, keep = crop_boxes(boxes, (2, 3, 10, 11))
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    cut = pixels(box, 12)[3:11, 2:10]
    assert keep.item() == (2 <= cx < 10 and 3 <= cy < 11 and bool(cut.any()))
    assert len(cropped) == int(keep) and (not len(cropped) or torch.equal(pixels(cropped[0].int().tolist(), 8), cut))


def test_clip():
    boxes = torch.tensor([[-3.0, 1.0, 20.0, 5.0], [30.0, 30.0, 40.0, 40.0]])
    assert clip_boxes(boxes, height=4, width=10).tolist() == [[0.0, 1.0, 10.0, 4.0], [10.0, 4.0, 10.0, 4.0]]


def test_a_window_must_have_an_area():
    with pytest.raises(ValueError, match=r"a window must be .*, not \(3, 0, 3, 5\)"):
        crop_boxes(torch.zeros(1, 4), (3, 0, 3, 5))


@pytest.mark.parametrize(
    ("boxes", "error", "message"),
    [
        ([[0, 0, 1, 1]], TypeError, "trees must be a floating-point tensor, not list"),
        (torch.zeros(2, 4, dtype=torch.int64), TypeError, "trees must be a floating-point tensor, not torch.int64"),
        (torch.zeros(4), ValueError, r"trees must be \(N, 4\), not \(4,\)"),
        (torch.tensor([[0.0, 0, 1, 1], [0, 0, float("nan"), 1]]), ValueError, "must be finite; box 1 is"),
        (torch.tensor([[3.0, 0, 1, 1]]), ValueError, r"x2 >= x1 and y2 >= y1; box 0 is \[3.0, 0.0, 1.0, 1.0\]"),
        (torch.tensor([[0.0, 0, 11, 1]]), ValueError, "inside the image, 10 wide and 8 high: clip them; box 0"),
    ],
)
def test_wrong_boxes_are_refused(boxes, error, message):
    with pytest.raises(error, match=message):
        check_boxes(boxes, height=8, width=10, name="trees")


def test_no_boxes_are_right():
    check_boxes(torch.zeros(0, 4), height=8, width=10)
    check_boxes(torch.tensor([[0.0, 0.0, 10.0, 8.0]]), height=8, width=10)
