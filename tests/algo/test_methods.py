"""Training methods against their definitions."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from algo.mask import magnitude_mask
from algo.methods import METHODS, SoftThreshold
from algo.nm import NM
from algo.sparsify import Method, advance, finalize, freeze_masks, model_patterns, parametrizations, sparsify
from algo.verify import verify

TRAINING = [name for name, info in METHODS.items() if info.kind == "training"]


def soft_threshold(weight, pattern):
    """S-STE by its definition, row by row."""
    out = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], pattern.m):
            group = weight[row, start:start + pattern.m]
            kept = pattern.kept(len(group))
            threshold = np.sort(np.abs(group))[len(group) - kept - 1] if kept < len(group) else 0.0
            out[row, start:start + pattern.m] = np.sign(group) * np.maximum(np.abs(group) - threshold, 0)
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 16).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))), st.integers(1, 40), st.integers(0, 99))
def test_soft_threshold_equals_definition(nm, width, seed):
    pattern, weight = NM(*nm), torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    module = SoftThreshold(weight, pattern)
    shrunk = soft_threshold(weight.numpy().astype(np.float64), pattern)
    scale = (shrunk * weight.numpy()).sum() / (shrunk ** 2).sum() if shrunk.any() else 1.0
    assert module.scale.item() == pytest.approx(scale, rel=1e-4)
    assert np.allclose(module(weight).numpy(), scale * shrunk, atol=1e-4 * max(1.0, scale))


def test_soft_threshold_is_straight_through_and_bakes_what_it_computed():
    layer = nn.Linear(8, 4, bias=False)
    sparsify(layer, "2:4", method="s-ste")
    x = torch.randn(5, 8)
    before = layer(x)
    before.sum().backward()
    assert torch.allclose(layer.parametrizations.weight.original.grad, x.sum(0).expand(4, 8), atol=1e-5)
    freeze_masks(layer)
    assert torch.allclose(layer(x), before, atol=1e-6)
    finalize(layer)
    assert torch.allclose(layer(x), before, atol=1e-6)
    verify(layer, {"": NM("2:4")})


def test_gradual_follows_the_schedule_and_masks_are_nested():
    torch.manual_seed(0)
    layer = nn.Linear(64, 16)
    sparsify(layer, "2:8", method="gradual", end=0.8)
    (_, weight, mask), = parametrizations(layer)
    steps, last = 50, torch.ones(16, 64, dtype=torch.bool)
    for step in range(steps):
        advance(layer, step, steps)
        density = 0.25 + 0.75 * max(0.0, 1 - step / steps / 0.8) ** 3
        assert mask.mask.reshape(16, 8, 8).sum(2).eq(math.ceil(8 * density - 1e-9)).all()
        assert not (mask.mask & ~last).any()  # what is pruned stays pruned
        last = mask.mask.clone()
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
    assert int(mask.level) == 2
    layer(torch.randn(2, 64)).sum().backward()
    assert not weight.grad[~mask.mask].any()
    finalize(layer)
    verify(layer, {"": NM("2:8")})


def test_fixed_mask_stays_and_has_no_gradient_outside():
    layer = nn.Linear(16, 4)
    mask = magnitude_mask(layer.weight.detach(), NM("1:4"))
    sparsify(layer, "1:4", method="fixed")
    original = layer.parametrizations.weight.original
    layer(torch.randn(3, 16)).sum().backward()
    assert not original.grad[~mask].any()
    with torch.no_grad():
        original.normal_()
    freeze_masks(layer, False)
    assert torch.equal(layer.weight != 0, mask)


def test_step_is_dense_first():
    layer = nn.Linear(16, 4)
    dense = layer.weight.detach().clone()
    sparsify(layer, "1:4", method="step", precondition=0.5)
    advance(layer, 4, 10)
    assert torch.equal(layer.weight, dense)
    advance(layer, 5, 10)
    assert torch.equal(layer.weight, dense * magnitude_mask(dense, NM("1:4")))


@pytest.mark.parametrize("method", TRAINING)
def test_every_method_trains_and_obeys_its_pattern(method: Method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(60, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.randn(64, 6, 5), torch.randint(0, 3, (64,))
    sparsify(model, {"0": "2:4", "3": "2:8", "5": "3:4"}, method=method)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for step in range(40):
        advance(model, step, 40)
        if step == 30:
            freeze_masks(model)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    saved = copy.deepcopy(model)
    other = copy.deepcopy(model)
    other.load_state_dict(saved.state_dict())
    expected = model(x)
    patterns = finalize(model)
    verify(model, patterns)
    assert patterns == {"0": NM("2:4"), "3": NM("2:8"), "5": NM("3:4")} == model_patterns(model)
    assert torch.allclose(model(x), expected, atol=1e-5) and torch.allclose(other(x), expected, atol=1e-5)
    assert losses[-1] < 0.7 * losses[0]


def test_state_of_a_schedule_is_restored():
    first, second = nn.Linear(16, 4), nn.Linear(16, 4)
    for layer in (first, second):
        sparsify(layer, "1:4", method="step")
    advance(first, 9, 10)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weight, second.weight) and bool((second.weight == 0).any())


def test_every_method_is_named_in_the_registry():
    import typing

    assert set(typing.get_args(Method)) | {"idp"} == set(METHODS)
    with pytest.raises(ValueError, match="run_idp"):
        sparsify(nn.Linear(4, 4), "2:4", method="idp")  # type: ignore[arg-type]
    for option, value in (("end", 0), ("precondition", 1)):
        with pytest.raises(ValueError, match=option):
            sparsify(nn.Linear(4, 4), "2:4", **{option: value})
