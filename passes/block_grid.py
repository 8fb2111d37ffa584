# SPDX-License-Identifier: Apache-2.0
"""Grids of block-wise weights: how blocks of columns are laid out, and which codes a block has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitfold.runtime.feeds import Array

__all__ = ["BlockGrid", "BlockLayout"]

_TINY = np.float32(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class BlockGrid:
    """One grid a block: the code c stands for (c - zero) * scale.

    Attributes:
        scales: float32, one a block; negative where a symmetric grid has its longer side up.
        zeros: float32, whole numbers, of the shape of `scales`.
        low, high: the codes that may be used.
    """

    scales: Array
    zeros: Array
    low: int
    high: int

    def codes(self, x: Array) -> Array:
        """Return the nearest codes (float32, whole numbers) of `x`, whose last axis runs inside a block."""
        codes = x / self.scales[..., None]
        np.rint(codes, out=codes)
        codes += self.zeros[..., None]
        return np.clip(codes, self.low, self.high, out=codes)

    def values(self, codes: Array) -> Array:
        """Return what `codes` (float32) stand for, in float32."""
        return np.asarray((codes - self.zeros[..., None]) * self.scales[..., None], np.float32)

    def round_trip(self, x: Array) -> Array:
        """Return the values of the nearest codes of `x`."""
        return self.values(self.codes(x))


@dataclass(frozen=True)
class BlockLayout:
    """How weights are held in blocks of columns.

    Attributes:
        bits: width of a stored code: 2, 4 or 8.
        block: columns that share a scale.
        symmetric: one fixed zero point, 2**(bits-1), for all blocks.
        levels: distinct codes, at most 2**bits: 8 codes in 4 bits is a 3-bit weight.
    """

    bits: int
    block: int
    symmetric: bool
    levels: int

    def blocks(self, columns: int) -> int:
        """Return how many blocks `columns` columns take, the last one padded."""
        return -(-columns // self.block)

    def blocked(self, matrix: Array) -> Array:
        """Return a copy of [n, k] as float32 [n, blocks, block], padded with zeros."""
        n, k = matrix.shape
        padded = np.zeros((n, self.blocks(k) * self.block), np.float32)
        padded[:, :k] = matrix
        return padded.reshape(n, -1, self.block)

    def grid(self, x: Array, shrink: float | Array = 1.0) -> BlockGrid:
        """Return the grids of blocks `x` [..., block], each for the block's own range (widened to hold zero)
        times `shrink` (one, or one a block)."""
        return self.grid_of(self.ends(x), shrink)

    def ends(self, x: Array) -> tuple[Array, Array]:
        """Return the lowest and highest element of each block, zero included; of a symmetric layout twice the
        element of largest magnitude."""
        if not self.symmetric:
            return np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
        position = np.abs(x).argmax(-1)[..., None]
        peak = np.take_along_axis(x, position, -1)[..., 0]
        return peak, peak

    def grid_of(self, ends: tuple[Array, Array], shrink: float | Array = 1.0) -> BlockGrid:
        """Return the grids of blocks with these `ends`, times `shrink`."""
        factor = np.asarray(shrink, np.float32)
        if self.symmetric:
            return self._symmetric(ends[0] * factor)
        return self._asymmetric(ends[0] * factor, ends[1] * factor)

    def _symmetric(self, peak: Array) -> BlockGrid:
        """Map the element of largest magnitude to the code -levels/2 exactly, whatever its sign.

        The signed scale uses all codes, as the grid has one more on the negative side.
        """
        half = 2 ** (self.bits - 1)
        scale = (peak / -(self.levels // 2)).astype(np.float32)
        scale = np.where(np.abs(scale) < _TINY, np.float32(1), scale).astype(np.float32)
        zeros = np.full(scale.shape, half, np.float32)
        return BlockGrid(scale, zeros, half - self.levels // 2, half + self.levels // 2 - 1)

    def _asymmetric(self, low: Array, high: Array) -> BlockGrid:
        scale = ((high - low) / (self.levels - 1)).astype(np.float32)
        scale = np.where(scale < _TINY, np.float32(1), scale).astype(np.float32)
        zeros = np.clip(np.rint(-low / scale), 0, self.levels - 1).astype(np.float32)
        return BlockGrid(scale, zeros, 0, self.levels - 1)
