"""Reports: what they hold, what they refuse, and where operators belong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from compiler.compile import compile_network
from compiler.program import Program
from sim.report import RunView, layer_and_kind, render, run_record, write_report
from sim.simulate import simulate
from tests.sim.small_network import random_input, small_network


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_network(small_network(), "tiny")


@pytest.fixture(scope="module")
def record(program: Program) -> dict[str, Any]:
    return json.loads(json.dumps(run_record(program, simulate(program, random_input()))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("source", "kind", "expected"),
    [
        ("layers.0.attention.query", "linear", ("layer 0", "Q, K, V")),
        ("layers.11.attention", "attention", ("layer 11", "attention")),
        ("bert.encoder.layers.3.attention.output", "linear", ("layer 3", "attention output")),
        ("blocks.2.up", "linear", ("block 2", "up")),
        ("0", "linear", ("layer 0", "linear")),
        ("head", "pointwise", ("network", "head")),
        ("", "linear", ("network", "op")),
    ],
)
def test_layer_and_kind(source: str, kind: str, expected: tuple[str, str]) -> None:
    assert layer_and_kind({"source": source, "name": "op", "kind": kind}) == expected


def test_record_adds_up(program: Program, record: dict[str, Any]) -> None:
    view = RunView("run", "#000000", record)
    assert sum(operator["cycles"] for operator in record["operators"]) == record["cycles"] == view.cycles
    assert sum(sum(kinds.values()) for kinds in view.by_layer().values()) == view.cycles
    assert sum(dense for dense, _ in view.storage().values()) == program.weight_bytes[0] == 2 * 13 * 21
    assert view.arch == program.arch
    assert sum(view.traffic.values()) % program.arch.bus_bytes == 0
    assert all(unit.busy <= unit.cycles for unit in view.units)


def test_page_of_a_run(record: dict[str, Any]) -> None:
    page = render(record)
    assert "bit-exact" in page and f"{record['cycles']:,}" in page and record["outputs_sha256"] in page
    assert page.count("<svg") == 5
    assert "<script" not in page and not re.search(r'(src|href)="https?://', page)
    assert page == render(record)


def test_page_without_time(program: Program) -> None:
    for check in (True, False):
        page = render(run_record(program, simulate(program, random_input(), engine="isa", check=check)))
        assert page.count("<svg") == 1 and ("not checked" in page) is not check


def test_page_of_the_cycle_engine_says_so(program: Program) -> None:
    page = render(run_record(program, simulate(program, engine="cycle")))
    assert "not checked" in page and "counted in RTL" not in page and 'class="badge bad"' not in page


def test_page_of_a_mismatch(record: dict[str, Any]) -> None:
    page = render({**record, "bit_exact": False, "mismatches": ["RTL against ISA engine: y[0] is <3>"]})
    assert "NOT bit-exact" in page and "y[0] is &lt;3&gt;" in page


def test_write_and_errors(record: dict[str, Any], tmp_path: Path) -> None:
    write_report(record, tmp_path / "deep" / "report.html")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match="not kind='something'"):
        render({"kind": "something"})
    with pytest.raises(ValueError, match="a field of the summary is missing: 'operators'"):
        render({name: value for name, value in record.items() if name != "operators"})
    with pytest.raises(ValueError, match="not of this version of nmforge: .*outputs_sha256"):
        render({name: value for name, value in record.items() if name != "outputs_sha256"})
