"""Real sentences with real ratings: the movie reviews of the VADER study.

10,605 sentences from rottentomatoes.com, each rated from -4 (negative) to 4 (positive) by 20 people; the
rating is their mean. They are in the source distribution of vaderSentiment 3.3.2 (not in its wheel), in a tar
file inside the tar file.

Ref: C. J. Hutto, E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis, ICWSM 2014.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CACHE", "FETCH_COMMAND", "Sentence", "movie_ratings", "movie_sentences"]

Sentence = tuple[str, int]
"""Text, and 1 for positive or 0 for negative."""

CACHE = Path(".cache/nmforge")
FETCH_COMMAND = (
    f"pip download --no-deps --no-build-isolation --no-binary vaderSentiment -d {CACHE} vaderSentiment==3.3.2"
)
"""What puts the data where `movie_ratings` looks; it needs setuptools installed."""

_TEXT = "movieReviewSnippets_GroundTruth.txt"
_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_MEMBER = f"hutto_ICWSM_2014/{_TEXT}"
_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"


def movie_sentences(*, seed: int = 0, test_size: int = 2000) -> tuple[list[Sentence], list[Sentence]]:
    """Give the sentences with a clear opinion, |rating| >= 0.5, split into training and test.

    Parameters
    ----------
    seed
        Decides the split; the same seed gives the same split on every machine and Python version.
    test_size
        Sentences held out, >= 1.

    Returns
    -------
    tuple[list, list]
        (text, label) for training and for test, shuffled. No text is in both.

    Raises
    ------
    FileNotFoundError
        The data is nowhere; the message has the command that fetches it.
    ValueError
        The file is not the published one, or ``test_size`` leaves nothing to train on.
    """
    clear = {text: int(rating > 0) for rating, text in movie_ratings() if abs(rating) >= 0.5}
    sentences = sorted(clear.items())
    if not 1 <= test_size < len(sentences):
        raise ValueError(f"test_size must be in 1..{len(sentences) - 1}, not {test_size!r}")
    # Sorting by a keyed hash rather than random.shuffle, whose algorithm may change between Python versions.
    sentences.sort(key=lambda pair: hashlib.sha256(f"{seed}\0{pair[0]}".encode()).digest())
    return sentences[test_size:], sentences[:test_size]


def movie_ratings() -> list[tuple[float, str]]:
    """Give all 10,605 (rating, text) pairs in file order; errors as for `movie_sentences`."""
    where, raw = _read()
    if hashlib.sha256(raw).hexdigest() != _SHA256:
        raise ValueError(
            f"{where} is not the published {_TEXT} (checksum differs): delete it, then {FETCH_COMMAND}"
        )
    rows = (line.split("\t", 2) for line in raw.decode("utf-8").splitlines())
    return [(float(rating), text.strip()) for _, rating, text in rows]


def _folders() -> Iterator[Path]:
    """Where the data may be: NMFORGE_DATA, the cache under the current folder, the cache of this
    repository."""
    if "NMFORGE_DATA" in os.environ:
        yield Path(os.environ["NMFORGE_DATA"])
    yield Path.cwd() / CACHE
    yield Path(__file__).resolve().parent.parent / CACHE


def _candidates() -> Iterator[Path]:
    for folder in _folders():
        yield folder / _TEXT
        yield folder / _ARCHIVE
    try:
        files = importlib.metadata.files("vaderSentiment") or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield from (Path(str(file.locate())) for file in files if file.name == _TEXT)


def _read() -> tuple[Path, bytes]:
    for path in _candidates():
        if path.is_file():
            return path, _from_archive(path) if path.name == _ARCHIVE else path.read_bytes()
    looked = ", ".join(str(folder) for folder in _folders())
    raise FileNotFoundError(f"no movie sentences ({_ARCHIVE} or {_TEXT}) in {looked}: run  {FETCH_COMMAND}")


def _from_archive(path: Path) -> bytes:
    try:
        inner = _member(path.read_bytes(), _INNER)
        return _member(inner, _MEMBER)
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, then {FETCH_COMMAND}") from None


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        if file is None:
            raise KeyError(f"{name} is not a file")
        return file.read()
