"""The command line: exit codes, JSON, and that bad input leaves nothing behind."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import nmforge.commands
import nmforge.demo
import nmforge.sources
import nmforge.whole
import sim.simulate
from compiler.compile import compile_network
from nmforge.cli import app
from sim.verilator import ToolMissingError
from tests.nmforge.tiny_demo import config, data, model
from tests.sim.small_network import small_network

COMMANDS = ["demo", "models", "train", "verify", "compile", "simulate", "report", "verilog", "synth"]


def nmforge_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """What a refused command says: exit code 2, one paragraph, no traceback."""
    result = nmforge_command(*arguments)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    assert result.stdout == "" or "--json" in arguments
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "x.nmf"
    compile_network(small_network(), "tiny").save(path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    result = nmforge_command(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout and f"nmforge {command}" in result.stdout and "--json" in result.stdout


def test_root() -> None:
    assert all(command in nmforge_command("--help").stdout for command in COMMANDS)
    assert nmforge_command("--version").stdout.strip() == nmforge.__version__
    assert nmforge_command("simulate").exit_code == 2
    assert nmforge_command("frobnicate").exit_code == 2
    assert nmforge_command("demo", "--sentences", "0").exit_code == 2


def test_models() -> None:
    rows = json.loads(nmforge_command("models", "minilm_l6", "--json").stdout)["models"]
    (minilm,) = rows
    assert list(minilm) == ["name", "family", "params", "macs", "activations", "input_shape", "paper", "weights"]
    assert (minilm["params"], minilm["input_shape"], minilm["paper"]) == (22565376, {"input_ids": [1, 128]}, "2002.10957")
    printed = nmforge_command("models", "--family", "minilm").stdout
    assert "minilm_l6" in printed and "22.57 M" in printed and "resnet" not in printed
    assert nmforge_command("models", "minilm", "--markdown").stdout.startswith("# Counts\n")
    assert nmforge_command("models", "--family", "bertt").exit_code == 2


# -- compile, simulate, report ----------------------------------------------------------------------------------------


def test_compile_simulate_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmforge.sources, "create_model", lambda *_, **__: model().bert)
    path = tmp_path / "x.nmf"
    result = nmforge_command(
        "compile", "tinybert_4", "-p", "1:4", "--arch", "tiny", "--batch", 2, "--length", 5, "--calibration", 2, "-o", path,
        "--listing", tmp_path / "x.txt", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "warning: calibrated on random tokens" in result.stderr
    facts = json.loads(result.stdout)
    assert facts["arch"] == "tiny" and facts["operators"] == 7 and facts["weight_bytes"] < facts["weight_bytes_dense"]
    assert (tmp_path / "x.txt").read_text().count("TILE") > 7
    outputs = tmp_path / "out.npz"
    result = nmforge_command("simulate", path, "--engine", "isa", "--outputs", outputs, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    keys = ("engine", "arch", "cycles", "utilisation", "bit_exact", "outputs_sha256", "counters", "wall_s", "cycles_per_s")
    assert set(keys) <= set(record)
    assert record["engine"] == "isa" and record["bit_exact"] is True
    with np.load(outputs) as file:
        assert [file[name].shape for name in file.files] == [(2, 5, 16)]
    (tmp_path / "run.json").write_text(result.stdout)
    report = nmforge_command("report", tmp_path / "run.json", "-o", tmp_path / "run.html", "--json")
    assert report.exit_code == 0 and (tmp_path / "run.html").stat().st_size == json.loads(report.stdout)["bytes"]


def test_whole_network_on_host_and_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nmforge.whole, "create_model", lambda *_, **__: model().bert)
    path = tmp_path / "x.nmf"
    options = ("--whole", "--arch", "tiny", "--batch", 2, "--length", 5, "-o", path)
    result = nmforge_command("compile", "tinybert_4", *options, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["programs"] == 1 and facts["host_operators"] == 3 and facts["macs_host"] == 0
    assert "3 operators with 0 MACs on the host" in nmforge_command("compile", "tinybert_4", *options).stdout.replace("\n", " ")
    places = json.loads(nmforge_command("report", path, "--json").stdout)
    assert {row["place"] for row in places["rows"]} == {"host", "accelerator"} and places["host_share"] == 0
    table = nmforge_command("report", path).stdout
    assert "embedding.default" in table and "a look-up, no arithmetic" in table
    run = nmforge_command("simulate", path, "--engine", "isa", "--outputs", tmp_path / "out.npz", "--json")
    assert run.exit_code == 0, run.output
    record = json.loads(run.stdout)
    assert record["bit_exact"] is True and record["places"]["macs"]["host"] == 0
    with np.load(tmp_path / "out.npz") as file:
        assert [file[name].shape for name in file.files] == [(2, 5, 16)]
    forbidden = nmforge_command("compile", "tinybert_4", *options, "--host", "forbid")
    assert forbidden.exit_code == 2 and "a look-up, no arithmetic" in forbidden.output.replace("\n", " ")
    assert nmforge_command("compile", "tinybert_4", *options, "--host", "never").exit_code == 2
    assert nmforge_command("compile", tmp_path / "none.onnx", "-o", path).exit_code == 2


def test_simulate_cycle(program: Path) -> None:
    result = nmforge_command("simulate", program, "--engine", "cycle", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["cycles"] > 0 and record["outputs_sha256"] is None and record["bit_exact"] is None
    assert nmforge_command("simulate", program, "--engine", "cycle").exit_code == 0


def test_simulate_verilator(program: Path, tmp_path: Path) -> None:
    plain = nmforge_command("simulate", program, "--json")
    assert plain.exit_code == 0, plain.output
    stalled = nmforge_command("simulate", program, "--json", "--stalls", 0.3, "--latency", 9, "--bandwidth", 4)
    first, second = json.loads(plain.stdout), json.loads(stalled.stdout)
    assert first["bit_exact"] and second["bit_exact"] and first["outputs_sha256"] == second["outputs_sha256"]
    assert second["cycles"] > first["cycles"] > 0 and second["memory"]["stall_probability"] == 0.3
    assert "cycles" in nmforge_command("simulate", program, "--no-check").stdout


def test_a_failed_check_is_exit_code_1(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sim.simulate.run_reference

    def wrong(network: Any, inputs: Any) -> dict[str, Any]:
        return {name: values + 1 for name, values in real(network, inputs).items()}

    monkeypatch.setattr(sim.simulate, "run_reference", wrong)
    result = nmforge_command("simulate", program, "--engine", "isa", "--json")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["bit_exact"] is False and record["error"]["message"].startswith("not bit-exact: ISA engine against")


# -- bad input --------------------------------------------------------------------------------------------------------


def test_unknown_names() -> None:
    assert "unknown model or folder 'minilm': did you mean minilm_l6 or" in refused("compile", "minilm", "-o", "x.nmf")
    assert "unknown arch preset 'sta1025': did you mean sta1024" in refused("verilog", "sta1025")
    assert "unknown arch preset" in refused("demo", "--arch", "big")
    assert "did you mean 2:4?" in refused("demo", "--pattern", "4:2")
    assert "did you mean 1:4?" in refused("train", "-p", "1of4")
    assert not Path("x.nmf").exists()


def test_errors_as_json() -> None:
    result = nmforge_command("demo", "--pattern", "5:4", "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == 2 and error["kind"] == "BadInputError" and "N must be <= M, not 5 > 4" in error["message"]


def test_bad_folders(tmp_path: Path) -> None:
    assert "holds no finished model" in refused("compile", tmp_path, "-o", tmp_path / "x.nmf")
    assert "does not exist" in refused("compile", "tinybert_4", "-o", tmp_path / "no" / "x.nmf")
    assert "no summary at" in refused("report", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bad_summaries(tmp_path: Path) -> None:
    bad = tmp_path / "summary.json"
    bad.write_text("{")
    assert "is damaged" in refused("report", bad)
    bad.write_text('{"kind": "nmforge demo", "pattern": "2:4"}')
    assert "a field of the summary is missing: 'runs'" in refused("report", bad)
    bad.write_text("{}")
    assert "not kind=None" in refused("report", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_bad_program_files(program: Path, tmp_path: Path) -> None:
    whole = program.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:200] + b"XYZ" + whole[203:], b""):
        program.write_bytes(damage)
        assert str(program) in refused("simulate", program)
    newer = tmp_path / "newer.nmf"
    with zipfile.ZipFile(newer, "w") as archive:
        archive.writestr("manifest.json", json.dumps({"kind": "nmforge program", "format_version": 99}))
    assert str(newer) in refused("simulate", newer)
    assert "No such file" in refused("simulate", tmp_path / "none.nmf")


def test_bad_inputs(program: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "in.npz"
    np.savez(wrong, x=np.zeros((2, 9, 22), np.int8))
    out = tmp_path / "out.npz"
    assert "must have the shape (2, 9, 21), not (2, 9, 22)" in refused(
        "simulate", program, "--inputs", wrong, "--engine", "isa", "--outputs", out
    )
    assert "was compiled for tiny, not for sta256" in refused("simulate", program, "--arch", "sta256")
    assert "must be in 0..0.95" in refused("simulate", program, "--stalls", 3)
    assert "did you mean verilator" in refused("simulate", program, "--engine", "verilato")
    assert "has no data" in refused("simulate", program, "--engine", "cycle", "--outputs", out)
    assert "no signals to trace" in refused("simulate", program, "--engine", "isa", "--trace", tmp_path / "x.fst")
    assert "0 <= start < stop" in refused("simulate", program, "--trace", tmp_path / "x.fst", "--from", 5, "--to", 5)
    assert "outputs are written to" in refused("simulate", program, "--outputs", tmp_path / "out.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "x.nmf"]


def test_a_malformed_program_names_the_instruction(tmp_path: Path) -> None:
    good = compile_network(small_network(), "tiny")
    code = bytearray(good.code)
    code[64] = 0x7F
    path = tmp_path / "bad.nmf"
    replace(good, code=bytes(code)).save(path)
    said = refused("simulate", path)
    assert "0x40" in said


def test_missing_tools_say_what_to_install(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ToolMissingError("the C++ compiler 'g++' was not found: install it with `apt-get install g++`")

    monkeypatch.setattr(sim.simulate, "VerilatorEngine", missing)
    assert "apt-get install g++" in refused("simulate", program)


def test_json_of_verilog_needs_a_file() -> None:
    assert "--json needs --output" in refused("verilog", "tiny", "--json")


def test_verilog(tmp_path: Path) -> None:
    path = tmp_path / "tiny.v"
    facts = json.loads(nmforge_command("verilog", "tiny", "-o", path, "--json").stdout)
    text = path.read_text()
    assert facts["lines"] == text.count("\n") and f"module {facts['top']}" in text
    assert nmforge_command("verilog", "tiny").stdout == text


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from nmforge.cli import main; main()", "verilog", "nope"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode == 2 and "Traceback" not in plain.stderr and plain.stderr.startswith("error: ")
    debug = {**os.environ, "NMFORGE_DEBUG": "1"}
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=debug)
    assert shown.returncode != 0 and "Traceback" in shown.stderr


# -- demo and train ---------------------------------------------------------------------------------------------------


def test_demo_and_compile_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nmforge.demo.run_demo

    def small(chosen: Any, *, fresh: bool) -> dict[str, Any]:
        return real(config(chosen.out, pattern=chosen.pattern), data=data(), model=model(), fresh=fresh)

    monkeypatch.setattr(nmforge.demo, "run_demo", small)
    folder = tmp_path / "demo"
    result = nmforge_command("demo", "--out", folder, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["bit_exact"] and summary["pattern"] == "2:4"
    table = nmforge_command("demo", "--out", folder)
    assert table.exit_code == 0 and "bit-exact" in table.stdout and "[7/7]" in table.stderr
    assert nmforge_command("report", folder).exit_code == 0
    assert "holds no finished model of that pattern" in refused("compile", folder, "-p", "1:8", "-o", tmp_path / "x.nmf")


def test_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.nmforge.tiny_demo import TRAINING

    real = nmforge.commands.train

    def small(pattern: Any, folder: Path, **options: Any) -> Any:
        assert options["config"].dense.epochs == 3 and options["config"].idp.train.epochs == 1
        return real(pattern, folder, **{**options, "data": data(), "config": TRAINING, "model": model()})

    monkeypatch.setattr(nmforge.commands, "train", small)
    monkeypatch.setattr(nmforge.commands, "prepare", lambda *_, **__: data())
    arguments = ("train", "-p", "1:4", "--out", tmp_path, "--dense-epochs", 3, "--epochs", 1)
    facts = json.loads(nmforge_command(*arguments, "--json").stdout)
    assert [stage["name"] for stage in facts["stages"]] == ["dense", "2:4", "1:4"]
    assert set(facts["accuracy"]) == {"float_dense", "float_sparse"} and Path(facts["sparse"]).is_dir()
    assert "sparse model:" in nmforge_command(*arguments).stdout


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nmforge.demo, "run_demo", interrupted)
    result = nmforge_command("demo", "--out", tmp_path)
    assert result.exit_code == 130 and "the same command goes on from there" in result.stderr
