import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from algo.folders import Transform, hugging_face, image_folder, open_image

Image = pytest.importorskip("PIL.Image")


def picture(path: Path, width: int = 20, height: int = 10, colour: tuple[int, int, int] = (255, 0, 0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)
    return path


def test_folder(tmp_path: Path) -> None:
    for name in ("dog/2.png", "dog/1.jpg", "cat/x.png"):
        picture(tmp_path / "train" / name)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    found = image_folder(tmp_path, "train")
    assert found.classes == ("cat", "dog") and found.labels == [0, 1, 1]
    assert [path.name for path in found.files] == ["x.png", "1.jpg", "2.png"]
    picture(tmp_path / "test" / "dog" / "3.png")
    assert image_folder(tmp_path, "test", classes=found.classes).labels == [1]


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder .*test: images are expected in .*train/CLASS/"):
        image_folder(tmp_path, "test")
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"empty has no images \(.bmp"):
        image_folder(tmp_path, "train")
    with pytest.raises(ValueError, match="has a class 'empty' that the training images do not have"):
        image_folder(tmp_path, "train", classes=("a",))
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="has no folders"):
        image_folder(tmp_path, "test")


def test_centre_of_an_image() -> None:
    image = Image.fromarray(np.dstack([np.tile(np.arange(80, dtype=np.uint8), (64, 1))] * 3))
    pixels = Transform(size=14)(image, 0)
    assert pixels.shape == (3, 14, 14) and pixels.dtype == torch.float32
    grey = pixels[0] * 0.229 + 0.485  # the middle 56 of 80 columns: 12..67
    assert grey[0, 0] * 255 == pytest.approx(13.5, abs=1) and grey[0, -1] * 255 == pytest.approx(65.5, abs=1)


def test_augmentation_is_decided_by_seed_and_place() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8))
    change = Transform(size=8, augment=True, seed=1)
    assert torch.equal(change(image, 3), change(image, 3))
    assert not torch.equal(change(image, 3), change(image, 4))
    assert not torch.equal(change(image, 3), Transform(size=8, augment=True, seed=2)(image, 3))


def test_damaged_image(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    assert open_image(path).size == (20, 10)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="a.png is no whole image"):
        open_image(path)


def test_hugging_face_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'nmforge\[hf\]'"):
        hugging_face(tmp_path, "train")


def test_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "d"))
    assert hugging_face(tmp_path / "d", "train")["text"][0] == "a"
    with pytest.raises(ValueError, match="has no split 'valid': it has train, test"):
        hugging_face(tmp_path / "d", "valid")
    rows.save_to_disk(str(tmp_path / "one"))
    with pytest.raises(ValueError, match="holds one split only"):
        hugging_face(tmp_path / "one", "train")
    with pytest.raises(FileNotFoundError, match="no folder"):
        hugging_face(tmp_path / "none", "train")
