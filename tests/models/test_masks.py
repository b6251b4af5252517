import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import MaskFormerImageProcessor
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput

from models.boxes import box_area
from models.masks import (
    best_instances,
    check_masks,
    instance_masks,
    masks_to_boxes,
    pairwise_dice,
    pairwise_mask_iou,
    resize_masks,
    semantic_map,
    semantic_masks,
    semantic_scores,
)


def random_masks(count, height, width, seed=0, share=0.3):
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) < share


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 4), st.integers(0, 3))
def test_resizing_is_torchs(sizes, count):
    height, width, *size = sizes
    masks = random_masks(count, height, width, seed=sum(sizes))
    nearest = resize_masks(masks, size)
    assert nearest.dtype == torch.bool and nearest.shape == (count, *size)
    smooth = resize_masks(masks.float()[None], size)
    assert smooth.shape == (1, count, *size)
    if count:
        assert torch.equal(nearest.float(), F.interpolate(masks.float()[None], size=tuple(size))[0])
        assert torch.allclose(smooth, F.interpolate(masks.float()[None], size=tuple(size), mode="bilinear"))
    labels = masks.long() * (2**53 + 1)  # no float holds that number
    assert torch.equal(resize_masks(labels, size), nearest.long() * (2**53 + 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 8), st.integers(1, 8), st.floats(0, 1), st.integers(0, 99))
def test_overlaps_by_counting(n, m, height, width, share, seed):
    a, b = random_masks(n, height, width, seed, share), random_masks(m, height, width, seed + 1, share)
    iou, dice = pairwise_mask_iou(a, b), pairwise_dice(a, b)
    assert iou.shape == dice.shape == (n, m)
    for i in range(n):
        for j in range(m):
            shared, union = int((a[i] & b[j]).sum()), int((a[i] | b[j]).sum())
            total = int(a[i].sum() + b[j].sum())
            assert iou[i, j].item() == pytest.approx(shared / union if union else 0, abs=1e-6)
            assert dice[i, j].item() == pytest.approx(2 * shared / total if total else 0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.floats(0, 0.5), st.integers(0, 99))
def test_boxes_around_masks(count, height, width, share, seed):
    masks = random_masks(count, height, width, seed, share)
    boxes = masks_to_boxes(masks)
    assert boxes.shape == (count, 4) and boxes.dtype == torch.float32
    for mask, box in zip(masks.numpy(), boxes):
        rows, columns = np.nonzero(mask)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
        assert box.tolist() == expected and box_area(box) >= mask.sum()


def test_masks_of_maps():
    labels = torch.tensor([[0, 7, 7], [3, 0, 7]])
    masks = instance_masks(labels)
    assert masks.tolist() == [[[False, False, False], [True, False, False]], [[False, True, True], [False, False, True]]]
    assert instance_masks(torch.zeros(2, 3, dtype=torch.long)).shape == (0, 2, 3)
    classes, masks = semantic_masks(labels, ignore=7)
    assert classes.tolist() == [0, 3] and masks.sum((1, 2)).tolist() == [2, 1]
    assert semantic_masks(torch.full((2, 2), -1))[1].shape == (0, 2, 2)


def predictions(seed=0, queries=6, classes=3):
    torch.manual_seed(seed)
    return torch.randn(2, queries, classes + 1) * 3, torch.randn(2, queries, 8, 10) * 2


@pytest.mark.parametrize("size", [None, (19, 23)])
def test_semantic_maps_equal_transformers(size):
    logits, masks = predictions()
    output = MaskFormerForInstanceSegmentationOutput(class_queries_logits=logits, masks_queries_logits=masks)
    sizes = None if size is None else [size] * 2
    expected = MaskFormerImageProcessor().post_process_semantic_segmentation(output, target_sizes=sizes)
    assert torch.equal(semantic_map(logits, masks, size), torch.stack(expected))
    assert semantic_scores(logits, masks).shape == (2, 3, 8, 10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [None, (19, 23)])
def test_instances_equal_transformers(size, seed):
    logits, masks = predictions(seed)
    output = MaskFormerForInstanceSegmentationOutput(class_queries_logits=logits, masks_queries_logits=masks)
    expected = MaskFormerImageProcessor().post_process_instance_segmentation(
        output, threshold=0.3, target_sizes=[size or (8, 10)] * 2, return_binary_maps=True
    )
    found = best_instances(logits, masks, size, threshold=0.3)
    assert sum(map(len, (image.scores for image in found)))
    for ours, theirs in zip(found, expected, strict=True):
        rows = sorted(theirs["segments_info"], key=lambda row: -row["score"])
        assert ours.scores.tolist() == pytest.approx([row["score"] for row in rows], abs=1e-5)
        assert ours.labels.tolist() == [row["label_id"] for row in rows]
        for mask, row in zip(ours.masks, rows):
            assert torch.equal(mask, theirs["segmentation"][row["id"]].bool())


def test_no_instances():
    logits, masks = predictions()
    found = best_instances(logits, masks - 100, (5, 5))
    assert [image.masks.shape for image in found] == [(0, 5, 5)] * 2 and found[0].scores.shape == found[0].labels.shape == (0,)


def test_wrong_use():
    masks = random_masks(2, 3, 4, share=1.1)
    check_masks(masks, height=3, width=4)
    check_masks(masks[:0], height=3, width=4)
    with pytest.raises(TypeError, match="masks must be a bool tensor, not torch.float32"):
        check_masks(masks.float(), height=3, width=4)
    with pytest.raises(TypeError, match="masks of image 1 must be a bool tensor, not list"):
        check_masks([], height=3, width=4, name="masks of image 1")
    with pytest.raises(ValueError, match=r"masks must be \(N, 4, 3\), not \(2, 3, 4\)"):
        check_masks(masks, height=4, width=3)
    masks[1] = False
    with pytest.raises(ValueError, match="masks must hold a pixel each; mask 1 is empty: leave it out"):
        check_masks(masks, height=3, width=4)
    with pytest.raises(ValueError, match=r"masks must have one size, not \(3, 4\) and \(4, 4\): resize one of them"):
        pairwise_dice(masks, torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match="masks cannot be resized to 0 x 3 pixels"):
        resize_masks(masks, (0, 3))
