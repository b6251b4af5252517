"""The main job on a small budget."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nmforge.demo
from nmforge.demo import DemoConfig, run_demo
from nmforge.tables import print_summary
from sim.verilator import ToolMissingError
from tests.nmforge.tiny_demo import config, data, model


def run(folder: Path, *, fresh: bool = False, **changes: Any) -> dict[str, Any]:
    return run_demo(config(folder, **changes), data=data(), model=model(), fresh=fresh)


@pytest.fixture(scope="module", autouse=True)
def steady_sources() -> Iterator[None]:
    """As if nobody edited the code while the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nmforge.demo, "_source_key", lambda: "the same")
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished demo on Verilator."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(folder, engine="verilator")


def test_summary_has_what_the_issue_asks_for(first: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = first
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["bit_exact"] is True and set(summary["patterns"].values()) == {"2:4"}
    assert {"float_dense", "float_sparse", "int8_sparse"} <= set(summary["accuracy"])
    assert set(summary["cycles"]) == set(summary["utilisation"]) == {"dense", "sparse"}
    assert summary["sparse_speedup"] == summary["cycles"]["dense"] / summary["cycles"]["sparse"] > 1
    assert 1.5 < summary["ideal_speedup"] < 2
    assert summary["bytes"]["dense_int8"] == 4 * 16 * 16 + 2 * 16 * 32 > summary["bytes"]["compressed"]
    assert {"seconds_per_sentence", "threads", "torch"} <= set(summary["cpu"])
    assert {"clock_mhz_assumed", "seconds_per_sentence"} <= set(summary["accelerator"])
    assert {"version", "cycles_per_s", "build_s"} <= set(summary["simulator"])
    assert summary["wall_s"] > 0
    assert all(Path(path).stat().st_size > 1000 for path in summary["files"].values())


def test_operators_share_all_cycles(first: tuple[Path, dict[str, Any]]) -> None:
    for record in first[1]["runs"].values():
        assert sum(operator["cycles"] for operator in record["operators"]) == record["cycles"]
        assert all(operator["cycles"] > 0 for operator in record["operators"])


def test_sentences_have_different_lengths(first: tuple[Path, dict[str, Any]]) -> None:
    rows = first[1]["sentences"]
    assert len(rows) == 3 and len({row["tokens"] for row in rows}) == 3
    assert all(abs(row["positive_float"] - row["positive_accelerator"]) < 0.1 for row in rows)


def test_report_and_table(first: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, summary = first
    page = (folder / "report.html").read_text()
    assert "bit-exact" in page and "&lt;b&gt;sentence" in page and "<script" not in page
    print_summary(summary)
    printed = capsys.readouterr().out
    assert "speed-up" in printed and str(folder / "report.html") in printed


def test_second_run_reuses_and_fresh_does_not(first: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = first
    again = run(folder, engine="verilator")
    assert again["reused"] == ["compile-sparse", "compile-dense", "accuracy", "simulate-sparse", "simulate-dense"]
    assert again["cycles"] == summary["cycles"] and again["accuracy"] == summary["accuracy"]
    (folder / "sparse.nmf").write_bytes(b"altered")
    mended = run(folder, engine="verilator")
    assert mended["reused"] == ["compile-dense", "accuracy", "simulate-sparse", "simulate-dense"]


def test_mix_of_patterns_without_verilator(tmp_path: Path) -> None:
    summary = run(tmp_path, pattern="*.attention.*=1:4,*.up=2:8")
    assert set(summary["patterns"].values()) == {"1:4", "2:8"}
    assert not any(name.endswith("down") for name in summary["patterns"])
    assert summary["bit_exact"] is True and summary["cycles"] == {"sparse": None, "dense": None}
    assert (tmp_path / "report.html").is_file()
    fresh = run(tmp_path, pattern="*.attention.*=1:4,*.up=2:8", fresh=True)
    assert fresh["reused"] == [] and fresh["training"]["stages"][0]["seconds"] > 0


def test_a_pattern_without_a_layer_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match=r"no Linear or convolution layer matches 'bert.encoder.\*.foo'"):
        run(folder, pattern="*.foo=2:4")
    assert not folder.exists()


def test_missing_tools_are_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise ToolMissingError("the C++ compiler 'g++' was not found")

    monkeypatch.setattr(nmforge.demo, "verilator_version", missing)
    with pytest.raises(ToolMissingError):
        run(tmp_path / "out", engine="verilator")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["batch", "length", "test_size", "calibration"])
def test_sizes_are_checked(tmp_path: Path, name: str) -> None:
    settings = vars(config(tmp_path))
    with pytest.raises(ValueError, match=f"{name} must be >= 1, not 0"):
        DemoConfig(**{**settings, name: 0})


def test_sentences_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="length must be <= 512, the positions of the model, not 513"):
        run(tmp_path / "out", length=513)
    with pytest.raises(ValueError, match=r"only \d+ of 30 sentences fit 4 tokens: 20 are wanted"):
        run(tmp_path / "out", length=4, batch=20)
    assert not (tmp_path / "out").exists()
