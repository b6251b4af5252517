import json

import pytest
import torch

from benchmarks import train_detr
from benchmarks.train_detr import Cell, Tiles, _mirrored, _optimizer, cells, evaluate, fit
from models import Target, create_model
from models.boxes import cxcywh_to_xyxy


def tiles(count):
    """Bright squares on dark ground."""
    images = torch.zeros(count, 3, 64, 64)
    boxes = []
    for number in range(count):
        left = 8 + 4 * number
        images[number, :, 20:40, left : left + 20] = 255
        boxes.append(torch.tensor([[left, 20, left + 20, 40]], dtype=torch.float32))
    return Tiles.of(images.to(torch.uint8), boxes)


def test_boxes_are_scaled_and_mirrored_with_the_images():
    data = tiles(3)
    images, targets = data.images, data.targets(range(3))
    for axes in ([False, False], [True, False], [False, True], [True, True]):
        seen, where = _mirrored(images, targets, torch.tensor(axes))
        for image, target in zip(seen, where):
            bright = (image[0] > 0).nonzero()
            expected = torch.cat([bright.min(0).values.flip(0), bright.max(0).values.flip(0) + 1]) / train_detr.SIZE
            assert torch.allclose(cxcywh_to_xyxy(target.boxes)[0], expected, atol=1e-5)
    assert isinstance(where[0], Target)


def test_a_result_counts_for_its_very_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(train_detr, "CELLS", tmp_path)
    cell = Cell("FeatAug-Flip", 1)
    assert cell.result is None
    cell.path.write_text(json.dumps({"setting": cell.setting}))
    assert cell.result is not None and Cell("FeatAug-Flip", 2).result is None
    monkeypatch.setattr(train_detr, "RATE", 1.0)
    assert cell.result is None
    assert len({cell.path for cell in cells(3)}) == len(cells(3)) == 15


def test_a_few_steps():
    torch.manual_seed(0)
    model = create_model("deformable_detr_tiny", width=4, **train_detr.MODEL, feataug="flip")
    groups = _optimizer(model, 1.0).param_groups
    assert [group["lr"] for group in groups] == [1.0, 0.1]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    losses = list(fit(model, tiles(4), steps=12, seed=0, rate=1e-3))
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert 0 <= evaluate(model, tiles(4))["ap"] <= 100


def test_arms_are_known():
    with pytest.raises(KeyError):
        _ = Cell("no such arm").setting
