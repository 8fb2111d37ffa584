# SPDX-License-Identifier: Apache-2.0
"""The squared output error that weight errors cause, e^T G e with G = X^T X, summed over all tokens."""

from __future__ import annotations

import numpy as np

from splitfold.runtime.feeds import Array

__all__ = ["block_losses", "diagonal_blocks", "normalised", "row_losses"]

_TILE = 256
_TINY = float(np.finfo(np.float32).tiny)


def normalised(gram: Array) -> Array:
    """Return `gram` (or its diagonal blocks) in float32, divided by its largest element: losses are only
    compared."""
    return np.asarray(gram / max(float(np.abs(gram).max(initial=0.0)), _TINY), np.float32)


def block_losses(errors: Array, grams: Array) -> Array:
    """Return e^T G e per row and block, the other blocks left out: float32 [n, blocks].

    Args:
        errors: weight errors, float32 [n, blocks, block].
        grams: float32 [blocks, block, block].
    """
    turned = np.ascontiguousarray(errors.transpose(1, 0, 2))
    product = turned @ grams
    return np.asarray(np.einsum("gnb,gnb->ng", product, turned))


def row_losses(errors: Array, gram: Array) -> Array:
    """Return e^T G e per row: float32 [n].

    Args:
        errors: weight errors, float32 [n, k].
        gram: float32 [k, k]; only its upper triangle of tiles is read.
    """
    total = np.zeros(len(errors), np.float32)
    for start in range(0, errors.shape[1], _TILE):
        left = errors[:, start : start + _TILE]
        product = left @ gram[start : start + _TILE, start:]
        product[:, left.shape[1] :] *= 2
        total += np.einsum("nk,nk->n", product, errors[:, start:])
    return total


def diagonal_blocks(gram: Array, block: int) -> Array:
    """Return the blocks on the diagonal of [k, k] as float32 [blocks, block, block], the last padded with
    zeros."""
    k = len(gram)
    blocks = np.zeros((-(-k // block), block, block), np.float32)
    for number, start in enumerate(range(0, k, block)):
        part = gram[start : start + block, start : start + block]
        blocks[number, : len(part), : len(part)] = part
    return blocks
