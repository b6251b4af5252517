import copy

import pytest
import torch
from torch import nn

from algo.mask import magnitude_mask
from algo.nm import NM
from algo.sparsify import (
    finalize,
    freeze_masks,
    match_patterns,
    pattern_of,
    set_pattern,
    sparsify,
    sparsity_report,
)
from algo.verify import verify


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 12), nn.Embedding(4, 4), nn.Linear(12, 5)
    )


def test_sr_ste_forward_and_backward():
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    weight = layer.weight.detach().clone()
    sparsify(layer, "2:4", decay=0.1)
    mask = magnitude_mask(weight, NM("2:4"))
    x = torch.randn(3, 8)
    y = layer(x)
    assert torch.equal(y, x @ (weight * mask).t())
    y.sum().backward()
    dense_gradient = x.sum(0).expand(4, 8)  # straight through: pruned weights get it too
    original = layer.parametrizations.weight.original
    assert torch.allclose(original.grad, dense_gradient + 0.1 * (~mask) * weight, atol=1e-6)


def test_ste_has_no_decay():
    layer = nn.Linear(8, 4, bias=False)
    sparsify(layer, "1:4", method="ste")
    x = torch.randn(3, 8)
    layer(x).sum().backward()
    assert torch.allclose(layer.parametrizations.weight.original.grad, x.sum(0).expand(4, 8))


def test_masks_follow_weights_until_frozen():
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    sparsify(layer, "2:4")
    original = layer.parametrizations.weight.original
    assert layer.weight.tolist() == [[4, 3, 0, 0]]
    with torch.no_grad():
        original[0, 3] = 9
    assert layer.weight.tolist() == [[4, 0, 0, 9]]
    freeze_masks(layer)
    with torch.no_grad():
        original[0, 2] = 99
    assert layer.weight.tolist() == [[4, 0, 0, 9]]
    freeze_masks(layer, False)
    assert layer.weight.tolist() == [[0, 0, 99, 9]]


def test_freezing_takes_the_mask_of_the_present_weights():
    layer = nn.Linear(4, 1, bias=False)
    sparsify(layer, "1:4")
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.tensor([[0.0, 0.0, 5.0, 1.0]]))
    freeze_masks(layer)
    assert layer.weight.tolist() == [[0, 0, 5, 0]]


def test_set_pattern_keeps_dense_weights_and_thaws():
    layer = nn.Linear(8, 2)
    dense = layer.weight.detach().clone()
    sparsify(layer, "3:4")
    freeze_masks(layer)
    assert set_pattern(layer, "1:4") == {"": NM("1:4")}
    assert torch.equal(layer.weight, dense * magnitude_mask(dense, NM("1:4")))
    with pytest.raises(ValueError, match="layer '' is not being trained sparse"):
        set_pattern(nn.Linear(8, 2), "1:4")


def test_finalize_bakes_and_remembers():
    model = net()
    patterns = sparsify(model, {"0": "2:4", "5": "dense", "*": NM("1:3")})
    assert patterns == {"0": NM("2:4"), "3": NM("1:3")}
    inputs = torch.randn(2, 6, 3, 3)
    before = model[:4](inputs)
    assert finalize(model) == patterns
    assert torch.equal(model[:4](inputs), before)
    assert model[0].nm_pattern == NM("2:4") and pattern_of(model[5]) is None
    assert type(model[0]) is nn.Conv2d and set(dict(model.named_parameters())) == set(
        dict(net().named_parameters())
    )
    verify(model, patterns)
    assert finalize(model) == patterns  # a second time does nothing
    model[3].weight.sum().backward()


def test_magnitude_changes_at_once():
    layer = nn.Linear(8, 4)
    dense = layer.weight.detach().clone()
    sparsify(layer, "2:4", method="magnitude")
    assert torch.equal(layer.weight, dense * magnitude_mask(dense, NM("2:4")))
    assert layer.nm_pattern == NM("2:4")


def test_report():
    model = net()
    sparsify(model, {"0": "2:4"}, method="magnitude")
    rows = sparsity_report(model)
    assert [(row.layer, row.pattern, row.violations) for row in rows] == [
        ("0", NM("2:4"), 0),
        ("3", None, 0),
        ("5", None, 0),
    ]
    assert rows[0].shape == (8, 6, 3, 3) and rows[0].nonzeros == 8 * 9 * (2 + 1)
    with torch.no_grad():
        model[0].weight.fill_(1)
    assert sparsity_report(model)[0].violations == 8 * 9


def test_exclude_and_first_match_wins():
    model = net()
    assert match_patterns(model, "2:4", exclude=["5"]) == {"0": NM("2:4"), "3": NM("2:4")}
    assert match_patterns(model, {"3": "dense", "*": "2:4"}) == {"0": NM("2:4"), "5": NM("2:4")}
    assert match_patterns(model, "dense") == {}


def test_state_dict_holds_mask_and_freeze():
    first, second = nn.Linear(8, 4), nn.Linear(8, 4)
    for layer in (first, second):
        sparsify(layer, "2:4")
    freeze_masks(first)
    with torch.no_grad():
        first.parametrizations.weight.original.normal_()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(copy.deepcopy(first).weight, first.weight)


def test_errors():
    model = net()
    with pytest.raises(
        ValueError, match="no Linear or convolution layer matches 'encoder.*': the layers are 0, 3, 5"
    ):
        sparsify(model, {"encoder.*": "2:4", "*": "1:4"})
    with pytest.raises(ValueError, match="matches '\\*': the layers are none"):
        sparsify(nn.ReLU(), "2:4")
    with pytest.raises(ValueError, match="matches '\\*' outside"):
        sparsify(model, "2:4", exclude=["*"])
    with pytest.raises(ValueError, match="method must be one of sr-ste, ste, magnitude, .*, not 'l1'"):
        sparsify(model, "2:4", method="l1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not int"):
        sparsify(model, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="N must be <= M"):
        sparsify(model, "4:2")
    with pytest.raises(ValueError, match="dict of patterns is empty"):
        sparsify(model, {})
    with pytest.raises(ValueError, match="decay must be >= 0"):
        sparsify(model, "2:4", decay=-1)
    sparsify(model, {"3": "2:4"})
    with pytest.raises(ValueError, match="layer '3' is being trained already: call finalize"):
        sparsify(model, "2:4")
    assert not nn.utils.parametrize.is_parametrized(model[0])  # nothing half done
    with pytest.raises(ValueError, match=r"layer '' has a parametrisation of its own \(WeightNorm\): .*remove_parametrizations"):
        sparsify(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "2:4")
