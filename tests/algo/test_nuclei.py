import importlib.metadata

import pytest
import torch

from algo import nuclei
from algo.nuclei import NUCLEI_CLASSES, cut_nuclei, nuclei_image, nuclei_tiles, semantic_classes


def installed():
    try:
        importlib.metadata.distribution("stardist")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_data = pytest.mark.skipif(not installed(), reason="run: pip install --no-deps stardist==0.9.2")


@needs_data
def test_image_is_the_published_one():
    image, instances = nuclei_image()
    assert image.shape == (1, 512, 512) and image.dtype == torch.uint8 and image.max() == 235
    assert instances.shape == (512, 512) and instances.dtype == torch.int64
    assert len(instances.unique()) == 126 and (instances > 0).sum() / instances.numel() == pytest.approx(0.199, abs=1e-3)
    assert image[0][instances > 0].float().mean() > 2 * image[0][instances == 0].float().mean()  # nuclei are bright


@needs_data
@pytest.mark.parametrize("size", [32, 64, 100])
def test_split_shares_no_pixel(size):
    image, instances = nuclei_image()
    train, test = nuclei_tiles(size=size, stride=size // 2)
    border = 512 - size * -(-512 // (4 * size))
    inside = (512 - size) // (size // 2) + 1
    assert len(train.images) == inside * ((border - size) // (size // 2) + 1)
    assert len(test.images) == (512 // size) * ((512 - border) // size)
    for part in (train, test):
        assert part.images.shape[1:] == (1, size, size) and part.classes.shape == part.instances.shape == part.images[:, 0].shape
        assert set(part.classes.unique().tolist()) == set(range(len(NUCLEI_CLASSES)))
        assert torch.equal(part.classes > 0, part.instances > 0)
    assert torch.equal(train.images[0, 0], image[0, :size, :size])
    assert torch.equal(test.images[0, 0], image[0, :size, border : border + size])
    top, left = (inside - 1) * (size // 2), (border - size) // (size // 2) * (size // 2)
    assert torch.equal(train.instances[-1], instances[top : top + size, left : left + size]) and left + size <= border
    top, left = (512 // size - 1) * size, border + ((512 - border) // size - 1) * size
    assert torch.equal(test.instances[-1], instances[top : top + size, left : left + size])


def test_border_is_where_the_number_changes():
    numbers = torch.zeros(5, 7, dtype=torch.int64)
    numbers[1:4, 1:4], numbers[1:4, 4:7] = 3, 2**40  # they touch; the second reaches the edge of the image
    assert semantic_classes(numbers).tolist() == [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 2, 2, 2, 2, 2, 2],
        [0, 2, 1, 2, 2, 1, 1],
        [0, 2, 2, 2, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_cutting():
    image, numbers = torch.arange(24).view(1, 4, 6).to(torch.uint8), torch.zeros(4, 6, dtype=torch.int64)
    numbers[0, 2] = 9
    tiles = cut_nuclei(image, numbers, columns=(2, 6), size=2, stride=2)
    assert tiles.images[:, 0].tolist() == [[[2, 3], [8, 9]], [[4, 5], [10, 11]], [[14, 15], [20, 21]], [[16, 17], [22, 23]]]
    assert tiles.instances[0].tolist() == [[9, 0], [0, 0]] and tiles.instances[1:].sum() == 0 and tiles.classes[0, 0, 0] == 2


@needs_data
def test_wrong_use(monkeypatch):
    for options, message in (
        ({"size": 8}, r"size must be an integer in 16\.\.256, not 8"), ({"size": 300}, r"in 16\.\.256, not 300"),
        ({"stride": 0}, r"stride must be in 1\.\.64, not 0"), ({"held_out": 1.0}, "held_out must be between 0 and 1, not 1.0"),
        ({"size": 256, "held_out": 0.6}, "leave nothing to train on"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            nuclei_tiles(**options)
    with pytest.raises(ValueError, match="no tile of size 99 fits into 4 rows and 3 columns"):
        cut_nuclei(torch.zeros(1, 4, 6), torch.zeros(4, 6, dtype=torch.int64), columns=(0, 3), size=99, stride=1)
    nuclei_image.cache_clear()
    monkeypatch.setitem(nuclei._FILES, "mask2d.tif", "0")
    with pytest.raises(ValueError, match="mask2d.tif is not the published file .* --no-deps stardist==0.9.2"):
        nuclei_image()
    nuclei_image.cache_clear()
