"""What a command says: progress on stderr, its result on stdout, and errors as one paragraph."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nmforge.errors import CheckFailedError

__all__ = ["Report", "Stages", "err", "guarded", "out", "progress_bars", "reporter", "write_bytes", "write_text"]

Report = Callable[[str, int, "int | None"], None]
"""Called with a stage, how far it is, and its end if that is known."""

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130

Command = TypeVar("Command", bound=Callable[..., Any])


def out() -> Console:
    """For results."""
    return Console(highlight=False)


def err() -> Console:
    """For progress, warnings and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def guarded(command: Command) -> Command:
    """Run a command: its dict goes to stdout as JSON with ``as_json``; errors that a person can act on become exit codes.

    A command returns its result (JSON values) after printing it for people unless ``as_json``. With ``NMFORGE_DEBUG=1`` errors
    keep their traceback.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        as_json = bool(kwargs.get("as_json"))
        with _short_warnings():
            try:
                result = command(*args, **kwargs)
            except KeyboardInterrupt:
                err().print("[yellow]interrupted[/]: what is finished is kept; the same command goes on from there")
                raise typer.Exit(INTERRUPTED) from None
            except Exception as error:
                if os.environ.get("NMFORGE_DEBUG") or (code := _exit_code(error)) is None:
                    raise
                _complain(error, as_json)
                raise typer.Exit(code) from None
        if as_json:
            print(json.dumps(result, indent=2), flush=True)

    return wrapper  # type: ignore[return-value]


def _exit_code(error: Exception) -> int | None:
    """Exit code of an error that a person can act on; None for one that only a programmer can."""
    if isinstance(error, CheckFailedError):
        return FAILED
    if isinstance(error, ValueError | OSError | ImportError):
        return WRONG_USE
    # By name: the classes live in modules that need not be loaded for this.
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"ToolMissingError", "AcceleratorError", "IsaError"}:
        return WRONG_USE
    return FAILED if names & {"HarnessError", "BuildError", "CycleLimitError", "SynthesisError", "RankMismatchError"} else None


def _complain(error: Exception, as_json: bool) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    err().print(Text("error: ", style="bold red") + Text(text))
    if as_json:
        found = error.result if isinstance(error, CheckFailedError) else {}
        print(json.dumps({**found, "error": {"kind": type(error).__name__, "message": text}}, indent=2), flush=True)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings of nmforge as one line; those that libraries raise about themselves not at all."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            err().print(Text("warning: ", style="yellow") + Text(str(message)))

        warnings.showwarning = show
        yield


def progress_bars() -> Progress:
    """Bars on stderr with counts and times; tasks have a field ``note``."""
    return Progress(
        TextColumn("  {task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True),
    )  # fmt: skip


def reporter(progress: Progress, labels: Mapping[str, str] | None = None, totals: Mapping[str, int] | None = None) -> Report:
    """A callback that shows each stage as a bar.

    Parameters
    ----------
    labels
        What a stage is called on the screen.
    totals
        Expected ends of stages that do not know their own.
    """
    tasks: dict[str, TaskID] = {}
    shown: dict[str, float] = {}

    def report(stage: str, done: int, end: int | None) -> None:
        end = end if end is not None else (totals or {}).get(stage)
        if stage not in tasks:
            if tasks:
                _finish(progress, list(tasks.values())[-1])
            tasks[stage] = progress.add_task((labels or {}).get(stage, stage), total=end, note="")
        now = time.monotonic()
        if done != end and now - shown.get(stage, 0.0) < 0.05:
            return
        shown[stage] = now
        progress.update(tasks[stage], completed=done, total=None if end is None else max(end, done))

    return report


def _finish(progress: Progress, task: TaskID) -> None:
    """Show a task as done, whether it said so itself or not."""
    done = max(1, int(next(other.completed for other in progress.tasks if other.id == task)))
    progress.update(task, completed=done, total=done)


class Stages:
    """Numbered stages of a long command, each with its bars and its time."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds: dict[str, float] = {}
        self._console = err()

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[Progress]:
        """Announce a stage; its seconds are kept under `name`."""
        self._console.print(f"[bold cyan]\\[{len(self.seconds) + 1}/{self.total}][/] [bold]{escape(title)}[/]")
        start = time.monotonic()
        with progress_bars() as progress:
            yield progress
        self.seconds[name] = round(time.monotonic() - start, 2)

    def say(self, text: str) -> None:
        """A line under the present stage."""
        self._console.print(Text(f"      {text}"), style="dim")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, making its folder."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
