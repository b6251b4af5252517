import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.boxes import pairwise_iou
from models.roi import nms, pyramid_level, pyramid_roi_align, roi_align


def bilinear(features, y, x):
    """A sample of (C, H, W); 0 when more than a cell outside."""
    height, width = features.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(len(features))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = features[:, top, left] * (1 - x + left) + features[:, top, right] * (x - left)
    lower = features[:, bottom, left] * (1 - x + left) + features[:, bottom, right] * (x - left)
    return upper * (1 - y + top) + lower * (y - top)


def slow_roi_align(features, box, size, scale, ratio):
    """RoIAlign of one box as it is defined, sample by sample."""
    left, top, right, bottom = (side * scale - 0.5 for side in box.tolist())
    high, wide = (bottom - top) / size, (right - left) / size
    rows, columns = (ratio, ratio) if ratio else (math.ceil(high), math.ceil(wide))
    result = torch.zeros(len(features), size, size)
    for i in range(size):
        for j in range(size):
            for r in range(rows):
                for c in range(columns):
                    y, x = top + (i + (r + 0.5) / rows) * high, left + (j + (c + 0.5) / columns) * wide
                    result[:, i, j] += bilinear(features, y, x)
    return result / max(rows * columns, 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 2]), st.sampled_from([1, 3, 7]), st.sampled_from([1.0, 0.25]))
def test_roi_align_equals_its_definition(seed, ratio, size, scale):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 3, 6, 9, generator=generator)
    low = torch.rand(4, 2, generator=generator) * 12 - 3  # some reach out of the map or lie outside of it
    sides = torch.rand(4, 2, generator=generator) * torch.tensor([[0.0], [2], [8], [14]])
    boxes, image = torch.cat([low, low + sides], 1) / scale, torch.tensor([0, 1, 1, 0])
    pooled = roi_align(features, boxes, image, size=size, scale=scale, sampling_ratio=ratio)
    for box, number, one in zip(boxes, image, pooled):
        torch.testing.assert_close(one, slow_roi_align(features[number], box, size, scale, ratio), rtol=1e-4, atol=1e-4)


def test_roi_align_gradient_and_empty_boxes():
    features = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.3, 0.2, 4.1, 3.9], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    image = torch.zeros(2, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, image, size=2), features)
    assert roi_align(features, boxes, image)[1].abs().max() == 0  # no area, no samples
    assert roi_align(features, boxes[:0], image[:0]).shape == (0, 2, 7, 7)


def test_roi_align_refuses():
    features = torch.randn(1, 2, 5, 5)
    with pytest.raises(ValueError, match=r"boxes must be \(1, 4\), one for each entry of image, not \(2, 4\)"):
        roi_align(features, torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"image must be in 0..0, not 1..1"):
        roi_align(features, torch.zeros(1, 4), torch.ones(1, dtype=torch.int64))


def test_levels_of_boxes():
    sides = torch.tensor([0.0, 50, 111, 113, 223, 225, 500, 5000])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1)
    assert pyramid_level(boxes, levels=4).tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    maps = [torch.full((1, 2, 80, 80), float(level)) for level in range(4)]
    inside = boxes.clamp(max=600)
    pooled = pyramid_roi_align(maps, inside[1:], torch.zeros(7, dtype=torch.int64), strides=[8, 8, 8, 8], size=2)
    assert pooled[:, 0, 0, 0].round().tolist() == [0, 0, 1, 1, 2, 3, 3]


def slow_nms(boxes, scores, threshold, labels):
    iou, kept = pairwise_iou(boxes, boxes), []
    for number in sorted(range(len(boxes)), key=lambda row: -float(scores[row])):
        if all(iou[number, other] <= threshold or labels[number] != labels[other] for other in kept):
            kept.append(number)
    return kept


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.integers(1, 4), st.booleans())
def test_nms_equals_a_loop(seed, count, threshold, classes, ties):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 20
    boxes = torch.cat([low, low + torch.rand(count, 2, generator=generator) * 20], 1)
    scores = torch.rand(count, generator=generator)
    scores = (scores * 5).floor() if ties else scores
    labels = torch.randint(classes, (count,), generator=generator)
    assert nms(boxes, scores, threshold=threshold, labels=labels).tolist() == slow_nms(boxes, scores, threshold, labels)
    assert nms(boxes, scores, threshold=threshold).tolist() == slow_nms(boxes, scores, threshold, [0] * count)
    assert nms(boxes, scores, threshold=threshold, limit=3).tolist() == slow_nms(boxes, scores, threshold, [0] * count)[:3]


def test_nms_of_a_chain():
    # Each overlaps the next: every other one stays, which takes as many rounds as there are boxes.
    low = torch.arange(40.0)
    boxes = torch.stack([low, torch.zeros(40), low + 1.5, torch.ones(40)], 1)
    assert nms(boxes, -low, threshold=0.1).tolist() == list(range(0, 40, 2))


@pytest.mark.parametrize("limit", [None, 3, 9])
def test_nms_in_blocks_is_that_of_the_whole(monkeypatch, limit):
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(70, 2, generator=generator) * 20
    boxes = torch.cat([low, low + torch.rand(70, 2, generator=generator) * 20], 1)
    scores, labels = torch.rand(70, generator=generator), torch.randint(2, (70,), generator=generator)
    whole = nms(boxes, scores, threshold=0.3, labels=labels, limit=limit)
    for block in (1, 7, 69):
        monkeypatch.setattr("models.roi.BLOCK", block)
        assert torch.equal(nms(boxes, scores, threshold=0.3, labels=labels, limit=limit), whole)


def test_nms_refuses_a_threshold():
    with pytest.raises(ValueError, match="threshold must be in 0..1, not 2"):
        nms(torch.zeros(1, 4), torch.zeros(1), threshold=2)
