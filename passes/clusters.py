# SPDX-License-Identifier: Apache-2.0
"""Optimal k-means on a line: the clusters of numbers with the least sum of squared distances to their means.

Clusters of sorted numbers are intervals, so k - 1 cuts describe them. At the optimum every cut lies at the
midpoint between the means of its two clusters (Lloyd's condition). Lloyd's step moves the cuts monotonously:
cuts further right give means, and so midpoints, further right. Repeated from the leftmost cuts it climbs to
the least fixed point, from the rightmost ones it descends to the greatest, and the optimum lies between the
two. Inside these windows dynamic programming decides (Wang and Song, "Ckmeans.1d.dp", R Journal 2011):
densely where they are narrow, else by divide and conquer, as the best earlier cut moves right with the later
one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from splitfold.runtime.feeds import Array

__all__ = ["kmeans_thresholds", "members"]

_STEPS = 2000
"""Lloyd steps at most: stopping early leaves a wider window, which still holds the optimum."""
_DENSE = 2**22
"""Entries of a table of costs that is held at once."""
_NARROW = 256
"""Width of the windows up to which rows are searched densely."""


def kmeans_thresholds(rows: Array, clusters: int) -> Array:
    """Return the optimal clusters of each row as thresholds [rows, clusters - 1], ascending, in its dtype.

    A number belongs to the cluster that counts the thresholds at or below it. Equal numbers are never parted.
    A row of fewer distinct numbers than clusters has one cluster a number, its other thresholds are infinite.
    Sums are of float64: where two partitions cost the same but for their rounding, either is returned.

    Args:
        rows: finite floats [rows, n], each row clustered alone; n is at least 1.
        clusters: at least 1.

    Raises:
        ValueError: a number is not finite, or there are none.
    """
    if clusters < 1 or rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"{clusters} clusters of an array of shape {rows.shape}: expected [rows, n], n > 0")
    if not np.isfinite(rows).all():
        raise ValueError("NaN and infinity have no cluster")
    ordered = np.sort(rows, axis=1)
    found = np.full((len(rows), clusters - 1), np.inf, rows.dtype)
    distinct = 1 + np.count_nonzero(np.diff(ordered, axis=1), axis=1)
    for row in np.flatnonzero(distinct <= clusters):
        values = np.unique(ordered[row])[1:]
        found[row, : len(values)] = values
    many = np.flatnonzero(distinct > clusters)
    if len(many) and clusters > 1:
        cuts = _optimal_cuts(_Sums.of(ordered if len(many) == len(rows) else ordered[many]), clusters)
        found[many] = np.take_along_axis(ordered[many], cuts, axis=1)
    return found


def members(rows: Array, thresholds: Array) -> Array:
    """Return the cluster (uint8) of each number of `rows` [rows, n], as `thresholds` [rows, clusters - 1]
    part them."""
    found = np.zeros(rows.shape, np.uint8)
    for position in range(thresholds.shape[1]):
        found += rows >= thresholds[:, position, None]
    return found


@dataclass(frozen=True)
class _Sums:
    """Sorted rows, centred, with running sums: the cost of any interval in a few operations.

    Attributes:
        x: float64 [rows, n].
        sums, squares: of the first i numbers of x, float64 [rows, n + 1].
    """

    x: Array
    sums: Array
    squares: Array

    @staticmethod
    def of(ordered: Array) -> _Sums:
        x = ordered.astype(np.float64)
        x -= x.mean(axis=1, keepdims=True)  # so that squares do not cancel
        zero = np.zeros((len(x), 1))
        return _Sums(
            x, np.concatenate([zero, x.cumsum(1)], 1), np.concatenate([zero, np.square(x).cumsum(1)], 1)
        )

    @property
    def count(self) -> int:
        return int(self.x.shape[1])

    def take(self, rows: Array) -> _Sums:
        return _Sums(self.x[rows], self.sums[rows], self.squares[rows])

    def means(self, edges: Array) -> Array:
        """Return the means [rows, clusters] of the clusters between `edges` [rows, clusters + 1]."""
        return np.asarray(np.diff(np.take_along_axis(self.sums, edges, 1), axis=1) / np.diff(edges, axis=1))


def _optimal_cuts(data: _Sums, clusters: int) -> Array:
    """Return the first position of every cluster but the first, [rows, clusters - 1]."""
    low, high = _windows(data, clusters)
    width = (high - low).max(axis=1) + 1
    cuts = np.empty_like(low)
    narrow = np.flatnonzero(width <= _NARROW)
    narrow = narrow[np.argsort(width[narrow], kind="stable")]  # rows of like width share a table
    for rows in np.array_split(narrow, max(1, -(-len(narrow) * _NARROW**2 // (16 * _DENSE)))):
        if len(rows):
            cuts[rows] = _dense(data.take(rows), low[rows], high[rows])
    for row in np.flatnonzero(width > _NARROW):
        cuts[row] = _divided(data.sums[row], data.squares[row], low[row], high[row])
    return cuts


def _windows(data: _Sums, clusters: int) -> tuple[Array, Array]:
    """Return the lowest and highest position that each optimal cut can have."""
    inner = np.arange(1, clusters)
    low = np.tile(inner, (len(data.x), 1))
    high = np.tile(data.count - clusters + inner, (len(data.x), 1))
    active = np.arange(len(data.x))
    part = data
    for _ in range(_STEPS):
        before = (low[active], high[active])
        after = _step(part, *before)
        low[active], high[active] = after
        moved = np.any((after[0] != before[0]) | (after[1] != before[1]), axis=1)
        if not moved.any():
            break
        if np.count_nonzero(moved) < len(active) // 2:
            active = active[moved]
            part = data.take(active)
    return low, high


def _step(data: _Sums, low: Array, high: Array) -> tuple[Array, Array]:
    """Return the windows after one Lloyd step from both ends, one position wider on either side than it says:
    means are rounded."""
    least, most = _midpoints(data, low), _midpoints(data, high)
    lower = np.maximum(low, _position(data.x, least, low, high, after_equal=False) - 1)
    upper = np.minimum(high, _position(data.x, most, low, high, after_equal=True) + 1)
    rank = np.arange(low.shape[1])  # no two cuts coincide
    lower = np.maximum.accumulate(lower - rank, axis=1) + rank
    upper = np.minimum.accumulate((upper - rank)[:, ::-1], axis=1)[:, ::-1] + rank
    return lower, upper


def _midpoints(data: _Sums, cuts: Array) -> Array:
    edges = np.pad(cuts, ((0, 0), (1, 1)))
    edges[:, -1] = data.count
    means = data.means(edges)
    return np.asarray((means[:, 1:] + means[:, :-1]) / 2)


def _position(x: Array, values: Array, low: Array, high: Array, *, after_equal: bool) -> Array:
    """Return where `values` [rows, cuts] stand in the sorted rows `x`, sought between `low` and `high`."""
    low, high = low.copy(), high.copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        at = np.take_along_axis(x, np.minimum(middle, x.shape[1] - 1), 1)
        below = (at <= values if after_equal else at < values) & open_
        low = np.where(below, middle + 1, low)
        high = np.where(open_ & ~below, middle, high)
    return low


def _cost(sums: tuple[Array, Array], squares: tuple[Array, Array], counts: Array) -> Array:
    """Return the squared distances to their mean of `counts` numbers, from sums and squares up to their start
    and end; infinite where there are none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (squares[1] - squares[0]) - np.square(sums[1] - sums[0]) / counts
    return np.where(counts > 0, np.maximum(spread, 0), np.inf)


