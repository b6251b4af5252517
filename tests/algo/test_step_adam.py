"""STEP's optimiser: AdamW until masks begin, then the second moment stays."""

import copy

import pytest
import torch
from torch import nn

from algo.sparsify import advance, sparsify
from algo.step_adam import AutoSwitch, StepAdamW, masks_begun


def gradients(model, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def test_equals_adamw_before_the_switch():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(8, 4), nn.Linear(8, 4)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    a, b = StepAdamW(ours.parameters(), lambda: False, **options), torch.optim.AdamW(theirs.parameters(), **options)
    for step in range(6):
        gradients(ours, step)
        gradients(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert a.change > 0


def test_keeps_the_second_moment_and_resumes():
    layer = nn.Linear(16, 4)
    sparsify(layer, "2:4", method="step", precondition=0.5)
    optimizer = StepAdamW(layer.parameters(), lambda: masks_begun(layer))
    for step in range(10):
        advance(layer, step, 10)
        gradients(layer, step)
        before = copy.deepcopy([optimizer.state[p].get("exp_avg_sq") for p in layer.parameters()])
        optimizer.step()
        after = [optimizer.state[p]["exp_avg_sq"] for p in layer.parameters()]
        if step:
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)) == (step >= 5)
    assert masks_begun(layer) and optimizer.change == 0
    other = copy.deepcopy(layer)
    twin = StepAdamW(other.parameters(), lambda: masks_begun(other))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for which, opt in ((layer, optimizer), (other, twin)):
        gradients(which, 99)
        opt.step()
    assert torch.equal(layer.weight, other.weight)


def test_auto_switch():
    switch = AutoSwitch(eps=1e-3, beta2=0.9, earliest=5, latest=100)
    assert [switch(1.0 / step ** 2) for step in range(1, 60)].index(True) >= 10
    switch = AutoSwitch(eps=1e-9, beta2=0.9, latest=20)
    assert [switch(1.0) for _ in range(25)].index(True) == 19
    with pytest.raises(ValueError, match="latest"):
        AutoSwitch(earliest=5, latest=3)
    with pytest.raises(ValueError, match="betas"):
        StepAdamW([torch.zeros(1)], lambda: True, betas=(0.9, 1.0))
