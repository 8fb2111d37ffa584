# SPDX-License-Identifier: Apache-2.0
"""Range search: per row and block, the range that costs less than the whole one.

A smaller range has finer steps and cuts off the largest weights; a larger one meets them better at times. Two
losses: the error of the weights alone, and the error of the layer's output on calibration data (the clip
search of AWQ, Lin et al., 2024, and its released code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from splitfold.passes.block_grid import BlockGrid, BlockLayout
from splitfold.passes.gram_loss import block_losses
from splitfold.runtime.feeds import Array

__all__ = ["AWQ_RATIOS", "MSE_RATIOS", "awq_clip", "mse_grid"]

AWQ_RATIOS = tuple(1 - step / 20 for step in range(10))
"""Of max|w|: 1, .95, ..., .55, as in the released code."""
MSE_RATIOS = (*(1 - step / 50 for step in range(36)), *(1 + step / 50 for step in range(1, 11)))
"""Of the range: 1, .98, ..., .30, then 1.02, ..., 1.20. Normal weights of 2 bits in large blocks want about
half; in small blocks many want more than all, as a grid of whole codes does not meet both ends of a range.
"""

Losses = Callable[[float], Array]
_AT_ONCE = 2**18
"""Weights that are tried at a time, so that they stay in the cache."""


def mse_grid(x: Array, layout: BlockLayout, weights: Array | None = None) -> BlockGrid:
    """Return, for blocks `x` [n, blocks, block], the grids of least squared weight error among MSE_RATIOS.

    No block is worse off than with its whole range: a ratio is taken only where it is better than all before.

    Args:
        x: weights.
        layout: how they will be held.
        weights: float32 [blocks, block], by which each column's squared error counts; None is equally.
    """

    def losses(part: Array) -> Losses:
        ends = layout.ends(part)

        def at(ratio: float) -> Array:
            error = layout.grid_of(ends, ratio).round_trip(part)
            error -= part
            error *= error
            return np.asarray(error.sum(-1) if weights is None else np.einsum("ngb,gb->ng", error, weights))

        return at

    return layout.grid(x, _best_ratios(x, MSE_RATIOS, losses))


def awq_clip(x: Array, layout: BlockLayout, grams: Array) -> Array:
    """Return blocks `x` [n, blocks, block] clamped to +-c: c is, per row and block, that of AWQ_RATIOS times
    max|w| whose grid gives the least error of the layer's output.

    Args:
        x: weights.
        layout: how they will be held; the grid is that of the clamped weights.
        grams: float32 [blocks, block, block], X^T X of each block of input channels: with it the error is
            exact over all tokens, where the released code samples some.
    """

    def losses(part: Array) -> Losses:
        def at(ratio: float) -> Array:
            clamped = _clamped(part, ratio)
            return block_losses(layout.grid(clamped).round_trip(clamped) - part, grams)

        return at

    return _clamped(x, _best_ratios(x, AWQ_RATIOS, losses))


def _clamped(x: Array, ratio: float | Array) -> Array:
    limit = (np.abs(x).max(-1) * np.asarray(ratio, np.float32))[..., None]
    return np.clip(x, -limit, limit)


def _best_ratios(x: Array, ratios: Sequence[float], losses: Callable[[Array], Losses]) -> Array:
    """Return, for each row and block of `x`, the first ratio of least loss: float32 [n, blocks].

    Args:
        x: [n, blocks, block].
        ratios: the candidates.
        losses: takes some rows of `x`; returns what gives their losses [rows, blocks] at a ratio.
    """
    chosen = np.full(x.shape[:2], ratios[0], np.float32)
    rows = max(1, _AT_ONCE // max(1, x[0].size)) if len(x) else 1
    for start in range(0, len(x), rows):
        part, best = x[start : start + rows], chosen[start : start + rows]
        at = losses(part)
        least = at(ratios[0])
        for ratio in ratios[1:]:
            now = at(ratio)
            better = now < least
            best[better] = ratio
            least = np.minimum(least, now)
    return chosen
