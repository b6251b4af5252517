"""Compressed checkpoints and torch's 2:4 tensors."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from algo.compressed import from_semi_structured, load_compressed, read_compressed, save_compressed, storage, to_semi_structured
from algo.nm import NM
from algo.sparsify import model_patterns, sparsify
from algo.verify import PatternViolation


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(8, 20), nn.MultiheadAttention(20, 2), nn.LayerNorm(20)
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", [None, "index", "bitmap", "rank"])
def test_round_trip(tmp_path, dtype, format):
    model, other = net(dtype), net(dtype)
    patterns = sparsify(model, {"0": "2:4", "2": "3:8", "3": "1:4", "*": "dense"}, method="magnitude")
    save_compressed(model, str(tmp_path / "m.safetensors"), {"accuracy": 0.5}, format=format)
    assert load_compressed(other, tmp_path / "m.safetensors") == {"accuracy": 0.5}
    assert model_patterns(other) == patterns == {"0": NM("2:4"), "2": NM("3:8"), "3": NM("1:4")}
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_storage_lies_between_the_entropy_and_dense():
    torch.manual_seed(0)
    model = nn.ModuleDict({str(i): nn.Linear(256, 64) for i in range(4)}).half()
    sparsify(model, {"0": "2:4", "1": "1:8", "2": "5:7", "3": "8:32"}, method="magnitude")
    for row in storage(model):
        assert row.floor <= row.packed < row.dense and row.packed <= 1.02 * row.floor + 64
    # 2:4 of float16 by index or bitmap: 9 / 16 of dense (SR-STE's count); by rank 35 / 64
    (index,) = (row for row in storage(model, format="index") if row.weight == "0.weight")
    assert index.packed * 16 == index.dense * 9
    assert next(row for row in storage(model) if row.weight == "0.weight").packed * 64 == index.dense * 35


def test_metadata_is_readable_by_anyone(tmp_path):
    model = nn.Sequential(nn.Linear(64, 4))
    sparsify(model, "2:4", method="magnitude")
    save_compressed(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["0.bias", "0.weight.positions", "0.weight.values"]
        described = json.loads(file.metadata()["nmforge"])
    assert described["compressed"] == {"0.weight": {"dtype": "float32", "format": "rank", "pattern": "2:4", "shape": [4, 64]}}


def test_errors(tmp_path):
    path = tmp_path / "m.safetensors"
    model = nn.Sequential(nn.Linear(16, 4))
    sparsify(model, "2:4")
    with pytest.raises(ValueError, match="'0.weight' is still in training"):
        save_compressed(model, path)
    model = nn.Sequential(nn.Linear(16, 4))
    sparsify(model, "2:4", method="magnitude")
    save_compressed(model, path)
    with pytest.raises(ValueError, match="holds another model"):
        load_compressed(nn.Sequential(nn.Linear(16, 5)), path)
    from algo.checkpoint import read_tensors, write_tensors

    tensors, facts = read_tensors(path)
    tensors["0.weight.positions"] = tensors["0.weight.positions"][:, 1:]
    write_tensors(path, tensors, facts)
    with pytest.raises(ValueError, match="weight '0.weight': the packed matrix is damaged: positions"):
        read_compressed(path)
    del tensors["0.weight.positions"]
    write_tensors(path, tensors, facts)
    with pytest.raises(ValueError, match="weight '0.weight' lacks"):
        read_compressed(path)
    write_tensors(path, tensors, {})
    with pytest.raises(ValueError, match="not a compressed checkpoint"):
        read_compressed(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_semi_structured(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    sparsify(layer, "2:4", method="magnitude")
    weight = (layer.weight.detach() * (1000 if dtype == torch.int8 else 1)).to(dtype)
    values, metadata = to_semi_structured(weight)
    assert values.shape == (64, 64) and metadata.dtype == (torch.int32 if dtype == torch.int8 else torch.int16)
    assert torch.equal(from_semi_structured(values, metadata), weight)


def test_semi_structured_errors():
    with pytest.raises(PatternViolation):
        to_semi_structured(torch.ones(64, 64, dtype=torch.float16))
    with pytest.raises(ValueError, match="not torch.float32"):
        to_semi_structured(torch.zeros(64, 64))
    with pytest.raises(ValueError, match="torch cannot convert"):
        to_semi_structured(torch.zeros(5, 64, dtype=torch.float16))
    with pytest.raises(TypeError, match="SparseSemiStructuredTensor, not Tensor"):
        from_semi_structured(torch.zeros(2, 2))
