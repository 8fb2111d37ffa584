# SPDX-License-Identifier: Apache-2.0
"""Calibrators: which interval of a value's seen distribution its grid of few bits covers."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from splitfold.passes.bit_grid import bit_grid
from splitfold.runtime.feeds import Array

__all__ = ["BINS", "ActivationStats", "Calibrator", "activation_range"]

BINS = 2048
_ENOUGH = 128
"""Samples whose extremes are taken as they are: more range than that costs more by rounding than it saves."""
_SEARCHED = (99.8, 99.98, 99.998)
"""Shares in percent that PERCENTILE_SEARCH may keep: RepQ-ViT's quantiles .999, .9999 and .99999 and their
mirrors."""


class Calibrator(enum.Enum):
    """How the interval is chosen from what calibration saw."""

    MINMAX = "minmax"
    MOVING_AVERAGE = "moving-average"
    PERCENTILE = "percentile"
    PERCENTILE_SEARCH = "percentile-search"
    MSE = "mse"
    ENTROPY = "entropy"
    EXTREME_VALUE = "extreme-value"
    """The extremes that 128 samples would show, where calibration saw fewer: by the Gumbel distribution of
    the samples' own extremes."""

    @property
    def needs_histogram(self) -> bool:
        """Whether a second walk over the data fills a histogram."""
        return self not in (Calibrator.MINMAX, Calibrator.MOVING_AVERAGE, Calibrator.EXTREME_VALUE)


@dataclass(frozen=True)
class ActivationStats:
    """What calibration saw of one value.

    Attributes:
        low, high: extremes over all finite elements.
        average_low, average_high: moving averages (weight 0.9) of the extremes of the batches.
        rms: root mean square of the finite elements.
        finite: whether every element was finite.
        count: number of elements.
        histogram: counts in `BINS` equal bins over [low, high], or None.
        samples: slices along the first axis.
        low_deviation, high_deviation: standard deviations of the extremes of the samples.
    """

    low: float
    high: float
    average_low: float
    average_high: float
    rms: float
    finite: bool
    count: int
    histogram: Array | None = None
    samples: int = 0
    low_deviation: float = 0.0
    high_deviation: float = 0.0

    def unholdable(self) -> str | None:
        """Return why no grid of few bits can hold the value (a mask's -inf or -3.4e38, say), or None."""
        if not self.count:
            return "calibration never saw an element of it"
        if not self.finite:
            return "it holds infinities or NaN (a mask?)"
        if max(-self.low, self.high) > 1e20:
            return (
                f"it spans [{self.low:.3g}, {self.high:.3g}]: a mask's sentinel, which no 8-bit grid can hold"
            )
        return None


def activation_range(
    stats: ActivationStats, calibrator: Calibrator, *, percentile: float = 99.999, bits: int = 8
) -> tuple[float, float]:
    """Return (low, high) of the interval that `calibrator` keeps.

    Args:
        stats: with a histogram where the calibrator needs one.
        calibrator: which rule.
        percentile: of PERCENTILE: the share in percent of the elements kept, the rest cut evenly from both
            tails.
        bits: of the grid that the interval is for.
    """
    if calibrator is Calibrator.MOVING_AVERAGE:
        return stats.average_low, stats.average_high
    if calibrator is Calibrator.EXTREME_VALUE:
        return _extrapolated(stats)
    if calibrator is Calibrator.MINMAX or stats.histogram is None or stats.low == stats.high:
        return stats.low, stats.high
    edges = np.linspace(stats.low, stats.high, BINS + 1)
    if calibrator is Calibrator.PERCENTILE:
        return _percentile(stats.histogram, edges, percentile)
    if calibrator is Calibrator.PERCENTILE_SEARCH:
        kept = (_percentile(stats.histogram, edges, share) for share in _SEARCHED)
        return min(kept, key=_squared_error(stats.histogram, edges, bits))
    return (_least_squares if calibrator is Calibrator.MSE else _entropy)(stats.histogram, edges, bits)


