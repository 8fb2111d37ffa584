# SPDX-License-Identifier: Apache-2.0
"""Grids of 2 to 8 bits for a whole tensor: x is held as a code q in 0 ... 2^bits - 1, x = (q - zero point)
scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitfold.runtime.feeds import Array

__all__ = ["BitGrid", "bit_grid"]

_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class BitGrid:
    """A per-tensor grid of unsigned codes.

    Attributes:
        scale: worth of one code.
        zero_point: the code of 0.
        bits: width of a code, 2 to 8.
    """

    scale: np.float32
    zero_point: np.uint8
    bits: int

    @property
    def ends(self) -> tuple[np.float32, np.float32]:
        """The values of the lowest and of the highest code."""
        zero = np.float32(self.zero_point)
        return -zero * self.scale, (np.float32(2**self.bits - 1) - zero) * self.scale

    def codes(self, values: Array) -> Array:
        """Return the nearest codes of `values` (any float dtype), half to even, as uint8 of their shape."""
        codes = np.rint(values.astype(np.float32) / self.scale) + np.float32(self.zero_point)
        return np.asarray(np.clip(codes, 0, 2**self.bits - 1), np.uint8)

    def round_trip(self, values: Array) -> Array:
        """Return what the nearest codes of `values` stand for, in float32."""
        codes = self.codes(values).astype(np.float32)
        return np.asarray((codes - np.float32(self.zero_point)) * self.scale, np.float32)


def bit_grid(low: float, high: float, bits: int) -> BitGrid:
    """Return the asymmetric grid for values in [low, high], an interval that is widened to hold zero.

    With 8 bits it is `affine.activation_grid`.
    """
    low, high, top = min(float(low), 0.0), max(float(high), 0.0), 2**bits - 1
    scale = max((high - low) / top, _TINY)
    return BitGrid(np.float32(scale), np.uint8(np.clip(np.rint(-low / scale), 0, top)), bits)
