import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as reference
from sklearn.metrics import jaccard_score

from algo.segmentation import SegmentationScore, confusion_matrix


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 60), st.integers(0, 999), st.sampled_from([None, -1, 0]))
def test_equals_scikit_learn(classes, pixels, seed, ignore):
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randint(classes, (pixels,), generator=generator)
    truth = torch.randint(min(ignore or 0, 0), classes, (pixels,), generator=generator)
    counted = torch.ones(pixels, dtype=torch.bool) if ignore is None else truth != ignore
    matrix = confusion_matrix(predicted, truth, classes, ignore=ignore)
    assert matrix.dtype == torch.int64 and matrix.shape == (classes, classes) and matrix.sum() == counted.sum()
    if not counted.any():
        return
    a, b = truth[counted].numpy(), predicted[counted].numpy()
    assert matrix.tolist() == reference(a, b, labels=range(classes)).tolist()
    score = SegmentationScore(classes, ignore=ignore)
    score.add(predicted[: pixels // 2], truth[: pixels // 2])
    score.add(predicted[pixels // 2 :], truth[pixels // 2 :])
    report, present = score.report(), sorted({*a.tolist(), *b.tolist()})
    expected = jaccard_score(a, b, labels=present, average=None)
    assert [report.iou[number] for number in present] == pytest.approx(expected.tolist())
    assert all(math.isnan(report.iou[number]) for number in range(classes) if number not in present)
    assert report.mean_iou == pytest.approx(expected.mean()) and report.accuracy == pytest.approx((a == b).mean())
    assert report.pixels == len(a)


def test_maps_of_any_shape():
    truth = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.uint8)
    matrix = confusion_matrix(torch.tensor([[[0, 1], [0, 1]]]), truth, 2)
    assert matrix.tolist() == [[1, 0], [1, 2]]


def test_nothing_to_measure():
    score = SegmentationScore(2, ignore=0)
    score.add(torch.zeros(0, 4, 4, dtype=torch.long), torch.zeros(0, 4, 4, dtype=torch.long))
    score.add(torch.ones(2, 2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long))
    report = score.report()
    assert report.pixels == 0 and math.isnan(report.mean_iou) and math.isnan(report.accuracy) and all(map(math.isnan, report.iou))


def test_wrong_use():
    maps = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"predicted and truth must have one shape, not \(3,\) and \(2,\)"):
        confusion_matrix(maps, maps[:2], 3)
    with pytest.raises(ValueError, match=r"predicted must be in 0\.\.1, not 0\.\.2"):
        confusion_matrix(maps, maps.clamp(max=1), 2)
    with pytest.raises(ValueError, match=r"truth must be in 0\.\.1, not 0\.\.2"):
        confusion_matrix(maps.clamp(max=1), maps, 2)
    with pytest.raises(ValueError, match=r"predicted must be in 0\.\.2, not -1\.\.1"):
        confusion_matrix(maps - 1, maps, 3, ignore=9)
    with pytest.raises(TypeError, match="predicted must be whole numbers of classes, not torch.float32"):
        confusion_matrix(maps.float(), maps, 3)
    with pytest.raises(TypeError, match="truth must be whole numbers of classes, not torch.bool"):
        confusion_matrix(maps, maps > 0, 3)
    with pytest.raises(ValueError, match="classes must be an integer >= 1, not 0"):
        SegmentationScore(0)
