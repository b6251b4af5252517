"""Observers against numpy, scipy and torch's own."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from torch.ao.quantization.observer import HistogramObserver

from algo.observers import Observer, least_divergence, observer_factory


def test_minmax_observer_streams():
    observer = Observer()
    for value in (0.5, -3.0, 2.0):
        observer.update(torch.tensor([value, 0.1]))
    assert observer.absmax == 3.0 and observer.count == 6
    assert observer.scale() == 3.0 / 127 and observer.scale(16) == 3.0 / 32767


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_all_zero_gives_scale_one(method):
    observer = Observer(method)
    observer.update(torch.zeros(10))
    assert observer.scale() == 1.0


def test_percentile_clips_outliers():
    torch.manual_seed(0)
    observer = Observer("percentile", percentile=99.0)
    for _ in range(10):
        observer.update(torch.rand(10_000))
    observer.update(torch.tensor([50.0]))
    assert observer.absmax == 50.0
    assert 0.95 < observer.threshold() < 1.05


def test_mse_is_no_worse_than_minmax():
    torch.manual_seed(0)
    values = torch.randn(100_000)
    values[0] = 40
    observer = Observer("mse")
    for part in values.split(10_000):
        observer.update(part)

    def error(scale, bits=8):
        limit = (1 << (bits - 1)) - 1
        return float(((values / scale).round().clamp(-limit, limit) * scale - values).square().mean())

    assert error(observer.scale()) < 0.7 * error(observer.absmax / 127)
    # at 16 bits clipping costs more than it gains
    assert observer.threshold(16) == pytest.approx(40, rel=0.01)


def test_one_loud_example_does_not_set_the_scale_of_the_others():
    generator = torch.Generator().manual_seed(0)
    quiet, loud = torch.randn(127, 20, 8, generator=generator), 50 * torch.randn(1, 20, 8, generator=generator)
    together, flat, even = Observer("mse"), Observer("mse"), Observer("mse")
    for batch in torch.cat([quiet[:64], loud, quiet[64:]]).split(4):
        together.update(batch)
        flat.update(batch.flatten())  # one example, whatever it holds
    even.update(50 * quiet)

    def noise(observer):
        scale = observer.scale()
        return float(((quiet / scale).round().clamp(-128, 127) * scale - quiet).square().mean())

    assert noise(together) < 0.2 * noise(flat)
    assert even.threshold() > 50 * 2.5  # loud as all are
    assert together.absmax == float(loud.abs().max())


def test_examples_of_zeros_count_for_nothing():
    observer, alone = Observer("mse"), Observer("mse")
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    alone.update(x)
    observer.update(torch.zeros(9, 5, 3))
    observer.update(torch.cat([x, torch.zeros(4, 5, 3)]))
    assert observer.scale() == alone.scale()


def test_histogram_widens_without_losing_counts():
    observer = Observer("percentile")
    for value in (0.001, 1.0, 100.0, 3.0):
        observer.update(torch.full((7,), value))
    observer.update(torch.zeros(3))
    assert observer._histogram.sum() == observer.count == 31


def test_observer_errors():
    with pytest.raises(ValueError, match="must be one of minmax, percentile, mse, entropy, not 'max'"):
        Observer("max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"percentile must be in \(0, 100\], not 0"):
        Observer("percentile", percentile=0)
    with pytest.raises(ValueError, match="seen no values"):
        Observer().scale()
    with pytest.raises(ValueError, match="NaN or an infinity"):
        Observer().update(torch.tensor([math.inf]))
    observer = Observer()
    observer.update(torch.ones(1))
    with pytest.raises(ValueError, match="bits must be in 2..32, not 1"):
        observer.scale(1)


def _samples(name):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(40_000, generator=generator)
    return {
        "normal": normal,
        "laplace": normal.sign() * torch.empty(40_000).exponential_(generator=generator),
        "relu": normal.relu(),
        "outliers": torch.cat([normal, torch.full((20,), 60.0)]),
        "heavy tail": normal / (normal.roll(1) + 2),
    }[name]


@pytest.mark.parametrize("name", ["normal", "laplace", "relu", "outliers", "heavy tail"])
def test_mse_is_as_good_as_torchs_histogram_observer(name):
    """Its search for the least L2 error, on the same values."""
    values = _samples(name)
    ours, theirs = Observer("mse"), HistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    for part in values.split(10_000):
        ours.update(part)
        theirs(part)

    def error(scale):
        return float(((values / scale).round().clamp(-128, 127) * scale - values).square().mean())

    assert error(ours.scale()) <= 1.05 * error(float(theirs.calculate_qparams()[0]))


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentile_is_numpys(percentile):
    values = _samples("laplace")
    observer = observer_factory(f"percentile:{percentile}")()
    for part in values.split(9_000):
        observer.update(part)
    exact = np.percentile(values.abs().numpy(), percentile, method="inverted_cdf")
    assert abs(observer.threshold() - exact) <= observer._range / 2048


def _brute_force(histogram, levels, step):
    """The published procedure, bin by bin, with scipy's divergence."""
    counts = histogram.astype(float)
    counts[0] = counts[1]
    used = int(np.flatnonzero(counts)[-1]) + 1
    best, chosen = math.inf, used
    for bins in [*range(levels, used, step), used]:
        clipped = counts[:bins].copy()
        clipped[-1] += counts[bins:used].sum()
        rounded = np.zeros(bins)
        for level in range(levels):
            group = [k for k in range(bins) if k * levels // bins == level]
            filled = [k for k in group if counts[k] > 0]
            for k in filled:
                rounded[k] = sum(counts[g] for g in group) / len(filled)
        parts = []
        for part in (clipped / clipped.sum(), rounded / rounded.sum()):
            empty = sum(part == 0)
            parts.append([1e-4 if x == 0 else max(x - 1e-4 * empty / (bins - empty), 1e-12) for x in part])
        divergence = float(sum(scipy.special.rel_entr(*parts)))
        if divergence < best - 1e-15:
            best, chosen = divergence, bins
    return chosen


@pytest.mark.parametrize("name", ["normal", "relu", "outliers", "heavy tail"])
def test_entropy_is_the_published_procedure(name):
    histogram = np.histogram(_samples(name).abs().numpy(), bins=200)[0]
    assert least_divergence(histogram, 16, step=4) == _brute_force(histogram, 16, 4)


def test_entropy_clips_outliers_and_keeps_what_is_even():
    clipped, even = Observer("entropy"), Observer("entropy")
    clipped.update(_samples("outliers"))
    even.update(torch.linspace(-3, 3, 100_000))
    assert 2.5 < clipped.threshold() < 10 and clipped.absmax == 60
    assert even.threshold() > 2.9
    few = Observer("entropy")
    few.update(torch.tensor([0.1, 0.1, 3.0]))
    assert few.threshold() == 3.0
    assert clipped.threshold(16) == pytest.approx(60)  # more levels than bins: nothing is gained by clipping


def test_kinds_of_observers():
    assert observer_factory("entropy")().method == "entropy"
    assert observer_factory("percentile")().percentile == 99.99
    own = lambda: Observer("minmax")
    assert observer_factory(own) is own
    for wrong in ("max", "percentil", ""):
        known = "minmax, percentile, mse, entropy"
        with pytest.raises(ValueError, match=f"observer must be one of {known} or a function, not '{wrong}'"):
            observer_factory(wrong)
    for wrong in ("mse:3", "percentile:much", "percentile:"):
        with pytest.raises(ValueError, match=f"only percentile has a parameter, .* not {wrong!r}"):
            observer_factory(wrong)
    with pytest.raises(ValueError, match=r"percentile must be in \(0, 100\], not 101.0"):
        observer_factory("percentile:101")
    with pytest.raises(TypeError, match="an observer is a method's name or a function, not int"):
        observer_factory(3)  # type: ignore[arg-type]
