"""The curves of a run: a CSV file that is always whole, and TensorBoard if asked for.

A run that is resumed drops what an interrupted one wrote after its last checkpoint, so the curve is that of a run that was
never stopped; only the column ``seconds`` tells.
"""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

__all__ = ["COLUMNS", "RunLog", "read_log"]

COLUMNS = ("stage", "epoch", "step", "loss", "lr", "grad_norm", "score", "seconds")
"""``step`` counts optimiser steps that are done; ``score`` is there at the end of an epoch, ``loss`` then the epoch's mean."""


class RunLog:
    """The log of one stage.

    Parameters
    ----------
    folder
        ``log.csv`` is in it, shared by all stages of a run, and ``tensorboard/<stage>``.
    stage
        Its name in the log.
    step
        Steps that are done: later rows of this stage are dropped.
    tensorboard
        Also write TensorBoard events.

    Raises
    ------
    ImportError
        ``tensorboard`` without the package tensorboardX.
    """

    def __init__(self, folder: Path, stage: str, *, step: int = 0, tensorboard: bool = False) -> None:
        self.stage = stage
        self.started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.csv"
        _keep(path, [row for row in read_log(path) if row["stage"] != stage or int(row["step"]) <= step])
        self._file = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, COLUMNS)
        self._board = _board(folder / "tensorboard" / stage.replace(" ", "-").replace(":", "of"), step) if tensorboard else None

    def row(self, *, epoch: int, step: int, loss: float, lr: float, **more: float) -> None:
        """Write one row; ``more`` is ``grad_norm`` or ``score``."""
        values = {"loss": loss, "lr": lr, **more}
        place: dict[str, Any] = {"stage": self.stage, "epoch": epoch, "step": step}
        seconds = round(time.monotonic() - self.started, 3)
        self._rows.writerow(place | {name: repr(value) for name, value in values.items()} | {"seconds": seconds})
        self._file.flush()
        if self._board is not None:
            if "score" in values:
                values["epoch_loss"] = values.pop("loss")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log by column; none if there is no file. A half-written last line is left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("seconds") and None not in row and row["step"].isdecimal()]


def _keep(path: Path, rows: list[dict[str, str]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _board(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError(
            "TensorBoard logs need the package tensorboardX: pip install 'nmforge[logs]', or set run.tensorboard to false"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
