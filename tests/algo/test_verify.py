import pytest
import torch
from torch import nn

from algo.mask import magnitude_mask
from algo.nm import NM
from algo.verify import PatternViolation, verify, verify_weight, violations


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
