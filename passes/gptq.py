# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round the columns one after the other, and let the columns not yet rounded make up for each error.

Frantar et al., 2023, algorithm 1, with H = X^T X of the layer's input. Three things differ from the released
code. It keeps the weights of dead input channels, rounded to nearest, where that sets them to zero. Rows that
compensation made worse are rounded to nearest. And the range of a block is searched by default.
"""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass

import numpy as np

from splitfold.passes.block_grid import BlockGrid, BlockLayout
from splitfold.passes.clip_search import mse_grid
from splitfold.passes.gram_loss import normalised, row_losses
from splitfold.runtime.feeds import Array

__all__ = ["Compensation", "Ranges", "compensated"]

logger = logging.getLogger(__name__)

_STRETCH = 128
"""Columns after which the errors of a stretch are passed on to all columns behind it at once."""
_LEAST_DAMPING = 1e-10
"""What is added first where the damping asked for is lost in rounding."""
_SMALL = 128
"""Triangular matrices up to this size are inverted at once."""


class Ranges(enum.Enum):
    """Which range the grid of a block is for."""

    WHOLE = "whole"
    """All of the block's weights, as published."""
    SEARCHED = "searched"
    """The one with the least squared error, each column's weighed by what it costs after compensation."""


@dataclass(frozen=True)
class Compensation:
    """Options of GPTQ.

    Attributes:
        damping: part of the mean diagonal of H that is added to its diagonal.
        act_order: round the columns in order of falling diagonal of H. Columns stay in their blocks, so the
            grids are those of the original weights.
        ranges: of the blocks.
    """

    damping: float = 0.01
    act_order: bool = False
    ranges: Ranges = Ranges.SEARCHED


def compensated(
    matrix: Array, layout: BlockLayout, gram: Array, options: Compensation
) -> tuple[Array, BlockGrid]:
    """Return the codes (float32 [n, blocks, block]) and grids of `matrix`.

    Args:
        matrix: float32 [n, k], one row an output channel.
        layout: how it will be held. The grid of a block is that of its weights as they stand when its turn
            comes, errors of earlier columns included.
        gram: float64 [k, k], X^T X of the layer's input.
        options: of the method.
    """
    order = np.argsort(-np.diag(gram), kind="stable") if options.act_order else np.arange(len(gram))
    sweep = _Sweep(matrix, layout, order, _inverse_factor(gram, order, options.damping), options)
    sweep.run()
    return _better_rows(matrix, layout, gram, sweep)


def _inverse_factor(gram: Array, order: Array, damping: float) -> Array:
    """Return the upper triangular U, float32, with U^T U = (H + damping)^-1, columns in `order`.

    H = R R^T with R upper triangular (Cholesky from the far end) gives U = R^-1 without inverting H.
    """
    turned = order[::-1]
    largest = float(gram.max(initial=0.0)) or 1.0  # of no use to the result: it keeps U within float32
    damped = gram[np.ix_(turned, turned)] / largest
    diagonal = np.einsum("ii->i", damped)
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if alive.any() else 1.0
    diagonal[~alive] = mean
    diagonal += damping * mean
    return np.ascontiguousarray(_inverse_of_lower(_cholesky(damped, mean))[::-1, ::-1], np.float32)


def _cholesky(damped: Array, mean: float) -> Array:
    """Return the lower factor; where rounding leaves the matrix indefinite its diagonal is raised further."""
    more = _LEAST_DAMPING
    while True:
        try:
            return np.asarray(np.linalg.cholesky(damped))
        except np.linalg.LinAlgError:
            logger.info("not positive definite: damped by %g more", more)
            np.einsum("ii->i", damped)[:] += more * mean
            more *= 10


def _inverse_of_lower(lower: Array) -> Array:
    """Return the inverse of a lower triangular matrix, by halves."""
    size = len(lower)
    if size <= _SMALL:
        return np.asarray(np.linalg.inv(lower))
    half = size // 2
    whole = np.zeros_like(lower)
    whole[:half, :half] = first = _inverse_of_lower(lower[:half, :half])
    whole[half:, half:] = second = _inverse_of_lower(lower[half:, half:])
    whole[half:, :half] = -second @ (lower[half:, :half] @ first)
    return whole


class _Sweep:
    """One pass over the columns: `rest` holds weights not yet rounded, turned [k, n] and in `order`."""

    def __init__(
        self, matrix: Array, layout: BlockLayout, order: Array, spread: Array, options: Compensation
    ) -> None:
        self.layout, self.order, self.spread, self.options = layout, order, spread, options
        self.costs = self._costs()
        self.rest = np.ascontiguousarray(matrix.T[order], np.float32)
        x = layout.blocked(matrix)
        self.grid = self._grid(x, self.costs) if options.act_order else layout.grid(x)
        self.codes = np.repeat(self.grid.zeros[..., None], layout.block, axis=-1)

    def _costs(self) -> Array:
        """Return what a unit of squared error costs in each column, float32 [blocks, block]."""
        k = len(self.order)
        costs = np.zeros(self.layout.blocks(k) * self.layout.block, np.float32)
        costs[self.order] = (np.diag(self.spread).min() / np.diag(self.spread)) ** 2
        return costs.reshape(-1, self.layout.block)

    def _grid(self, x: Array, costs: Array) -> BlockGrid:
        if self.options.ranges is Ranges.WHOLE:
            return self.layout.grid(x)
        return mse_grid(x, self.layout, costs)

    def run(self) -> None:
        """Round all columns."""
        k, stretch = len(self.order), max(_STRETCH, self.layout.block)
        for start in range(0, k, stretch):
            end = min(start + stretch, k)
            errors = np.stack([self._round(at, end) for at in range(start, end)])
            self.rest[end:] -= self.spread[start:end, end:].T @ errors

    def _round(self, at: int, end: int) -> Array:
        """Round column `at` of the order, pass its error on to the columns before `end`, and return the
        error [n], divided by the diagonal."""
        block, inside = divmod(int(self.order[at]), self.layout.block)
        if not self.options.act_order and inside == 0:
            self._settle(block, self.rest[at : at + self.layout.block].T)
        scale, zero = self.grid.scales[:, block], self.grid.zeros[:, block]
        codes = np.clip(np.rint(self.rest[at] / scale) + zero, self.grid.low, self.grid.high)
        self.codes[:, block, inside] = codes
        error = (self.rest[at] - (codes - zero) * scale) / self.spread[at, at]
        self.rest[at + 1 : end] -= np.multiply.outer(self.spread[at, at + 1 : end], error)
        return np.asarray(error)

    def _settle(self, block: int, columns: Array) -> None:
        found = self._grid(self.layout.blocked(columns), self.costs[block : block + 1])
        self.grid.scales[:, block], self.grid.zeros[:, block] = found.scales[:, 0], found.zeros[:, 0]
        self.codes[:, block] = found.zeros[:, :1]


def _better_rows(matrix: Array, layout: BlockLayout, gram: Array, sweep: _Sweep) -> tuple[Array, BlockGrid]:
    """Put those rows back to the nearest codes whose output is then closer."""
    x = layout.blocked(matrix)
    plain, grid, codes = layout.grid(x), sweep.grid, sweep.codes
    nearest = plain.codes(x)
    weighted = normalised(gram)

    def losses(on: BlockGrid, held: Array) -> Array:
        return row_losses((on.values(held) - x).reshape(len(x), -1)[:, : len(gram)], weighted)

    worse = losses(grid, codes) > losses(plain, nearest)
    codes[worse] = nearest[worse]
    grid.scales[worse], grid.zeros[worse] = plain.scales[worse], plain.zeros[worse]
    return codes, grid
