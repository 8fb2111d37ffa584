# SPDX-License-Identifier: Apache-2.0
"""Clipping the channels of a norm's output before each gets its grid, as LRP-QViT does (Ranjan and Savakis,
2024, arXiv 2401.11243) before RepQ's reparameterisation.

There is no code of theirs, and how they clip is not known to us: both rules here are ours. A channel that is
clipped has a finer grid, at the price of its outliers; and as its grid's scale goes into the weights, they
are spread less.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

import numpy as np

from splitfold.runtime.feeds import Array

__all__ = ["ChannelClip", "clipped_ends", "output_error"]

_KEPT = 99.9
"""Percent of a channel's elements that PERCENTILE keeps, the rest cut evenly from both tails."""
_DEVIATIONS = (6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.75, 2.5, 2.25, 2.0)
"""Numbers of standard deviations that SEARCH tries, beside no clipping."""

Ends = tuple[Array, Array]


class ChannelClip(enum.Enum):
    """Which part of what calibration saw of a channel its grid covers."""

    NONE = "none"
    """All of it."""
    PERCENTILE = "percentile"
    """99.9 % of its elements."""
    SEARCH = "search"
    """Mean plus and minus k standard deviations, one k for all channels, with which the layers' outputs
    suffer least."""


def clipped_ends(rows: Array, ends: Ends, weights: Sequence[Array], bits: int, clip: ChannelClip) -> Ends:
    """Return (low, high) of each channel, float64 [channels], that its grid is to cover; never beyond `ends`.

    Args:
        rows: elements that calibration saw, float32 [rows, channels].
        ends: lowest and highest element that it saw, [channels] each; each interval is widened to hold zero.
        weights: of the layers that read the rows, [channels, outputs] each.
        bits: width of a code.
        clip: the rule.
    """
    low, high = np.minimum(np.asarray(ends[0], np.float64), 0), np.maximum(np.asarray(ends[1], np.float64), 0)
    if clip is ChannelClip.NONE:
        return low, high
    if clip is ChannelClip.PERCENTILE:
        tail = (100 - _KEPT) / 2
        quantiles = np.percentile(rows.astype(np.float64), [tail, 100 - tail], axis=0)
        return np.clip(quantiles[0], low, 0), np.clip(quantiles[1], 0, high)
    gram = sum(np.asarray(weight, np.float64) @ np.asarray(weight, np.float64).T for weight in weights)
    return min(
        _candidates(rows, low, high), key=lambda pair: output_error(rows, pair, np.asarray(gram), bits)
    )


def _candidates(rows: Array, low: Array, high: Array) -> Iterator[Ends]:
    yield low, high  # first: it wins a tie
    mean, deviation = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
    for count in _DEVIATIONS:
        yield np.clip(mean - count * deviation, low, 0), np.clip(mean + count * deviation, 0, high)


def output_error(rows: Array, ends: Ends, gram: Array, bits: int) -> float:
    """Return the squared error of the layers' outputs, summed over rows and outputs, where each channel goes
    through its own grid over `ends`.

    Args:
        rows: [rows, channels].
        ends: (low, high), [channels] each, around zero.
        gram: W W^T summed over the layers, [channels, channels].
        bits: width of a code.
    """
    low, high = ends
    top = 2**bits - 1
    scales = np.where(high > low, (high - low) / top, 1.0)
    codes = np.clip(np.rint((rows - low) / scales), 0, top)
    error = codes * scales + low - rows
    return float(np.sum((error @ gram) * error))
