# SPDX-License-Identifier: Apache-2.0
"""What calibration saw of a value, and the ranges that calibrators make of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.passes.activations import activation_stats
from splitfold.passes.affine import activation_grid
from splitfold.passes.ranges import BINS, ActivationStats, Calibrator, activation_range
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.target import Target

IDENTITY = ir.from_proto(
    parse_graph('<ir_version: 10, opset_import: ["" : 20]>\nnet (float[n] x) => (float[n] y) { y = Relu(x) }')
)


def stats_of(batches: list[Array], *, histograms: bool = True) -> ActivationStats:
    """Return the streamed statistics of the input over `batches`."""
    data = Calibration.of([{"x": batch} for batch in batches])
    return activation_stats(IDENTITY, ["x"], data, Target.cpu(), histograms=histograms)["x"]


SAMPLES = {
    "normal": np.random.default_rng(0).standard_normal(20000).astype(np.float32),
    "heavy tail": np.random.default_rng(1).standard_t(2, 20000).astype(np.float32),
    "skewed": np.random.default_rng(2).exponential(1, 20000).astype(np.float32),
    "shifted": (5 + np.random.default_rng(3).standard_normal(20000)).astype(np.float32),
}
samples = pytest.mark.parametrize("values", SAMPLES.values(), ids=list(SAMPLES))


@samples
def test_streamed_statistics_are_those_of_the_whole(values: Array) -> None:
    whole = stats_of([values])
    parts = stats_of(np.split(values, [1, 700, 701, 9000]))
    assert (parts.low, parts.high, parts.count, parts.finite) == (whole.low, whole.high, values.size, True)
    assert (parts.low, parts.high) == (values.min(), values.max())
    assert parts.rms == pytest.approx(float(np.sqrt(np.mean(values.astype(np.float64) ** 2))), rel=1e-6)
    assert parts.histogram is not None
    assert whole.histogram is not None
    np.testing.assert_array_equal(parts.histogram, whole.histogram)
    np.testing.assert_array_equal(parts.histogram, np.histogram(values, BINS, (parts.low, parts.high))[0])


def test_infinities_are_seen_and_kept_out_of_the_range() -> None:
    stats = stats_of([np.array([1, -np.inf, 3], np.float32), np.array([-2], np.float32)], histograms=False)
    assert (stats.low, stats.high, stats.finite) == (-2.0, 3.0, False)
    assert "infinities" in (stats.unholdable() or "")
    assert "sentinel" in (stats_of([np.array([1, -3.4e38], np.float32)], histograms=False).unholdable() or "")
    assert stats_of([np.array([1, -1e6], np.float32)], histograms=False).unholdable() is None


@samples
def test_min_max(values: Array) -> None:
    assert activation_range(stats_of([values]), Calibrator.MINMAX) == (values.min(), values.max())


def test_moving_average_by_hand() -> None:
    batches = [np.array(ends, np.float32) for ends in ([-1, 4], [-3, 8], [-2, 0])]
    low = 0.9 * (0.9 * -1 + 0.1 * -3) + 0.1 * -2
    high = 0.9 * (0.9 * 4 + 0.1 * 8) + 0.1 * 0
    assert activation_range(stats_of(batches), Calibrator.MOVING_AVERAGE) == pytest.approx((low, high))


@samples
@pytest.mark.parametrize("percentile", [99.999, 99.9, 99.0, 90.0])
def test_percentile_is_the_quantile_within_a_bin(values: Array, percentile: float) -> None:
    stats = stats_of(np.split(values, 8))
    low, high = activation_range(stats, Calibrator.PERCENTILE, percentile=percentile)
    tail = (1 - percentile / 100) / 2
    width = (stats.high - stats.low) / BINS
    plain = values.astype(np.float64)
    assert low == pytest.approx(float(np.quantile(plain, tail, method="inverted_cdf")), abs=1.001 * width)
    assert high == pytest.approx(
        float(np.quantile(plain, 1 - tail, method="inverted_cdf")), abs=1.001 * width
    )


def squared_error(values: Array, low: float, high: float) -> float:
    return float(np.mean((activation_grid(low, high).round_trip(values) - values.astype(np.float64)) ** 2))


@samples
def test_mse_is_near_the_best_of_all_intervals(values: Array) -> None:
    stats = stats_of([values])
    low, high = activation_range(stats, Calibrator.MSE)
    found = squared_error(values, low, high)
    ends = np.linspace(1.0, 0.02, 50)
    lows, highs = (min(stats.low, 0.0) * ends, max(stats.high, 0.0) * ends)
    best = min(squared_error(values, a, b) for a in np.unique(lows) for b in np.unique(highs))
    assert found <= 1.1 * best
    assert found <= squared_error(values, stats.low, stats.high)


def test_mse_clips_what_is_rare() -> None:
    edges = np.linspace(-40, 60, BINS + 1)
    centers = (edges[:-1] + edges[1:]) / 2
    counts = np.rint(1e7 * np.exp(-(centers**2) / 2)).astype(np.int64)
    counts[[0, -1]] = 1  # one outlier at either end, of a hundred million elements
    stats = ActivationStats(-40.0, 60.0, -40.0, 60.0, 1.0, True, int(counts.sum()), counts)

    def error(low: float, high: float) -> float:
        difference = activation_grid(low, high).round_trip(centers) - centers
        return float(np.dot(counts, difference**2))

    low, high = activation_range(stats, Calibrator.MSE)
    best = min(error(-40 * a, 60 * b) for a in np.linspace(0.1, 1, 46) for b in np.linspace(0.1, 1, 46))
    assert error(low, high) <= 1.1 * best
    assert error(low, high) < 0.2 * error(-40, 60)


@samples
def test_entropy_keeps_most_of_the_values(values: Array) -> None:
    stats = stats_of([values])
    low, high = activation_range(stats, Calibrator.ENTROPY)
    assert min(stats.low, 0) <= low <= high <= stats.high
    assert np.mean((values >= low) & (values <= high)) > 0.97


def test_extreme_values_by_hand() -> None:
    batches = [np.array([-1, 5, 3], np.float32), np.array([2], np.float32)]
    stats = stats_of(batches, histograms=False)
    deviation = np.std([-1.0, 5.0, 3.0, 2.0])
    assert stats.samples == 4
    assert (stats.low_deviation, stats.high_deviation) == pytest.approx((deviation, deviation))
    growth = deviation * np.sqrt(6) / np.pi * np.log(128 / 4)
    assert activation_range(stats, Calibrator.EXTREME_VALUE) == pytest.approx((-1 - growth, 5 + growth))


def test_extreme_values_hold_what_more_samples_show() -> None:
    tails = np.random.default_rng(4).gumbel(3.0, 0.5, (200, 128)).astype(np.float32)
    few = [stats_of([rows[:16]], histograms=False) for rows in tails]
    ends = [activation_range(item, Calibrator.EXTREME_VALUE)[1] for item in few]
    expected = float(tails.max(1).mean())
    seen = float(np.mean([item.high for item in few]))
    assert abs(np.mean(ends) - expected) < 0.15 * (expected - seen)
    enough = stats_of([tails[0]], histograms=False)
    assert activation_range(enough, Calibrator.EXTREME_VALUE) == (enough.low, enough.high)


def test_a_constant_has_a_range() -> None:
    stats = stats_of([np.full(10, 3.0, np.float32)])
    for calibrator in Calibrator:
        low, high = activation_range(stats, calibrator)
        grid = activation_grid(low, high)
        assert grid.round_trip(np.array([3.0], np.float32))[0] == pytest.approx(3.0, rel=1e-6)
