"""What the façade adds."""

import pytest
import torch
from torch import nn

import nmforge as nf


def test_verify_names_layer_row_and_group() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match="no sparse layer"):
        nf.verify(model)
    nf.sparsify(model, "2:4", method="magnitude")
    with torch.no_grad():
        model[0].weight[1, 4:8] = 1.0
    with pytest.raises(ValueError, match=r"layer '0' is not 2:4: row 1, group 1 has 4 non-zeros"):
        nf.verify(model)
    with pytest.raises(ValueError, match="no layer with a weight named 'nothing'"):
        nf.verify(model, {"nothing": nf.NM("2:4")})
