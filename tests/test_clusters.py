# SPDX-License-Identifier: Apache-2.0
"""Optimal clusters on a line, against trying all partitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from splitfold.passes import clusters as module
from splitfold.passes.clusters import kmeans_thresholds, members
from splitfold.runtime.feeds import Array


def cost(values: Array, index: Array) -> float:
    x = values.astype(np.float64)
    return float(sum(np.square(x[index == c] - x[index == c].mean()).sum() for c in np.unique(index)))


def least_cost(values: Array, clusters: int) -> float:
    """Return the cost of the best partition of all."""
    x = np.sort(values.astype(np.float64))
    if len(np.unique(x)) <= clusters:
        return 0.0
    partitions = itertools.combinations(range(1, len(x)), clusters - 1)
    edges = [(0, *cuts, len(x)) for cuts in partitions]
    return min(
        sum(float(np.square(x[a:b] - x[a:b].mean()).sum()) for a, b in itertools.pairwise(cuts))
        for cuts in edges
    )


def numbers(kind: int, count: int, rng: np.random.Generator) -> Array:
    drawn = [
        rng.standard_normal(count),
        rng.integers(-2, 3, count),
        rng.standard_t(1.5, count),
        rng.standard_normal(count) * 0.01 + rng.integers(0, 3, count) * 5,
        rng.uniform(size=count) + 1e4,
    ]
    return np.asarray(drawn[kind], np.float32)


@pytest.mark.parametrize("narrow", [256, 0], ids=["dense", "divided"])
def test_nothing_is_better(narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NARROW", narrow)
    rng = np.random.default_rng(0)
    for trial in range(150):
        values = numbers(trial % 5, int(rng.integers(1, 13)), rng)
        clusters = int(rng.integers(1, 6))
        index = members(values[None], kmeans_thresholds(values[None], clusters))[0]
        assert cost(values, index) <= least_cost(values, clusters) * (1 + 1e-9) + 1e-9, (values, clusters)
        assert len(np.unique(index)) == min(clusters, len(np.unique(values)))


def test_both_searches_agree_on_many_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    modes = np.concatenate([rng.standard_normal(400) * 0.1 + at for at in range(7)])
    for values in (modes, rng.standard_normal(3000), rng.standard_t(3, 3000)):
        row = values.astype(np.float32)[None]
        found = []
        for narrow in (10**6, 0):
            monkeypatch.setattr(module, "_NARROW", narrow)
            found.append(kmeans_thresholds(row, 4))
        assert cost(row, members(row, found[0])) == pytest.approx(
            cost(row, members(row, found[1])), rel=1e-12
        )


def test_windows_hold_the_optimum_where_lloyd_gets_stuck() -> None:
    """Two pairs far apart and a lone number: Lloyd's algorithm has several fixed points here."""
    values = np.array([0, 0.1, 10, 10.1, 20, 20.1, 20.2, 100], np.float32)
    index = members(values[None], kmeans_thresholds(values[None], 3))[0]
    assert cost(values, index) == pytest.approx(least_cost(values, 3))


def test_rows_are_clustered_alone() -> None:
    rng = np.random.default_rng(2)
    rows = np.stack([numbers(kind, 40, rng) for kind in range(5)])
    together = kmeans_thresholds(rows, 3)
    for row, found in zip(rows, together, strict=True):
        assert np.array_equal(kmeans_thresholds(row[None], 3)[0], found)


def test_equal_numbers_stay_together() -> None:
    values = np.repeat(np.array([-1, 0, 0.5, 2], np.float32), [3, 50, 2, 7])
    index = members(values[None], kmeans_thresholds(values[None], 3))[0]
    assert all(len(np.unique(index[values == value])) == 1 for value in np.unique(values))


@pytest.mark.parametrize("values", [[1, 1, 1], [2], [-0.0, 0.0]])
def test_one_distinct_number_is_one_cluster(values: list[float]) -> None:
    row = np.array([values], np.float32)
    assert np.isinf(kmeans_thresholds(row, 3)).all()
    assert not members(row, kmeans_thresholds(row, 3)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN and infinity"):
        kmeans_thresholds(np.array([[1, bad]], np.float32), 2)


def test_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="n > 0"):
        kmeans_thresholds(np.empty((1, 0), np.float32), 2)
