import pytest
import torch

from models.dense import image_sizes, select_detections


def test_sizes_of_images():
    mask = torch.zeros(2, 8, 10, dtype=torch.bool)
    mask[0, :5, :7] = True
    mask[1] = True
    assert image_sizes(torch.zeros(2, 3, 8, 10), mask).tolist() == [[7, 5], [10, 8]]
    assert image_sizes(torch.zeros(1, 3, 8, 10)).tolist() == [[10, 8]]
    with pytest.raises(ValueError, match="image 1 has a pixel that is not finite"):
        image_sizes(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), float("inf"))]))


def test_selection():
    boxes = [torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9.5]]), torch.tensor([[5.0, 5, 30, 30]])]
    scores = [torch.tensor([[0.9, 0.3], [0.8, 0.01]]), torch.tensor([[0.02, 0.6]])]
    found = select_detections(boxes, scores, torch.tensor([20.0, 25.0]))
    # (box 0, class 0), (box 2, class 1), (box 0, class 1); box 1 overlaps box 0 in class 0, the rest is below 0.05
    assert found.scores.tolist() == pytest.approx([0.9, 0.6, 0.3]) and found.labels.tolist() == [0, 1, 1]
    assert found.boxes.tolist() == [[0, 0, 10, 10], [5, 5, 20, 25], [0, 0, 10, 10]]
    assert select_detections(boxes, scores, torch.tensor([20.0, 25.0]), top=1).scores.tolist() == pytest.approx([0.9])
    assert len(select_detections(boxes, scores, torch.tensor([20.0, 25.0]), before=1).scores) == 2
    assert len(select_detections(boxes, scores, torch.tensor([20.0, 25.0]), threshold=0.95).scores) == 0
