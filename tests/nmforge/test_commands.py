"""What the commands do, without the command line (which tests/nmforge/test_cli.py covers)."""

from pathlib import Path

import pytest

import nmforge.sources
from compiler.compile import compile_network
from hw.arch import get_arch
from nmforge.commands import _sizes, build_program, run_program
from nmforge.errors import BadInputError
from nmforge.sentiment import SentimentConfig
from sim.memory import MemoryModel
from tests.nmforge.tiny_demo import model
from tests.sim.small_network import small_network


def test_sizes_of_the_training() -> None:
    plain = SentimentConfig()
    assert _sizes(None, None, None) == plain
    changed = _sizes(3, 2, 100)
    assert (changed.dense.epochs, changed.idp.train.epochs, changed.sentences) == (3, 2, 100)
    assert changed.dense.lr == plain.dense.lr and changed.idp.train.lr == plain.idp.train.lr


def test_a_program_for_another_arch(tmp_path: Path) -> None:
    path = tmp_path / "x.nmf"
    compile_network(small_network(), "tiny").save(path)
    options = {"engine": "isa", "inputs": None, "outputs": None, "check": True, "memory": MemoryModel(), "trace": None, "seed": 0}
    _, run = run_program(path, arch=get_arch("tiny"), **options)  # type: ignore[arg-type]
    assert run.bit_exact
    with pytest.raises(BadInputError, match=r"x.nmf was compiled for tiny, not for sta256: compile it again"):
        run_program(path, arch=get_arch("sta256"), **options)  # type: ignore[arg-type]


def test_more_tokens_than_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmforge.sources, "create_model", lambda *_, **__: model().bert)
    with pytest.warns(UserWarning), pytest.raises(BadInputError, match="length must be <= 512, the positions"):
        build_program(
            "tinybert_4", tmp_path / "x.nmf", pattern=None, arch=get_arch("tiny"), batch=1, length=513, pretrained=False,
            calibration=2, listing=None, seed=0,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
