"""nmforge verify."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from algo.checkpoint import save_model
from algo.compressed import save_compressed
from algo.sparsify import sparsify
from nmforge.checking import check
from nmforge.cli import app


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(6, 8), nn.Linear(8, 16), nn.Linear(16, 3)


def sparse_net():
    torch.manual_seed(0)
    model = Net()
    sparsify(model, "2:4", method="magnitude")
    return model


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_one_pattern_leaves_embeddings_and_heads_out(tmp_path):
    save_file(sparse_net().state_dict(), tmp_path / "m.safetensors")
    result = check(tmp_path / "m.safetensors", "2:4")
    assert result["ok"] and [row["name"] for row in result["weights"]] == ["body.weight"]
    assert not check(tmp_path / "m.safetensors", "*=2:4,body*=1:4")["ok"]


@pytest.mark.parametrize("kind", ["folder", "file", "compressed"])
def test_patterns_that_a_checkpoint_records(tmp_path, kind):
    model = sparse_net()
    save_model(model, tmp_path)
    save_compressed(model, tmp_path / "packed.safetensors")
    path = {"folder": tmp_path, "file": tmp_path / "model.safetensors", "compressed": tmp_path / "packed.safetensors"}[kind]
    if kind == "folder":
        (tmp_path / "packed.safetensors").unlink()
    result = check(path, None)
    assert result["ok"] and [(row["name"], row["pattern"], row["density"]) for row in result["weights"]] == [
        ("body.weight", "2:4", 0.5)]


def test_violations_are_shown_and_exit_with_one(tmp_path):
    model = sparse_net()
    with torch.no_grad():
        model.body.weight[5, 4:8] = 1
    torch.save(model.state_dict(), tmp_path / "m.pt")
    shown = run(tmp_path / "m.pt", "-p", "2:4")
    assert shown.exit_code == 1 and "1 groups break their pattern" in shown.output
    found = run(tmp_path / "m.pt", "-p", "2:4", "--json")
    assert found.exit_code == 1
    (row,) = json.loads(found.stdout)["weights"]
    assert row["first"] == {"row": 5, "group": 1, "nonzeros": 4} and row["violations"] == 1 and row["groups"] == 32


def test_wrong_use(tmp_path):
    save_file({"w": torch.zeros(4, 8)}, tmp_path / "m.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"123456789")
    for arguments, message in (
        ((tmp_path / "m.safetensors",), "does not say which patterns"),
        ((tmp_path / "m.safetensors", "-p", "v=2:4"), "no weight in"),
        ((tmp_path / "m.safetensors", "-p", "4:2"), "did you mean 2:4"),
        ((tmp_path / "m.safetensors", "-p", "dense"), "is checked"),
        ((tmp_path / "bad.safetensors", "-p", "2:4"), "cannot read"),
        ((tmp_path / "none.safetensors", "-p", "2:4"), "no checkpoint"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
