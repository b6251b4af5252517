"""Pruning by calibration data against the definitions."""

import copy

import pytest
import torch
from torch import nn

from algo.mask import magnitude_mask
from algo.nm import NM
from algo.oneshot import _columns, _matrix
from algo.sparsify import sparsify
from algo.verify import verify


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(12, 5), (3, 4, 12)),
    (nn.Conv1d(6, 4, 3, padding=1, stride=2), (2, 6, 9)),
    (nn.Conv1d(6, 4, 3, padding=2, padding_mode="circular"), (2, 6, 9)),
    (nn.Conv2d(6, 4, 3, padding=(1, 2), stride=(2, 1)), (2, 6, 7, 8)),
    (nn.Conv2d(8, 4, (1, 3), dilation=2, groups=2, padding="same"), (2, 8, 7, 8)),
    (nn.Conv2d(4, 8, 2, groups=4, padding=1, padding_mode="reflect"), (1, 4, 5, 5)),
])
def test_columns_times_matrix_is_the_layer(layer, shape):
    x = torch.randn(shape)
    columns, matrix = _columns(layer, x), _matrix(layer.weight.detach(), getattr(layer, "groups", 1)).flatten(2)
    found = torch.einsum("gtk,gok->tgo", columns, matrix).flatten(1) + layer.bias
    expected = layer(x)
    expected = expected.flatten(0, -2) if isinstance(layer, nn.Linear) else expected.flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_wanda_equals_its_definition_through_pruned_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    batches = [torch.randn(7, 16) * torch.linspace(0.1, 3, 16) for _ in range(3)]
    first, second, x = model[0].weight.detach().clone(), model[2].weight.detach().clone(), torch.cat(batches)
    sparsify(model, "2:4", method="wanda", calibration=batches)
    expected = first * magnitude_mask(first.abs() * x.norm(dim=0), NM("2:4"))
    assert torch.equal(model[0].weight, expected)
    hidden = (x @ expected.t() + model[0].bias).relu()  # the second layer sees the pruned first
    assert torch.equal(model[2].weight, second * magnitude_mask(second.abs() * hidden.norm(dim=0), NM("2:4")))


def test_sparsegpt_is_optimal_for_one_weight():
    """One weight of each row goes, at the left end: what stays is the least squares solution."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 6, bias=False), torch.randn(200, 8) @ torch.randn(8, 8)
    with torch.no_grad():
        layer.weight[:, 0] *= 1e-3  # column 0 is always the cheapest
    dense = layer.weight.detach().clone()
    sparsify(layer, "7:8", method="sparsegpt", calibration=[x])
    assert not layer.weight[:, 0].any()
    gram = (x.t() @ x).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(8)
    # minimise (w - d)' H (w - d) with w[0] = 0
    best = torch.linalg.solve(damped[1:, 1:], damped[1:] @ dense.double().t()).t()
    assert torch.allclose(layer.weight[:, 1:].double(), best, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "5:7"])
def test_the_more_a_method_knows_the_smaller_its_error(pattern):
    torch.manual_seed(0)
    mix = torch.randn(48, 48)
    batches = [torch.randn(64, 48) @ mix for _ in range(4)]
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        torch.manual_seed(1)
        layer = nn.Linear(48, 32)
        expected = [layer(x) for x in batches]
        sparsify(layer, pattern, method=method, calibration=batches)
        verify(layer, {"": NM(pattern)})
        errors[method] = sum((layer(x) - y).square().sum().item() for x, y in zip(batches, expected, strict=True))
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_convolutions_attention_and_shared_inputs():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.group = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=2)
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
            self.head = nn.Linear(16, 4)

        def forward(self, x, *, scale=1.0):
            x = self.group(self.conv(x).relu()).flatten(2).transpose(1, 2)
            return self.head(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1) * scale)

    for method in ("wanda", "sparsegpt"):
        model = Net().train()
        calls = []
        model.q.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found = sparsify(model, "2:4", method=method, calibration=[{"x": torch.randn(2, 8, 6, 6), "scale": 2.0}])
        assert list(found) == ["conv", "group", "q", "k", "v"] and model.training
        assert len(calls) == 2  # once for the order, once for the stage; not for earlier stages
        verify(model, found)


def test_held_weights_stay_zero():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8), torch.randn(32, 16)
    sparsify(layer, "2:4", method="sparsegpt", calibration=[x], hold=True)
    zeros = layer.weight == 0
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight == 0, zeros)


def test_errors():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model.forward = lambda x: model["a"](x)
    with pytest.raises(ValueError, match="give calibration=batches"):
        sparsify(model, "2:4", method="wanda")
    with pytest.raises(ValueError, match="calibration has no batches"):
        sparsify(model, "2:4", method="wanda", calibration=[])
    with pytest.raises(ValueError, match="never reach layer 'b'"):
        sparsify(model, "2:4", method="wanda", calibration=[torch.randn(2, 8)])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", ["self", "cross", "sizes"])
def test_torch_attention_is_its_projections(method, kind):
    """The same weights as Linear layers, with the same inputs, are pruned alike."""
    torch.manual_seed(0)
    width = 12 if kind == "sizes" else 16
    attention = nn.MultiheadAttention(16, 4, batch_first=True, kdim=width, vdim=width).train()
    query, other = torch.randn(3, 5, 16), torch.randn(3, 7, width)
    batches = [(query, query, query)] * 2 if kind == "self" else [(query, other, other)] * 2
    weights = attention.in_proj_weight.chunk(3) if kind != "sizes" else [
        attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    expected = []
    for weight, x in zip(weights, batches[0], strict=True):
        layer = nn.Linear(*weight.shape[::-1], bias=False)
        layer.weight = nn.Parameter(weight.detach().clone())
        sparsify(layer, "2:4", method=method, calibration=[x, x])
        expected.append(layer.weight)
    dense = attention.out_proj.weight.detach().clone()
    found = sparsify(attention, "2:4", method=method, calibration=batches)
    assert list(found) == ["", "out_proj"] and attention.training
    verify(attention, found)
    weights = attention.in_proj_weight.chunk(3) if kind != "sizes" else [
        attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, expected, strict=True))
    assert not torch.equal(attention.out_proj.weight, dense)


def test_torch_encoder_layer_by_layer():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False)
    x = torch.randn(4, 6, 16)
    dense = encoder.eval()(x)
    errors = []
    for method in ("magnitude", "sparsegpt"):
        model = copy.deepcopy(encoder)
        verify(model, sparsify(model, "2:4", method=method, calibration=[x]))
        errors.append((model(x) - dense).square().mean().item())
    assert errors[1] < errors[0]
