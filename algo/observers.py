"""Ranges of activations by calibration: what a tensor's values are, and where to clip them.

A real value is ``scale * q`` with ``q`` an integer in [-2^(bits-1), 2^(bits-1) - 1].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Method", "Observer", "least_divergence", "observer_factory"]

Method = Literal["minmax", "percentile", "mse", "entropy"]

_BINS = 2048
_SMOOTHING = 1e-4
"""Probability that an empty bin of the quantised histogram gets, so that the divergence is finite."""


class Observer:
    """Watch the values of one tensor over calibration batches and give its quantisation scale.

    Streaming: memory does not grow with the number of updates. Histograms of ``|x|`` have 2048 bins; when a
    larger value comes, the range doubles and neighbouring bins join.

    Parameters
    ----------
    method
        ``"minmax"``: the largest magnitude seen. ``"percentile"``: the magnitude that so many per cent of the values do not
        exceed. ``"mse"``: the clipping point with the least mean squared error at the asked bits, where an example that is
        louder than the median one counts by its error relative to its mean square: one example on which a network runs away
        would else set the scale of all. ``"entropy"``: the one whose integers lose the least information, see
        `least_divergence`; the largest magnitude as long as there are fewer values than bins.
    percentile
        In (0, 100]; used by ``"percentile"`` alone.
    """

    def __init__(self, method: Method = "minmax", *, percentile: float = 99.99) -> None:
        if method not in get_args(Method):
            raise ValueError(
                f"an observer's method must be one of {', '.join(get_args(Method))}, not {method!r}"
            )
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile must be in (0, 100], not {percentile!r}")
        self.method = method
        self.percentile = percentile
        self.absmax = 0.0
        """The largest magnitude seen so far."""
        self.count = 0
        """Values seen so far."""
        self._range = 0.0
        self._histograms: dict[int, NDArray[np.int64]] = {}
        """By loudness: the octave of an example's mean square."""
        self._examples: Counter[int] = Counter()

    def update(self, values: Tensor) -> None:
        """Take in one batch: any shape, floating point or integer, finite. Of three and more axes, the first is that of the
        examples."""
        if not isinstance(values, Tensor):
            raise TypeError(f"an observer takes tensors, not {type(values).__name__}")
        if values.numel() == 0:
            return
        magnitude = values.detach().to(torch.float32).abs()
        largest = float(magnitude.max())
        if not math.isfinite(largest):
            raise ValueError("calibration met a NaN or an infinity: the model overflows on this batch")
        self.absmax = max(self.absmax, largest)
        self.count += magnitude.numel()
        if self.method != "minmax":
            self._widen(largest)
            for loudness, example in self._by_loudness(magnitude):
                bins = torch.histc(example, bins=_BINS, min=0.0, max=self._range or 1.0).numpy().astype(np.int64)
                self._histograms[loudness] = self._histograms.get(loudness, np.zeros(_BINS, dtype=np.int64)) + bins
                self._examples[loudness] += 1

    def threshold(self, bits: int = 8) -> float:
        """The magnitude that maps to the largest integer of ``bits`` bits; at most `absmax`."""
        if not 2 <= bits <= 32:
            raise ValueError(f"bits must be in 2..32, not {bits!r}")
        if self.count == 0:
            raise ValueError("the observer has seen no values: call update() with calibration data first")
        if self.method == "minmax" or self.absmax == 0.0:
            return self.absmax
        if self.method == "entropy":
            if self.count < _BINS:
                return self.absmax
            width = self._range / _BINS
            return min(least_divergence(self._histogram, 1 << (bits - 1)) * width, self.absmax)
        found = self._percentile() if self.method == "percentile" else self._least_squares(bits)
        return min(found, self.absmax)

    def scale(self, bits: int = 8) -> float:
        """The real value of one integer step, ``threshold / (2^(bits-1) - 1)``; 1.0 if all values were
        zero."""
        scale = self.threshold(bits) / ((1 << (bits - 1)) - 1)
        return scale if scale > 0 else 1.0

    @property
    def _histogram(self) -> NDArray[np.int64]:
        return sum(self._histograms.values(), np.zeros(_BINS, dtype=np.int64))

    def _by_loudness(self, magnitude: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Examples with the octave of their mean square, if it matters; examples of zeros lose nothing at any scale."""
        if self.method != "mse" or magnitude.ndim < 3:
            yield 0, magnitude
            return
        for example in magnitude:
            power = float(example.double().square().mean())
            if power > 0:
                yield round(math.log2(power)), example

    def _widen(self, largest: float) -> None:
        """Make the histogram's range cover ``largest``."""
        if largest == 0.0 or largest <= self._range:
            return
        if self._range == 0.0:
            self._range = largest
            return
        while self._range < largest:
            self._range *= 2
            for loudness, histogram in self._histograms.items():
                joined = histogram.reshape(-1, 2).sum(1)
                self._histograms[loudness] = np.concatenate([joined, np.zeros(_BINS // 2, dtype=np.int64)])

    def _percentile(self) -> float:
        reached = np.cumsum(self._histogram) >= self.count * (self.percentile / 100)
        return (int(np.argmax(reached)) + 1) * self._range / _BINS

    def _least_squares(self, bits: int) -> float:
        width = self._range / _BINS
        centre = (np.arange(_BINS) + 0.5) * width
        median = sorted(self._examples.elements())[self._examples.total() // 2]
        weighted = np.zeros(_BINS)
        for loudness, counts in self._histograms.items():
            weighted += counts * 2.0 ** min(median - loudness, 0)
        used = int(np.flatnonzero(weighted)[-1]) + 1
        centre, weight = centre[:used], weighted[:used]
        candidates = np.unique(np.linspace(max(1, used // 8), used, 128).astype(int)) * width
        step = candidates[:, None] / ((1 << (bits - 1)) - 1)
        # Inside the range the error is uniform within a step, but what rounds to 0 loses all that it is; beyond it, the
        # distance to the clipping point.
        beyond = np.maximum(centre[None, :] - candidates[:, None], 0.0)
        error = np.where(beyond > 0, beyond**2, np.where(centre < step / 2, centre**2, step**2 / 12))
        return float(candidates[int(np.argmin(error @ weight))])


def least_divergence(histogram: NDArray[np.int64], levels: int, *, step: int = 8) -> int:
    """How many bins of a histogram of ``|x|`` to keep when the rest is clipped to the last of them and what is left is rounded
    to ``levels`` values: those with the least Kullback-Leibler divergence between the clipped histogram and the rounded one.

    Parameters
    ----------
    histogram
        Counts (bins,). The first bin counts as much as the second: zeros are exact at any scale, and of a ReLU's values they
        would be most.
    levels
        Values that a magnitude can have, 128 for int8.
    step
        Every so many bins are tried, from ``levels`` on.

    Returns
    -------
    int
        Bins to keep; all that are used if they are no more than ``levels``.

    Notes
    -----
    Migacz, "8-bit Inference with TensorRT" (GTC 2017), pages 31 to 38.
    """
    used = int(np.flatnonzero(histogram)[-1]) + 1
    if used <= levels:
        return used
    counts = histogram[:used].astype(np.float64)
    counts[0] = counts[1]
    tried = [*range(levels, used, step), used]
    return min(tried, key=lambda bins: (_divergence(counts, bins, levels), bins))


def _divergence(counts: NDArray[np.float64], bins: int, levels: int) -> float:
    """Of the histogram clipped to ``bins`` from the same rounded to ``levels`` values."""
    kept = counts[:bins]
    clipped = kept.copy()
    clipped[-1] += counts[bins:].sum()
    level = np.arange(bins) * levels // bins
    filled = kept > 0
    mean = np.bincount(level, kept, levels) / np.maximum(np.bincount(level, filled, levels), 1)
    rounded = np.where(filled, mean[level], 0.0)
    if not rounded.any():
        return math.inf
    p, q = (_smoothed(part / part.sum()) for part in (clipped, rounded))
    return float((p * np.log(p / q)).sum())


def _smoothed(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Empty bins get a little of what the others have."""
    empty = shares == 0
    taken = _SMOOTHING * empty.sum() / max(1, (~empty).sum())
    return np.where(empty, _SMOOTHING, np.maximum(shares - taken, 1e-12))


def observer_factory(kind: str | Callable[[], Observer]) -> Callable[[], Observer]:
    """What makes the observers of a network.

    Parameters
    ----------
    kind
        A method of `Observer`, with a parameter after a colon for ``percentile`` ("percentile:99.9"); or a function, as it is.

    Raises
    ------
    ValueError
        Unknown method, or a parameter that is none.
    TypeError
        Neither text nor a function.
    """
    if callable(kind):
        return kind
    if not isinstance(kind, str):
        raise TypeError(f"an observer is a method's name or a function, not {type(kind).__name__}")
    method, colon, parameter = kind.partition(":")
    if method not in get_args(Method):
        raise ValueError(f"observer must be one of {', '.join(get_args(Method))} or a function, not {kind!r}")
    if not colon:
        return lambda: Observer(method)  # type: ignore[arg-type]
    try:
        percentile = float(parameter) if method == "percentile" else math.nan
    except ValueError:
        percentile = math.nan
    if math.isnan(percentile):
        raise ValueError(f'only percentile has a parameter, a number such as "percentile:99.9", not {kind!r}')
    Observer("percentile", percentile=percentile)
    return lambda: Observer("percentile", percentile=percentile)
