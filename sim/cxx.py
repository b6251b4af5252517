"""The C++ compiler: found, run, its results kept in the cache."""

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = ["BuildError", "ToolMissingError", "find_cxx", "locked", "printed_by", "run_tool"]


class ToolMissingError(RuntimeError):
    """A program that simulation needs is not installed; the message says what to install."""


class BuildError(RuntimeError):
    """Verilator or the C++ compiler refused its input; the message ends with what it printed."""


def find_cxx() -> str:
    """Path of the compiler: ``$CXX`` or g++.

    Raises
    ------
    ToolMissingError
        It is not installed.
    """
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise ToolMissingError(
            f"the C++ compiler {name!r} was not found: install it with `apt-get install g++`, or name another in $CXX"
        )
    return found


def printed_by(*command: str) -> str:
    """What a command prints on stdout."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def run_tool(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """Run a compiler in a folder.

    Raises
    ------
    BuildError
        It fails.
    """
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{Path(command[0]).name} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-4000:]}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the build lock of a cache entry, so that two processes do not build it twice."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
