import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from algo.mask import magnitude_mask
from algo.nm import NM
from algo.verify import PatternViolation, check_checkpoint, verify, verify_weight, violations


def test_names_layer_row_group_and_count():
    model = nn.Sequential(nn.Linear(10, 3))
    weight = model[0].weight
    with torch.no_grad():
        weight.mul_(magnitude_mask(weight, NM("2:4")))
        weight[1, 4:8] = 1.0
        weight[2, 0:3] = 1.0
    with pytest.raises(
        PatternViolation, match=r"layer '0' is not 2:4: row 1, group 1 has 4 non-zeros"
    ) as caught:
        verify(model, {"0": NM("2:4")})
    error = caught.value
    assert (error.layer, error.row, error.group, error.nonzeros) == ("0", 1, 1, 4)
    assert error.count == len(violations(weight, NM("2:4")))
    assert isinstance(error, ValueError)


def test_magnitude_masks_pass():
    for shape in [(5, 30), (4, 7, 3, 3)]:
        for pattern in map(NM, ["1:1", "2:4", "3:7", "1:32", "31:32"]):
            weight = torch.randn(shape)
            verify_weight(weight * magnitude_mask(weight, pattern), pattern)


def test_remainder_group_counts():
    weight = torch.zeros(1, 6)
    weight[0, 4:] = 1
    verify_weight(weight, NM("2:4"))
    with pytest.raises(PatternViolation, match="row 0, group 1 has 2 non-zeros, at most 1"):
        verify_weight(weight, NM("1:4"))


def test_unknown_layer():
    with pytest.raises(ValueError, match="no layer with a weight named 'x'"):
        verify(nn.Linear(2, 2), {"x": NM("1:2")})


def test_any_checkpoint_can_be_checked(tmp_path):
    torch.manual_seed(0)
    good = torch.randn(8, 16)
    good *= magnitude_mask(good, NM("2:4"))
    bad = good.clone()
    bad[3, 4:8] = 1
    state = {"a.weight": good, "b.weight": bad, "b.bias": torch.zeros(8), "embed.weight": torch.randn(5, 8)}
    save_file(state, tmp_path / "m.safetensors")
    torch.save({"state_dict": state}, tmp_path / "m.pt")
    (tmp_path / "shards").mkdir()
    for name in ("a.weight", "b.weight"):
        save_file({name: state[name]}, tmp_path / "shards" / f"{name}.safetensors")
    for path in (tmp_path / "m.safetensors", tmp_path / "m.pt", tmp_path / "shards"):
        a, b = check_checkpoint(path, {"[ab].weight": "2:4"})
        assert (a.name, a.broken, a.groups, a.first, a.density) == ("a.weight", 0, 32, None, 0.5)
        assert (b.name, b.broken, b.first) == ("b.weight", 1, (3, 1, 4))
    assert [c.name for c in check_checkpoint(tmp_path / "m.pt", {"embed*": "dense", "a*": "1:4"})] == ["a.weight"]


def test_checkpoints_that_cannot_be_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"12345")
    (tmp_path / "x.pt").write_bytes(b"12345")
    for name in ("x.safetensors", "x.pt"):
        with pytest.raises(ValueError, match="cannot read"):
            check_checkpoint(tmp_path / name, {"*": "2:4"})
    with pytest.raises(FileNotFoundError):
        check_checkpoint(tmp_path / "none", {"*": "2:4"})
    save_file({"w": torch.zeros(2, 4)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="no weight in .* matches 'v': it has w"):
        check_checkpoint(tmp_path / "y.safetensors", {"v": "2:4"})
