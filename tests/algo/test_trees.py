import importlib.metadata

import pytest
import torch

from algo import trees
from algo.data import package_file
from algo.trees import cut_tiles, tree_images, tree_tiles


def installed():
    try:
        importlib.metadata.distribution("deepforest")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_data = pytest.mark.skipif(not installed(), reason="run: pip install --no-deps deepforest==2.1.0")


@needs_data
def test_images_are_the_published_ones():
    (first, first_boxes), (second, second_boxes) = tree_images()
    assert first.shape == (3, 2472, 2299) and second.shape == (3, 1035, 1249) and first.dtype == torch.uint8
    assert first_boxes.shape == (574, 4) and second_boxes.shape == (279, 4)
    # The package has a table of some of the second image's boxes as well; two of them were drawn anew since.
    table = package_file("deepforest", "example.csv").read_text().splitlines()[1:]
    listed = {tuple(float(side) for side in row.split(",")[1:5]) for row in table}
    assert len(listed) == 79 and len(listed & {tuple(box) for box in second_boxes.tolist()}) == 77
    for image, boxes in tree_images():
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
        assert boxes[:, 2].max() <= image.shape[2] and boxes[:, 3].max() <= image.shape[1]


@needs_data
@pytest.mark.parametrize("size", [128, 256])
def test_split_shares_no_pixel(size):
    train, test = tree_tiles(size=size, stride=size // 2)
    assert len(train.images) == len(train.boxes) and len(test.images) == len(test.boxes)
    assert train.images.shape[1:] == test.images.shape[1:] == (3, size, size)
    held = {tile.numpy().tobytes() for tile in test.images}
    assert len(held) == len(test.images)
    # The lowest rows of the training part and the first rows held out are next to each other, in both images.
    for image, _ in tree_images():
        border = image.shape[1] - size * -int(-image.shape[1] * 0.3 // size)
        rows = {row.numpy().tobytes() for tile in test.images for row in tile[0]}
        assert image[0, border, :size].numpy().tobytes() in rows
        assert image[0, border - 1, :size].numpy().tobytes() not in rows
        below = {row.numpy().tobytes() for tile in train.images for row in tile[0]}
        assert image[0, border, :size].numpy().tobytes() not in below
    for part in (train, test):
        assert all((b >= 0).all() and (b <= size).all() and (b[:, 2:] > b[:, :2]).all() for b in part.boxes)
        assert sum(len(b) for b in part.boxes) > 200


def test_boxes_are_moved_clipped_and_left_out():
    image = torch.arange(3 * 8 * 8).view(3, 8, 8).to(torch.uint8)
    boxes = torch.tensor([[1.0, 1, 3, 3], [3, 0, 6, 2], [0, 3, 4, 8]])
    tiles = cut_tiles(image, boxes, rows=(0, 8), size=4, stride=4, visible=0.5)
    assert torch.equal(tiles.images[1], image[:, :4, 4:])
    # The second box is by a third in the first tile, by two thirds in the second; the third by 1/5 and 4/5 above and below.
    assert [b.tolist() for b in tiles.boxes] == [[[1, 1, 3, 3]], [[0, 0, 2, 2]], [[0, 0, 4, 4]], []]
    every = cut_tiles(image, boxes, rows=(0, 8), size=4, stride=4, visible=0)
    assert [len(b) for b in every.boxes] == [3, 1, 1, 0]
    assert cut_tiles(image, boxes[:0], rows=(0, 8), size=4, stride=2).images.shape == (9, 3, 4, 4)
    assert cut_tiles(image, boxes, rows=(0, 3), size=4, stride=4).images.shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size must be an integer >= 16, not 8"),
        ({"stride": 0}, "stride must be in 1..256, not 0"),
        ({"stride": 257}, "stride must be in 1..256, not 257"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1, not 1.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        tree_tiles(**options)


@needs_data
def test_wrong_visible_and_too_large_tiles():
    with pytest.raises(ValueError, match="visible must be in 0..1, not 2"):
        tree_tiles(visible=2)
    with pytest.raises(ValueError, match="tiles of size 2000 with held_out 0.3 leave a part without tiles"):
        tree_tiles(size=2000)


def test_damaged_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"no image")
    monkeypatch.setattr(trees, "package_file", lambda package, name: tmp_path / "file")
    tree_images.cache_clear()
    with pytest.raises(ValueError, match="file is not the published file .checksum differs.: run  pip install --force-reinstall"):
        tree_images()


def test_absent_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    tree_images.cache_clear()
    with pytest.raises(FileNotFoundError, match="run  pip install --no-deps deepforest==2.1.0"):
        tree_images()
