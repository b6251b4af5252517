"""The rows of the benchmark through all engines: named, kept, shown."""

import json

import pytest

from benchmarks import must_run
from benchmarks.must_run import ROWS, Row, main, run_missing

GOOD = {
    "sources": "x", "macs": {"accelerator": 3_400_000}, "programs": 2, "host_share": 0.125, "cycles": 77, "counters_equal": True,
    "bytes_checked": 1234, "bit_exact": True, "results_equal": True, "cosine": 0.99876, "cosine_noisy": 0.5,
}  # fmt: skip


def row(folder, **found):
    made = Row(label="A", pattern="2:4", subject="n = 3", file=folder / "a-2of4-rtl.json", measure=lambda: found)
    made.file.unlink(missing_ok=True)
    if found:
        made.file.write_text(json.dumps(found))
    return made


def test_names_are_unique_and_files_are_those_of_the_tables():
    assert len({one.name for one in ROWS}) == len(ROWS) > 25
    assert {one.file.parent.name for one in ROWS} == {"zoo", "must_run"}
    with pytest.raises(SystemExit):
        main(["no-such-row"])


def test_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(must_run.subprocess, "run", lambda command, check: measured.append(command[-1]))
    monkeypatch.setattr(must_run, "sources", lambda: "x")
    run_missing([row(tmp_path, **GOOD)])
    assert measured == []
    for found in ({}, {"sources": "x", "error": "no"}, {"sources": "x", "cycles": 3}):
        run_missing([row(tmp_path, **found)])
    assert measured == ["a-2of4"] * 3
    monkeypatch.setattr(must_run, "sources", lambda: "others")
    run_missing([row(tmp_path, **GOOD)])
    assert len(measured) == 3
    run_missing([row(tmp_path, **GOOD)], fresh=True)
    assert len(measured) == 4
    run_missing([row(tmp_path)], minutes=-1)
    assert len(measured) == 4


def test_a_failure_is_kept_and_costs_no_other(tmp_path, capsys):
    one = row(tmp_path)
    must_run._measure_here(one)
    assert "seconds" in json.loads(one.file.read_text())
    bad = Row(label="A", pattern="2:4", subject="", file=tmp_path / "b.json", measure=lambda: {}["what"])
    must_run._measure_here(bad)
    assert "KeyError" in must_run._cells(bad)[-3] and "KeyError" in capsys.readouterr().out


def test_cells(tmp_path):
    cells = must_run._cells(row(tmp_path, **GOOD))
    assert cells == ("A", "n = 3", "2:4", 3, 2, "12.5", 77, "equal", 1234, "equal", "0.9988", "0.5000")
    for name in ("bit_exact", "results_equal"):
        assert must_run._cells(row(tmp_path, **GOOD | {name: False}))[9] == "DIFFERENT"
    assert must_run._cells(row(tmp_path, **GOOD | {"counters_equal": False}))[7] == "DIFFERENT"
