# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round the columns one after the other, and let the columns not yet rounded make up for each error.

Frantar et al., 2023, algorithm 1, with H = X^T X of the layer's input. Unlike the released code it keeps the
weights of dead input channels (rounded to nearest) where that sets them to zero, and it keeps rows rounded to
nearest where compensation made them worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitfold.passes.block_grid import BlockGrid, BlockLayout
from splitfold.runtime.feeds import Array

__all__ = ["Compensation", "compensated", "row_losses"]

_STRETCH = 128
"""Columns after which the errors of a stretch are passed on to all columns behind it at once."""


@dataclass(frozen=True)
class Compensation:
    """Options of GPTQ.

    Attributes:
        damping: part of the mean diagonal of H that is added to its diagonal.
        act_order: round the columns in order of falling diagonal of H. Columns stay in their blocks, so the
            scales are those of the original weights.
    """

    damping: float = 0.01
    act_order: bool = False


def compensated(
    matrix: Array, layout: BlockLayout, gram: Array, options: Compensation
) -> tuple[Array, BlockGrid]:
    """Return the codes (float32 [n, blocks, block]) and grids of `matrix`.

    Args:
        matrix: float32 [n, k], one row an output channel.
        layout: how it will be held. The scales of a block come from its weights as they stand when its turn
            comes, errors of earlier columns included.
        gram: float64 [k, k], X^T X of the layer's input.
        options: of the method.

    Raises:
        numpy.linalg.LinAlgError: the damped matrix is not positive definite.
    """
    order = np.argsort(-np.diag(gram), kind="stable") if options.act_order else np.arange(len(gram))
    spread = _inverse_factor(gram[np.ix_(order, order)], options.damping)
    codes, grid = _round_in_turn(matrix, layout, order, spread, static=options.act_order)
    return _better_rows(matrix, layout, gram, codes, grid)


def _inverse_factor(gram: Array, damping: float) -> Array:
    """Return the upper triangular U, float32, with U^T U = (H + damping)^-1.

    H = R R^T with R upper triangular (Cholesky from the far end) gives U = R^-1 without inverting H.
    """
    damped = gram.copy()
    diagonal = np.einsum("ii->i", damped)
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if alive.any() else 1.0
    diagonal[~alive] = mean
    diagonal += damping * mean
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return np.asarray(np.linalg.inv(lower[::-1, ::-1]), np.float32)


def _round_in_turn(
    matrix: Array, layout: BlockLayout, order: Array, spread: Array, *, static: bool
) -> tuple[Array, BlockGrid]:
    """Return codes and grids; `order` holds the columns as they are rounded, `spread` is in that order."""
    turn = _Turn(matrix, layout, order, spread)
    if static:
        turn.set_grid(slice(None), layout.blocked(matrix))
    k = len(order)
    stretch = max(_STRETCH, layout.block)
    for start in range(0, k, stretch):
        end = min(start + stretch, k)
        errors = np.empty((end - start, len(matrix)), np.float32)
        for at in range(start, end):
            if not static and at % layout.block == 0:
                turn.begin_block(at)
            errors[at - start] = turn.round_column(at, end)
        turn.rest[end:] -= spread[start:end, end:].T @ errors
    return turn.result()


class _Turn:
    """The state of a sweep over the columns: weights not yet rounded, turned [k, n], and what is settled."""

    def __init__(self, matrix: Array, layout: BlockLayout, order: Array, spread: Array) -> None:
        n, k = matrix.shape
        self.layout, self.order, self.spread = layout, order, spread
        self.rest = np.ascontiguousarray(matrix.T[order], np.float32)
        self.grid = layout.grid(np.zeros((n, layout.blocks(k), layout.block), np.float32))
        self.codes = np.repeat(self.grid.zeros[..., None], layout.block, axis=-1)

    def set_grid(self, where: slice, x: Array) -> None:
        """Take the range of blocks `x` [n, blocks, block] as the grids of the blocks `where`."""
        found = self.layout.grid(x)
        self.grid.scales[:, where], self.grid.zeros[:, where] = found.scales, found.zeros
        self.codes[:, where] = found.zeros[..., None]

    def begin_block(self, at: int) -> None:
        """Settle the grids of the block that begins with column `at`."""
        number = at // self.layout.block
        columns = self.rest[at : at + self.layout.block].T
        self.set_grid(slice(number, number + 1), self.layout.blocked(columns))

    def round_column(self, at: int, end: int) -> Array:
        """Round column `at` of the order, pass its error on to the columns before `end`, and return it
        [n], divided by the diagonal."""
        block, inside = divmod(int(self.order[at]), self.layout.block)
        scale, zero = self.grid.scales[:, block], self.grid.zeros[:, block]
        column = self.rest[at]
        codes = np.clip(np.rint(column / scale) + zero, self.grid.low, self.grid.high)
        self.codes[:, block, inside] = codes
        error = (column - (codes - zero) * scale) / self.spread[at, at]
        self.rest[at + 1 : end] -= np.multiply.outer(self.spread[at, at + 1 : end], error)
        return np.asarray(error)

    def result(self) -> tuple[Array, BlockGrid]:
        """Return codes [n, blocks, block] and grids."""
        return self.codes, self.grid


def _better_rows(
    matrix: Array, layout: BlockLayout, gram: Array, codes: Array, grid: BlockGrid
) -> tuple[Array, BlockGrid]:
    """Put rows back to the nearest codes where the layer's output is then closer."""
    x = layout.blocked(matrix)
    plain = layout.grid(x)
    nearest = plain.codes(x)
    padded = _padded(gram, x[0].size)
    losses = [row_losses(g.values(c) - x, padded) for c, g in ((codes, grid), (nearest, plain))]
    worse = losses[0] > losses[1]
    codes[worse] = nearest[worse]
    grid.scales[worse], grid.zeros[worse] = plain.scales[worse], plain.zeros[worse]
    return codes, grid
