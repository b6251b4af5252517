import pytest
import torch
from torch.nn import functional as F

from models.fpn import FPN


def maps(channels, size=32):
    return [torch.randn(2, count, size >> level, size >> level) for level, count in enumerate(channels)]


@pytest.mark.parametrize(
    ("extra", "extra_levels", "sizes"),
    [("input", 2, [32, 16, 8, 4, 2]), ("output", 2, [32, 16, 8, 4, 2]), ("pool", 1, [32, 16, 8, 4]), ("pool", 0, [32, 16, 8])],
)
def test_levels(extra, extra_levels, sizes):
    model = FPN([3, 5, 7], width=6, extra=extra, extra_levels=extra_levels)
    assert [tuple(level.shape) for level in model(maps([3, 5, 7]))] == [(2, 6, size, size) for size in sizes]


def test_odd_sizes_and_one_map():
    model = FPN([3, 5], width=4, extra_levels=0)
    levels = model([torch.randn(1, 3, 7, 9), torch.randn(1, 5, 4, 5)])
    assert [tuple(level.shape[2:]) for level in levels] == [(7, 9), (4, 5)]
    assert len(FPN([3], width=4, extra_levels=0)(maps([3]))) == 1


@pytest.mark.parametrize("relu", [False, True])
def test_equals_the_definition(relu):
    torch.manual_seed(0)
    model, (c3, c4) = FPN([3, 5], width=4, extra="input", relu_extra=relu), maps([3, 5])
    m4 = model.lateral[1](c4)
    m3 = model.lateral[0](c3) + m4.repeat_interleave(2, 2).repeat_interleave(2, 3)
    p5 = model.extra[0](c4)
    expected = [model.output[0](m3), model.output[1](m4), p5, model.extra[1](F.relu(p5) if relu else p5)]
    for level, wanted in zip(model([c3, c4]), expected):
        torch.testing.assert_close(level, wanted)


def test_parameters_of_retinanet():
    count = lambda extra: sum(p.numel() for p in FPN([512, 1024, 2048], extra=extra).parameters())
    assert (count("input"), count("output"), count("pool")) == (7_997_440, 3_868_672, 2_688_512)


def test_wrong_options():
    with pytest.raises(ValueError, match="channels and width must be integers >= 1, not .0,. and 4"):
        FPN([0], width=4)
    with pytest.raises(ValueError, match="extra_levels must be >= 0 and extra one of .* not 2 and 'top'"):
        FPN([4], extra="top")
    with pytest.raises(ValueError, match="2 maps are needed, not 1"):
        FPN([3, 5])(maps([3]))
