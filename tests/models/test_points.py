import pytest
import torch

from models.detection import Detections, Target
from models.points import PointTarget, check_points, choose_annotated, pseudo_target, sample_points


def entry(*points, labels=None):
    labels = torch.zeros(len(points), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return PointTarget(labels, torch.tensor(points, dtype=torch.float).view(-1, 2))


def test_points_lie_in_their_boxes_less_an_edge():
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.2, 0.3, 0.1, 0.4]])
    generator = torch.Generator().manual_seed(0)
    target = Target(torch.tensor([1, 0]), boxes)
    drawn = [sample_points(target, generator=generator) for _ in range(2000)]
    places = (torch.stack([one.points for one in drawn]) - boxes[:, :2]) / boxes[:, 2:]
    assert torch.equal(drawn[0].labels, target.labels)
    low, high = places.amin((0, 1)), places.amax((0, 1))
    assert (low >= -0.4901).all() and (low < -0.485).all() and (high <= 0.4901).all() and (high > 0.485).all()
    assert places.mean((0, 1)).abs().max() < 0.03
    again = sample_points(target, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.points, drawn[0].points)
    assert sample_points(Target(target.labels[:0], boxes[:0])).points.shape == (0, 2)


def test_choice_of_annotated_images():
    chosen = choose_annotated(97, ratio=0.1, seed=3)
    assert chosen.dtype == torch.bool and chosen.sum() == 9
    assert torch.equal(chosen, choose_annotated(97, ratio=0.1, seed=3))
    assert not torch.equal(chosen, choose_annotated(97, ratio=0.1, seed=4))
    assert choose_annotated(5, ratio=0).sum() == 0 and choose_annotated(5, ratio=1).all()


@pytest.mark.parametrize(("images", "ratio"), [(0, 0.5), (3, 1.5), (3, -0.1)])
def test_wrong_choice(images, ratio):
    with pytest.raises(ValueError, match=f"images must be >= 1 and ratio in 0..1, not {images} and {ratio}"):
        choose_annotated(images, ratio=ratio)


def test_pseudo_targets():
    boxes = torch.tensor([[10.0, 10, 30, 50], [0, 0, 20, 20], [5, 5, 5, 9]])
    found = Detections(torch.tensor([0.9, 0.2, 0.8]), torch.tensor([2, 1, 0]), boxes)
    target = pseudo_target(found, height=100, width=50)
    assert target.labels.tolist() == [2, 1]  # the third has no area
    torch.testing.assert_close(target.boxes[0], torch.tensor([0.4, 0.3, 0.4, 0.4]))
    assert pseudo_target(found, height=100, width=50, threshold=0.5).labels.tolist() == [2]


def test_pixels_become_fractions():
    places = PointTarget.from_pixels(torch.tensor([0]), torch.tensor([[10.0, 20]]), height=40, width=40).points
    assert places.tolist() == [[0.25, 0.5]]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "1 images need as many entries of points, not 0"),
        ([entry((0.5, 1.5))], r"point 0 of image 0 must be in the image, 0 to 1, not \[0.5, 1.5\]"),
        ([entry((0.5, 0.5), (float("nan"), 0))], r"point 1 of image 0 must be in the image"),
        ([entry((0.5, 0.5), labels=[3])], r"labels of image 0 must be in 0 to 2, not \[3\]"),
        ([entry((0.5, 0.5), labels=[0, 1])], r"image 0 has labels \(2,\) for points \(1, 2\)"),
    ],
)
def test_wrong_points(points, message):
    with pytest.raises(ValueError, match=message):
        check_points(points, images=1, classes=3)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="labels of image 0 must be int64, not torch.float32"):
        check_points([PointTarget(torch.zeros(1), torch.zeros(1, 2))], images=1, classes=3)
