import sys
from pathlib import Path

import pytest

from algo.logs import COLUMNS, RunLog, read_log


def test_rows(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "dense")
    log.row(epoch=0, step=1, loss=0.1, lr=1e-3, grad_norm=2.0)
    log.row(epoch=0, step=1, loss=0.1, lr=1e-3, score=0.5)
    log.close()
    first, second = read_log(tmp_path / "log.csv")
    assert tuple(first) == COLUMNS and first["grad_norm"] == "2.0" and first["score"] == ""
    assert float(first["loss"]) == 0.1 and second["score"] == "0.5"


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    for stage in ("dense", "sparse"):
        log = RunLog(tmp_path, stage)
        for step in range(1, 5):
            log.row(epoch=0, step=step, loss=1.0, lr=1.0)
        log.close()
    with (tmp_path / "log.csv").open("a") as file:
        file.write("sparse,0,5,1.0,")  # killed while writing
    RunLog(tmp_path, "sparse", step=2).close()
    rows = [(row["stage"], int(row["step"])) for row in read_log(tmp_path / "log.csv")]
    assert rows == [("dense", step) for step in range(1, 5)] + [("sparse", 1), ("sparse", 2)]


def test_no_log(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.csv") == []


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    log = RunLog(tmp_path, "prune to 2:4", tensorboard=True)
    log.row(epoch=0, step=1, loss=0.1, lr=1e-3)
    log.row(epoch=0, step=1, loss=0.1, lr=1e-3, score=0.5)
    log.close()
    (events,) = (tmp_path / "tensorboard" / "prune-to-2of4").iterdir()
    assert b"epoch_loss" in events.read_bytes() and b"score" in events.read_bytes()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'nmforge\[logs\]'"):
        RunLog(tmp_path, "x", tensorboard=True)
