"""Exit codes and progress."""

from pathlib import Path

import pytest
import typer

from nmforge.console import Stages, guarded, progress_bars, reporter, write_text
from nmforge.errors import BadInputError, CheckFailedError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInputError("no"), 2),
        (FileNotFoundError(2, "No such file or directory", "x"), 2),
        (CheckFailedError("different", {"a": 1}), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NMFORGE_DEBUG", raising=False)

    @guarded
    def command(as_json: bool = False) -> None:
        raise error

    with pytest.raises(typer.Exit) as stopped:
        command(as_json=True)
    assert stopped.value.exit_code == code


def test_a_bug_keeps_its_traceback() -> None:
    @guarded
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()


def test_reporter_finishes_what_went_before() -> None:
    with progress_bars() as progress:
        report = reporter(progress, {"a": "first"}, {"b": 4})
        report("a", 0, None)
        report("b", 9, None)
        first, second = progress.tasks
        assert first.description == "first" and first.finished
        assert second.total == 9


def test_stages(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(2)
    with stages.stage("one", "The [first] stage"):
        pass
    stages.say("done [x]")
    assert set(stages.seconds) == {"one"}
    assert "[1/2] The [first] stage" in capsys.readouterr().err


def test_write_text_leaves_nothing_behind(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "text")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a" / "c.txt", "\ud800")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]