def _dense(data: _Sums, low: Array, high: Array) -> Array:
    """Return the optimal cuts by trying all pairs of neighbouring cuts inside their windows."""
    width = int((high - low).max()) + 1
    chunk = max(1, _DENSE // width**2)
    pieces = [slice(start, start + chunk) for start in range(0, len(low), chunk)]
    return np.concatenate(
        [
            _dense_chunk(data.take(np.r_[piece]), low[piece], high[piece], width)
            for piece in _bounded(pieces, low)
        ]
    )


def _bounded(pieces: list[slice], rows: Array) -> list[slice]:
    return [slice(piece.start, min(piece.stop, len(rows))) for piece in pieces]


def _dense_chunk(data: _Sums, low: Array, high: Array, width: int) -> Array:
    places = np.minimum(low[:, :, None] + np.arange(width), high[:, :, None])
    rows = len(low)
    start = np.zeros((rows, 1), np.int64)
    stages = [start, *np.moveaxis(places, 1, 0), start + data.count]
    best = np.zeros((rows, 1))
    choices = []
    for before, here in itertools.pairwise(stages):
        ends = [
            (np.take_along_axis(table, before, 1)[:, :, None], np.take_along_axis(table, here, 1)[:, None, :])
            for table in (data.sums, data.squares)
        ]
        total = best[:, :, None] + _cost(ends[0], ends[1], here[:, None, :] - before[:, :, None])
        choices.append(total.argmin(axis=1))
        best = np.take_along_axis(total, choices[-1][:, None, :], 1)[:, 0]
    cuts = np.empty_like(low)
    at = np.zeros((rows, 1), np.int64)
    for stage in range(low.shape[1], 0, -1):
        at = np.take_along_axis(choices[stage], at, 1)
        cuts[:, stage - 1] = np.take_along_axis(stages[stage], at, 1)[:, 0]
    return cuts


def _divided(sums: Array, squares: Array, low: Array, high: Array) -> Array:
    """Return the optimal cuts of one row by divide and conquer, all segments of a level at once."""
    places = [np.array([0]), *(np.arange(a, b + 1) for a, b in zip(low, high, strict=True))]
    places.append(np.array([len(sums) - 1]))
    best = np.zeros(1)
    choices = []
    for before, here in itertools.pairwise(places):
        best, chosen = _layer(sums, squares, best, before, here)
        choices.append(chosen)
    cuts = np.empty_like(low)
    at = 0
    for stage in range(len(low), 0, -1):
        at = int(choices[stage][at])
        cuts[stage - 1] = places[stage][at]
    return cuts


def _layer(sums: Array, squares: Array, best: Array, before: Array, here: Array) -> tuple[Array, Array]:
    """Return for each place of a cut the least cost of all that is left of it, and the index of the cut
    before it."""
    values, chosen = np.empty(len(here)), np.empty(len(here), np.int64)
    first, last = np.array([0]), np.array([len(here) - 1])
    least, most = np.array([0]), np.array([len(before) - 1])
    while len(first):
        middle = (first + last) // 2
        place = here[middle]
        top = np.minimum(most, place - 1 - before[0])  # an earlier cut stands before a later one
        lengths = top - least + 1
        starts = np.concatenate([[0], lengths.cumsum()[:-1]])
        index = np.arange(lengths.sum()) - np.repeat(starts - least, lengths)
        begin, end = before[index], np.repeat(place, lengths)
        cost = _cost((sums[begin], sums[end]), (squares[begin], squares[end]), end - begin) + best[index]
        minima = np.minimum.reduceat(cost, starts)
        hits = np.flatnonzero(cost == np.repeat(minima, lengths))
        pick = index[hits[np.searchsorted(hits, starts)]]
        values[middle], chosen[middle] = minima, pick
        left, right = middle > first, middle < last
        first, last, least, most = (
            np.concatenate([first[left], middle[right] + 1]),
            np.concatenate([middle[left] - 1, last[right]]),
            np.concatenate([least[left], pick[right]]),
            np.concatenate([pick[left], most[right]]),
        )
    return values, chosen
