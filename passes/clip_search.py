# SPDX-License-Identifier: Apache-2.0
"""Range search: per row and block, the smaller range that costs less than the whole one.

A smaller range has finer steps and cuts off the largest weights. Two losses: the error of the weights alone,
and the error of the layer's output on calibration data (the clip search of AWQ, Lin et al., 2024, and its
released code).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from splitfold.passes.block_grid import BlockGrid, BlockLayout
from splitfold.runtime.feeds import Array

__all__ = ["AWQ_RATIOS", "MSE_RATIOS", "awq_clip", "mse_grid", "output_losses"]

AWQ_RATIOS = tuple(1 - step / 20 for step in range(10))
"""Of max|w|: 1, .95, ..., .55, as in the released code."""
MSE_RATIOS = tuple(1 - step / 50 for step in range(36))
"""Of the range: 1, .98, ..., .30. Normal weights of 2 bits in blocks of 256 want about .45."""

_AT_ONCE = 2**18
"""Weights that are tried at a time, so that they stay in the cache."""


def mse_grid(x: Array, layout: BlockLayout) -> BlockGrid:
    """Return, for blocks `x` [n, blocks, block], the grids of least squared weight error among MSE_RATIOS.

    No block is worse off than with its whole range: a ratio is taken only where it is better than all before.
    """

    def best(part: Array) -> BlockGrid:
        def candidate(ratio: float) -> tuple[Array, BlockGrid]:
            grid = layout.grid(part, ratio)
            error = grid.round_trip(part)
            error -= part
            return np.asarray(np.einsum("...b,...b->...", error, error)), grid

        return _least(map(candidate, MSE_RATIOS))

    return _joined([best(part) for part in _parts(x)])


def awq_clip(x: Array, layout: BlockLayout, grams: Array) -> tuple[Array, BlockGrid]:
    """Return blocks `x` [n, blocks, block] clamped to +-c, and their grids: c is, per row and block, that of
    AWQ_RATIOS times max|w| with the least error of the layer's output.

    Args:
        x: weights.
        layout: how they will be held.
        grams: [blocks, block, block], X^T X of each block of input channels: with it the error is exact over
            all tokens, where the released code samples some.
    """

    def best(part: Array) -> tuple[Array, BlockGrid]:
        peak = np.abs(part).max(-1, keepdims=True)
        limits = np.ones((*part.shape[:-1], 1), np.float32)

        def candidate(ratio: float) -> tuple[Array, BlockGrid, Array]:
            limit = peak * np.float32(ratio)
            clamped = np.clip(part, -limit, limit)
            grid = layout.grid(clamped)
            return output_losses(grid.round_trip(clamped) - part, grams), grid, limit

        grid = _least_of(map(candidate, AWQ_RATIOS), limits)
        return np.clip(part, -limits, limits), grid

    found = [best(part) for part in _parts(x)]
    return np.concatenate([clamped for clamped, _ in found]), _joined([grid for _, grid in found])


def output_losses(errors: Array, grams: Array) -> Array:
    """Return e^T G e per row and block: float32 [n, blocks].

    Args:
        errors: weight errors, float32 [n, blocks, block].
        grams: float32 [blocks, block, block].
    """
    turned = np.ascontiguousarray(errors.transpose(1, 0, 2))
    product = turned @ grams
    return np.asarray(np.einsum("gnb,gnb->ng", product, turned))
