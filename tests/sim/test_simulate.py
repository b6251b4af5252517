"""`simulate`: engines, checks, results, errors (arch tiny)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import sim.check
import sim.simulate
from compiler.compile import compile_network
from compiler.program import Program
from sim.memory import MemoryModel
from sim.reference import run_reference
from sim.simulate import simulate
from tests.sim.small_network import random_input, small_network


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_network(small_network(), "tiny")


@pytest.mark.parametrize("pattern", [None, "2:4", "1:3", "5:5", "3:32"])
def test_three_way_equality(pattern: str | None) -> None:
    compiled = compile_network(small_network(pattern, seed=4), "tiny")
    for memory in (MemoryModel(), MemoryModel(latency=5, stall_probability=0.3, seed=1), MemoryModel(bytes_per_cycle=3)):
        run = simulate(compiled, random_input(1), memory=memory)
        assert run.bit_exact and run.mismatches == ()
        assert run.bytes_checked > 0
    expected = run_reference(compiled.network, {"x": random_input(1)})["y"]
    assert np.array_equal(run.outputs[0], expected)


def test_results(program: Program) -> None:
    run = simulate(program, random_input())
    assert run.cycles is not None and run.counters["cycles"] == run.cycles
    assert run.utilisation == program.effective_macs / (16 * run.cycles)
    assert run.cycles_per_s is not None and run.cycles_per_s > 0 and run.build_s is not None and run.build_s > 0
    assert run.simulator == "Verilator 5.48.0"
    text = b"y int8 (2, 9, 21)\n" + run.tensors["y"].tobytes()
    assert run.outputs_sha256 == hashlib.sha256(text).hexdigest()
    record = json.loads(json.dumps(run.to_dict()))
    assert record["arch"] == "tiny" and record["engine"] == "verilator" and record["bit_exact"] is True
    assert "bit_exact=True" in repr(run)


def test_engines_agree_and_repeat(program: Program) -> None:
    isa = simulate(program, random_input(), engine="isa")
    runs = [simulate(program, random_input(), check=False) for _ in range(2)]
    assert isa.bit_exact and isa.cycles is None and isa.utilisation is None
    assert {run.outputs_sha256 for run in (isa, *runs)} == {isa.outputs_sha256}
    assert runs[0].cycles == runs[1].cycles
    assert runs[0].bit_exact is None and runs[0].bytes_checked == 0
    assert simulate(program, random_input(), engine="isa", check=False).bit_exact is None


def test_a_wrong_reference_is_a_mismatch(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: object, inputs: object) -> dict[str, np.ndarray]:
        tensors = dict(run_reference(network, inputs))  # type: ignore[arg-type]
        tensors["hidden"] = tensors["hidden"] + 1
        return tensors

    monkeypatch.setattr(sim.simulate, "run_reference", wrong)
    for engine in ("verilator", "isa"):
        run = simulate(program, random_input(), engine=engine)  # type: ignore[arg-type]
        assert run.bit_exact is False
        assert run.mismatches[0].tensor == "hidden"


def test_progress(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    stages: list[str] = []
    simulate(program, random_input(), engine="isa", progress=lambda stage, done, end: stages.append(stage))
    assert stages[0] == "reference" and stages[-1] == "isa"
    simulate(program, random_input(), engine="isa", progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "isa: " in err


def test_errors(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown engine 'spice'; the engines are verilator, isa, reference, cycle"):
        simulate(program, random_input(), engine="spice")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the engine 'isa' needs inputs: x"):
        simulate(program, engine="isa")
    with pytest.raises(ValueError, match="has no signals to trace"):
        simulate(program, random_input(), engine="isa", trace=str(tmp_path / "x.fst"))
    with pytest.raises(ValueError, match="must have the shape"):
        simulate(program, random_input()[:1])
    with pytest.raises(ValueError, match="max_cycles must be"):
        simulate(program, random_input(), max_cycles=0)
