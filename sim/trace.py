"""Waveforms of a window of cycles."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Trace"]


@dataclass(frozen=True)
class Trace:
    """What to record: an FST file of every signal, from cycle `start` to `stop` (excluded) after the program's start.

    Recording costs two orders of magnitude of speed and some KB a cycle at 1024 MACs, so keep the window short. It needs
    a build of its own, cached like the other. GTKWave and Surfer show the file; `pywellen` reads it in Python.

    Raises
    ------
    ValueError
        An empty window, or a folder that does not exist.
    """

    path: str | Path
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(f"a trace needs 0 <= start < stop, not start={self.start!r}, stop={self.stop!r}")
        if not Path(self.path).resolve().parent.is_dir():
            raise ValueError(f"the folder of the trace {str(self.path)!r} does not exist")
