"""nmforge report of programs and of the co-design table."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from compiler.compile import compile_model
from nmforge.cli import app


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(9, 24)
    file = tmp_path_factory.mktemp("program") / "x.nmf"
    compile_model(nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 4)), x, arch="tiny", calibration=[x]).save(file)
    return file


def test_a_program_says_what_is_in_memory(program):
    shown = CliRunner().invoke(app, ["report", str(program)])
    assert shown.exit_code == 0 and "on chip, most of one instruction: lanes 24 of 64 columns" in shown.stdout
    found = json.loads(CliRunner().invoke(app, ["report", str(program), "--json"]).stdout)
    assert found["memory"][0]["lanes"] == [24, 64] and found["macs"]["host"] == 0


def test_a_picture_of_the_memory(program, tmp_path):
    picture = tmp_path / "new" / "memory.png"
    assert CliRunner().invoke(app, ["report", str(program), "--memory", str(picture)]).exit_code == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to report on"),
        (["--zoo", "x.nmf"], "--zoo measures its own networks"),
        (["--zoo", "--rtl"], "say which with --only"),
        (["--zoo", "--only", "resnet"], "unknown network of the table 'resnet'"),
        (["x.nmf", "--plot", "x.png"], "go with --zoo"),
        (["x.json", "--memory", "x.png"], "--memory draws a program"),
        (["x.nmf", "-o", "x.html"], "give --output with a summary of a run"),
    ],
)
def test_wrong_use(arguments, message):
    result = CliRunner().invoke(app, ["report", *arguments])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