def _extrapolated(stats: ActivationStats) -> tuple[float, float]:
    """Return the extremes to expect of `_ENOUGH` samples.

    The largest of n values with a Gumbel tail of scale beta grows by beta log(m / n) where there are m of
    them; beta is the standard deviation times sqrt(6) / pi (Gumbel, Statistics of Extremes, 1958).
    """
    if not 1 < stats.samples < _ENOUGH:
        return stats.low, stats.high
    growth = math.sqrt(6) / math.pi * math.log(_ENOUGH / stats.samples)
    return stats.low - growth * stats.low_deviation, stats.high + growth * stats.high_deviation


def _percentile(histogram: Array, edges: Array, percentile: float) -> tuple[float, float]:
    share = np.cumsum(histogram) / histogram.sum()
    tail = (1 - percentile / 100) / 2
    low = edges[int(np.searchsorted(share, tail, side="right"))]
    high = edges[min(int(np.searchsorted(share, 1 - tail, side="left")) + 1, BINS)]
    return float(low), float(high)


def _squared_error(histogram: Array, edges: Array, bits: int) -> Callable[[tuple[float, float]], float]:
    """Return the squared error of the round trip over the grid of an interval, summed over the histogram."""
    centers = (edges[:-1] + edges[1:]) / 2

    def error(interval: tuple[float, float]) -> float:
        difference = bit_grid(*interval, bits).round_trip(centers) - centers
        return float(np.dot(histogram, np.square(difference)))

    return error


def _least_squares(histogram: Array, edges: Array, bits: int) -> tuple[float, float]:
    """Return the interval with the least mean squared error of the round trip, by coordinate descent over
    both ends."""
    error = _squared_error(histogram, edges, bits)
    low, high = float(edges[0]), float(edges[-1])
    shrink = np.linspace(1.0, 0.1, 46)
    best = (low, high)
    for _ in range(2):
        best = min(((low * s, best[1]) for s in shrink), key=error) if low < 0 else best
        best = min(((best[0], high * s) for s in shrink), key=error) if high > 0 else best
    return best


def _entropy(histogram: Array, edges: Array, bits: int) -> tuple[float, float]:
    """Return the interval whose histogram of 2^bits levels has the least Kullback-Leibler divergence from the
    clipped one.

    TensorRT's rule (Migacz, 2017), with both ends shrunk in the same proportion so that it serves skewed
    values too.
    """
    low, high = float(edges[0]), float(edges[-1])
    centers = (edges[:-1] + edges[1:]) / 2
    histogram = _without_zero_spike(histogram, edges)
    factors = np.linspace(1.0, 0.1, 91)
    scores = [_divergence(histogram, (centers >= low * f) & (centers <= high * f), 2**bits) for f in factors]
    best = float(factors[int(np.argmin(scores))])
    return low * best, high * best


def _without_zero_spike(histogram: Array, edges: Array) -> Array:
    """Give the bin of zero its neighbours' larger count, as TensorRT does: a zero is exact on any grid."""
    at = int(np.clip(np.searchsorted(edges, 0.0, side="right") - 1, 0, BINS - 1))
    even = histogram.copy()
    even[at] = max(histogram[at - 1] if at > 0 else 0, histogram[at + 1] if at + 1 < BINS else 0)
    return even


def _divergence(histogram: Array, kept: Array, count: int) -> float:
    inside = np.flatnonzero(kept)
    if inside.size < count:
        return float("inf")
    reference = histogram[inside[0] : inside[-1] + 1].astype(np.float64)
    levels = np.arange(reference.size) * count // reference.size
    filled = reference > 0
    total = np.bincount(levels, weights=reference, minlength=count)
    members = np.bincount(levels, weights=filled, minlength=count)
    quantized = np.where(filled, (total / np.maximum(members, 1))[levels], 0.0)
    reference[0] += histogram[: inside[0]].sum()
    reference[-1] += histogram[inside[-1] + 1 :].sum()
    p, q = reference / reference.sum(), np.maximum(quantized / max(quantized.sum(), 1e-30), 1e-12)
    positive = p > 0
    return float(np.sum(p[positive] * np.log(p[positive] / q[positive])))
