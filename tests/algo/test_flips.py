"""SAD and flip rate."""

import csv

import pytest
import torch
from torch import nn

from algo.flips import Flips, FlipTracker, flips_plot
from algo.sparsify import freeze_masks, sparsify


def test_counts_mask_bits_and_writes_them(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(4, 1, bias=False), "b": nn.Linear(8, 2)})
    sparsify(model, "2:4")
    with torch.no_grad():
        model["a"].parametrizations.weight.original.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    tracker = FlipTracker(model, str(tmp_path / "flips.csv"))
    assert tracker.update(0) == []
    with torch.no_grad():
        model["a"].parametrizations.weight.original[0, 3] = 9  # enters, and 3.0 leaves: two bits
    a, b = tracker.update(5)
    assert (a.layer, a.sad, a.weights, a.rate) == ("a", 2, 4, 2 / 4 / 5) and b.sad == 0
    freeze_masks(model)
    with torch.no_grad():
        model["a"].parametrizations.weight.original.zero_()
    assert tracker.update(6)[0].sad == 0
    rows = list(csv.DictReader((tmp_path / "flips.csv").open()))
    assert [row["sad"] for row in rows] == ["2", "0", "0", "0"] and len(tracker.rows) == 4
    with pytest.raises(ValueError, match="steps must rise"):
        tracker.update(6)


def test_plot(tmp_path):
    flips_plot([Flips(step, layer, step, 100, step / 100) for step in range(5) for layer in "ab"], tmp_path / "flips.png")
    assert (tmp_path / "flips.png").read_bytes()[:4] == b"\x89PNG"
