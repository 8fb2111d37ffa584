# SPDX-License-Identifier: Apache-2.0
"""DGQ, dual grained quantization: integer scales inside a channel, one float scale for all of it.

Zhang et al., 2023. A weight is (q - z) * S1 * s8: q has few bits, z and the integer S1 belong to a block, s8
to the output channel. As (q - z) * S1 fits in int8, the layer is one continuous int8 product. The grids are
those of the released code; its zero point, which may leave the codes, is forced into them, each candidate
starts from fresh weights, and the losses are those of all calibration data instead of the last batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitfold.passes.affine import BlockQuantized
from splitfold.passes.block_grid import BlockLayout
from splitfold.passes.gram_loss import block_losses, diagonal_blocks, normalised, row_losses
from splitfold.runtime.feeds import Array

__all__ = ["COARSE_RATIOS", "FINE_RATIOS", "DualGrained", "dual_grained"]

FINE_RATIOS = tuple(1.02 - 0.22 * (step + 1) / 20 for step in range(20))
"""Of a block's range: 1.009 ... 0.80."""
COARSE_RATIOS = tuple(1.02 - 0.82 * (step + 1) / 80 for step in range(80))
"""Of a channel's largest magnitude: 1.010 ... 0.20."""

_TINY = np.float32(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class DualGrained:
    """A matrix in DGQ's form: (codes - zero_points) * steps * scales.

    Attributes:
        codes: uint8 [n, blocks, block]; the last block is padded with the zero point.
        zero_points: uint8 [n, blocks].
        steps: int8 [n, blocks], S1, at least 1.
        scales: float32 [n], s8.
        bits: width of a code as stored.
        columns: columns before padding.
    """

    codes: Array
    zero_points: Array
    steps: Array
    scales: Array
    bits: int
    columns: int

    def integers(self) -> Array:
        """Return (codes - zero_points) * steps: int8 [n, columns]."""
        whole = (self.codes.astype(np.int16) - self.zero_points[..., None]) * self.steps[..., None]
        return np.asarray(whole.reshape(len(whole), -1)[:, : self.columns], np.int8)

    def block_wise(self) -> BlockQuantized:
        """Return the same weights with one float scale a block."""
        scales = self.steps.astype(np.float32) * self.scales[:, None]
        return BlockQuantized(self.codes, scales, self.zero_points, self.bits, self.columns)


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Blocks to round: weights [n, blocks, block], largest magnitudes [n], fine scales S' and zero points
    [n, blocks]."""

    x: Array
    peaks: Array
    fine: Array
    zeros: Array
    top: int
    levels: int

    def coarse(self, ratio: float) -> tuple[Array, Array]:
        """Return s8 [n] and S1 [n, blocks] at one ratio of the channels' largest magnitudes."""
        scales = (np.float32(ratio) * self.peaks / np.float32(self.levels)).astype(np.float32)
        scales = np.where(scales < _TINY, np.float32(1), scales).astype(np.float32)
        steps = np.clip(np.rint(self.fine / scales[:, None]), 1, self.levels)
        return scales, steps.astype(np.float32)

    def codes(self, scales: Array, steps: Array) -> Array:
        """Return q, float32: nearest to x, (q - z) * S1 within the int8 levels."""
        margin = np.floor(self.levels / steps)
        low = np.maximum(0, self.zeros - margin)[..., None]
        high = np.minimum(self.top, self.zeros + margin)[..., None]
        nearest = np.rint(self.x / (steps * scales[:, None])[..., None]) + self.zeros[..., None]
        return np.asarray(np.clip(nearest, low, high))

    def errors(self, scales: Array, steps: Array, columns: int) -> Array:
        """Return the weight errors [n, columns]."""
        held = (self.codes(scales, steps) - self.zeros[..., None]) * (steps * scales[:, None])[..., None]
        return np.asarray((held - self.x).reshape(len(held), -1)[:, :columns])


def dual_grained(matrix: Array, layout: BlockLayout, gram: Array, *, int8_levels: int = 127) -> DualGrained:
    """Return `matrix` in DGQ's form.

    Args:
        matrix: float32 [n, k], one row an output channel.
        layout: asymmetric.
        gram: float64 [k, k], X^T X of the layer's input; the identity asks for the least weight error.
        int8_levels: largest magnitude of (q - z) * S1: 127, or what the target's kernels stand.
    """
    k = len(gram)
    weighted = normalised(gram)
    x = layout.blocked(matrix)
    fine, zeros = _fine(x, layout, diagonal_blocks(weighted, layout.block))
    blocks = _Blocks(x, np.abs(x).max(axis=(1, 2), initial=0), fine, zeros, layout.levels - 1, int8_levels)
    scales, steps = blocks.coarse(COARSE_RATIOS[0])
    least = np.full(len(x), np.inf, np.float32)
    for ratio in COARSE_RATIOS:
        tried, tried_steps = blocks.coarse(ratio)
        losses = row_losses(blocks.errors(tried, tried_steps, k), weighted)
        better = losses < least
        least[better] = losses[better]
        scales[better], steps[better] = tried[better], tried_steps[better]
    codes = blocks.codes(scales, steps).astype(np.uint8)
    return DualGrained(codes, zeros.astype(np.uint8), steps.astype(np.int8), scales, layout.bits, k)


def _fine(x: Array, layout: BlockLayout, grams: Array) -> tuple[Array, Array]:
    """Return phase 1: the fine scale S' and zero point of each row and block, float32 [n, blocks].

    The zero point is that of the whole range, whatever the ratio; it lies on the codes as the range holds 0.
    """
    whole = layout.grid(x)
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    best, least = whole.scales.copy(), np.full(whole.scales.shape, np.inf, np.float32)
    for ratio in FINE_RATIOS:
        factor = np.asarray(ratio, np.float32)
        grid = layout.grid(x, factor)
        clipped = np.clip(x, (low * factor)[..., None], (high * factor)[..., None])
        losses = block_losses(grid.round_trip(clipped) - x, grams)
        better = losses < least
        least[better], best[better] = losses[better], grid.scales[better]
    return best, whole.zeros
