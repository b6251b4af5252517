"""Modes are undone as they were found."""

import logging

import pytest
import torch
from torch import nn

from algo.modes import evaluating, quiet_export


def test_each_part_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise ZeroDivisionError
    assert [part.training for part in model.modules()] == [True, True, False]


def test_torch_is_loud_again():
    log, fast = logging.getLogger("torch"), torch.backends.mha.get_fastpath_enabled()
    level = log.level
    with quiet_export():
        assert log.level == logging.CRITICAL and not torch.backends.mha.get_fastpath_enabled()
    assert (log.level, torch.backends.mha.get_fastpath_enabled()) == (level, fast)
