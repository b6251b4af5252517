import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from algo.checkpoint import (
    StateDictError,
    difference,
    load_model,
    load_state,
    read_json,
    read_tensors,
    save_model,
    write_json,
    write_tensors,
)
from algo.nm import NM
from algo.sparsify import pattern_of, sparsify
from algo.verify import PatternViolation


def test_tensors_round_trip(tmp_path):
    shared = torch.arange(6.0)
    tensors = {"a": shared, "b": shared.view(2, 3).t(), "c": torch.tensor([True])}
    write_tensors(tmp_path / "new" / "x.safetensors", tensors, {"lr": 0.1, "n": [1, 2]})
    found, facts = read_tensors(tmp_path / "new" / "x.safetensors")
    assert facts == {"lr": 0.1, "n": [1, 2]}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_damaged_files_are_named(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*x.safetensors"):
        read_tensors(file)
    write_tensors(file, {"a": torch.zeros(100)})
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="x.safetensors is damaged"):
        read_tensors(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not written by nmforge: its metadata has no field 'nmforge'"):
        read_tensors(file)
    text = tmp_path / "x.json"
    for damage in ("{", "[1]"):
        text.write_text(damage)
        with pytest.raises(ValueError, match="x.json is damaged"):
            read_json(text)


def test_difference_names_the_first_key(tmp_path):
    write_json(tmp_path / "x.json", {"a": (1, 2), "lr": 0.1})
    old = read_json(tmp_path / "x.json")
    assert difference(old, {"a": (1, 2), "lr": 0.1}) is None
    assert difference(old, {"a": (1, 2), "lr": 0.2}) == "lr was 0.1, is now 0.2"


def test_model_round_trip_keeps_patterns(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    sparsify(model, {"0": "2:4"}, method="magnitude")
    save_model(model, str(tmp_path), {"accuracy": 0.5})
    other = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    assert load_model(other, str(tmp_path)) == {"accuracy": 0.5}
    assert torch.equal(other[0].weight, model[0].weight)
    assert pattern_of(other[0]) == NM("2:4") and pattern_of(other[1]) is None


def test_model_errors(tmp_path):
    model = nn.Linear(8, 4)
    with pytest.raises(FileNotFoundError, match="model.json is missing"):
        load_model(model, tmp_path)
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match="holds another model"):
        load_model(nn.Linear(8, 5), tmp_path)
    write_json(tmp_path / "model.json", {"patterns": {"": "2:4"}})
    with pytest.raises(PatternViolation, match="layer '' is not 2:4"):
        load_model(model, tmp_path)
    sparsify(model, "2:4")
    with pytest.raises(ValueError, match="layer '' is still in training: call finalize"):
        save_model(model, tmp_path)


def test_keys_that_do_not_fit_are_listed():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = model.state_dict()
    state["2.weight"] = state.pop("1.weight")
    state["0.bias"] = torch.zeros(4)
    expected = (
        r"x holds another model. Keys missing: 1.weight; not in the model: 2.weight; "
        r"of another shape: 0.bias is \(4,\), the model's \(3,\)$"
    )
    with pytest.raises(StateDictError, match=expected):
        load_state(model, state, "x")
    many = {f"k{number}": torch.zeros(1) for number in range(20)}
    with pytest.raises(StateDictError, match="k6, k7 and 12 more"):
        load_state(model, model.state_dict() | many, "x")
    load_state(model, model.state_dict(), "x")


def test_difference_names_the_nested_key():
    old = {"train": {"lr": 0.1, "betas": [1, 2]}, "x": 1}
    assert difference(old, {"train": {"lr": 0.1, "betas": (1, 2)}, "x": 1}) is None
    assert difference(old, {"train": {"lr": 0.2, "betas": (1, 2)}, "x": 1}) == "train.lr was 0.1, is now 0.2"
    assert difference(old, {"x": 1}) == "train.betas was [1, 2], is now None"


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("algo.checkpoint.is_main", lambda: False)
    write_tensors(tmp_path / "t", {"a": torch.zeros(1)})
    write_json(tmp_path / "j", {})
    assert list(tmp_path.iterdir()) == []
