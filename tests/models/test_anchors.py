import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.anchors import assign_anchors, cell_anchors, decode_boxes, encode_boxes, grid_points, level_anchors
from models.boxes import pairwise_iou


def test_anchors_of_a_cell():
    anchors = cell_anchors(8)
    sides = anchors[:, 2:] - anchors[:, :2]
    assert anchors.shape == (9, 4) and torch.equal(anchors[:, :2], -anchors[:, 2:])
    torch.testing.assert_close(sides.prod(1), torch.tensor([32.0**2 * 4 ** (k / 3) for k in range(3)]).repeat(3))
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1, 2]).repeat_interleave(3))


def test_places():
    assert grid_points((2, 3), 4).tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]
    assert grid_points((1, 2), 4, offset=0.5).tolist() == [[2, 2], [6, 2]]
    anchors = level_anchors((2, 3), 4, torch.tensor([[-1.0, -1, 1, 1], [-2, -2, 2, 2]]))
    assert anchors.shape == (12, 4) and anchors[3].tolist() == [2, -2, 6, 2]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_offsets_return(seed):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(2, 20, 2, generator=generator) * 50
    boxes, anchors = torch.cat([low, low + 1 + 40 * torch.rand(2, 20, 2, generator=generator)], -1)
    for deviations in ((1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)):
        offsets = encode_boxes(boxes, anchors, deviations=deviations)
        torch.testing.assert_close(decode_boxes(offsets, anchors, deviations=deviations), boxes, rtol=1e-4, atol=1e-3)


def test_offsets_by_hand_and_their_limit():
    anchor = torch.tensor([[0.0, 0, 10, 20]])
    offsets = encode_boxes(torch.tensor([[5.0, 0, 25, 20]]), anchor, deviations=(0.1, 0.1, 0.2, 0.2))
    torch.testing.assert_close(offsets, torch.tensor([[10.0, 0, math.log(2) / 0.2, 0]]))
    huge = decode_boxes(torch.tensor([[0.0, 0, 1e4, -1e4]]), anchor)
    torch.testing.assert_close(huge[:, 2:] - huge[:, :2], torch.tensor([[625.0, 0.32]]))


def slow_assignment(anchors, boxes):
    iou = pairwise_iou(anchors, boxes)
    result = []
    for row in iou:
        best = float(row.max())
        result.append(int(row.argmax()) if best >= 0.5 else -1 if best < 0.4 else -2)
    for number in range(len(boxes)):
        for anchor in range(len(anchors)):
            if iou[anchor, number] == iou[:, number].max() > 0:
                result[anchor] = number
    return result


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_assignment_equals_a_loop(seed, count):
    generator = torch.Generator().manual_seed(seed)
    anchors = level_anchors((4, 5), 8, cell_anchors(8, base=2, scales=1))
    low = torch.randint(0, 24, (count, 2), generator=generator).float()
    boxes = torch.cat([low, low + torch.randint(1, 24, (count, 2), generator=generator)], 1)
    assert assign_anchors(anchors, boxes).tolist() == slow_assignment(anchors, boxes)


def test_no_objects_and_far_objects():
    anchors = level_anchors((2, 2), 8, cell_anchors(8))
    assert set(assign_anchors(anchors, torch.zeros(0, 4)).tolist()) == {-1}
    assert set(assign_anchors(anchors, torch.tensor([[900.0, 900, 910, 910], [5, 5, 5, 5]])).tolist()) == {-1}


@pytest.mark.parametrize("count", [1, 3])
def test_every_object_has_an_anchor(count):
    anchors = level_anchors((8, 8), 8, cell_anchors(8))
    boxes = torch.tensor([[3.0, 3, 6, 6], [20, 20, 22, 60], [40, 8, 44, 12]])[:count]
    assert set(range(count)) <= set(assign_anchors(anchors, boxes).tolist())
