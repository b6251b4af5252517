"""Modes of a module and of torch that hold for a while and are undone afterwards."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import nn
from torch.nn.modules import transformer

__all__ = ["evaluating", "plain_attention", "quiet_export"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each part is in the mode in which it was."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def plain_attention() -> Iterator[None]:
    """Torch's attention, encoder and decoder modules run operator by operator, not as one fused kernel, and do not look at the
    values of a mask to find out whether it is causal: a mask is used as it is either way."""
    fast, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        transformer._detect_is_causal_mask = detect


@contextmanager
def quiet_export() -> Iterator[None]:
    """Torch silent about what it fails to trace; `plain_attention`."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with plain_attention(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
