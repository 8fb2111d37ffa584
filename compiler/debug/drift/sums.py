# SPDX-License-Identifier: Apache-2.0
"""The distance of a value from its reference, not fooled by the huge numbers that stand for minus infinity.

Masks hold -3.4e38 or -inf in places that nothing reads. Their energy would hide every other element, so an
element that is beyond 1e20, infinite or NaN in the reference is left out where its counterpart is too, with
the same sign. An element that is so on one side alone makes the deviation total: relative error infinite,
cosine 0, SQNR minus infinity. So does another shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from splitfold.runtime.compare import Deviation, Distance
from splitfold.runtime.feeds import Array

__all__ = ["SENTINEL", "TOTAL", "Sums", "ordinary"]

SENTINEL = 1e20
"""Magnitude above which a number stands for infinity."""
TOTAL = Deviation(math.inf, math.inf, 0.0, -math.inf, None)
"""The deviation of what cannot be further off: another shape, or NaN in one of the two."""
_CHUNK = 1 << 20
"""Elements taken at once: double precision copies of a whole value would need several times its bytes."""


def ordinary(array: Array) -> npt.NDArray[np.bool_]:
    """Return where the elements of `array` are numbers, neither sentinels nor infinite nor NaN.

    In float16 the largest number is a sentinel.
    """
    if array.dtype.kind != "f":
        return np.ones(array.shape, bool)
    if array.dtype == np.float16:
        return np.asarray(np.abs(array) < np.finfo(np.float16).max)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(array) <= SENTINEL)


@dataclass
class Sums:
    """Sums over pairs of arrays of one value, from which its deviation follows.

    Attributes:
        broken: why the two cannot be compared; empty where they can.
        one_sided: elements that are sentinels, infinite or NaN in one of the two alone.
        distance: the sums over all other elements that are not so in both.
    """

    broken: str = ""
    one_sided: int = 0
    distance: Distance = field(default_factory=Distance)

    def add(self, reference: Array, actual: Array) -> None:
        """Take in one pair of arrays, of floats, integers or Booleans: all are compared by value."""
        if reference.shape != actual.shape:
            self.broken = f"its shape is {list(actual.shape)}, the reference's {list(reference.shape)}"
            return
        x, y = np.ravel(reference), np.ravel(actual)
        for start in range(0, x.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            self._add(x[part], y[part])
        if reference.ndim and reference.shape[-1] > 1 and reference.size:
            self.distance.hits += int((reference.argmax(-1) == actual.argmax(-1)).sum())
            self.distance.rows += reference.size // reference.shape[-1]

    def _add(self, first: Array, second: Array) -> None:
        far_x, far_y = ~ordinary(first), ~ordinary(second)
        x, y = first.astype(np.float64), second.astype(np.float64)
        if far_x.any() or far_y.any():
            same = far_x & far_y & ((np.sign(x) == np.sign(y)) | (np.isnan(x) & np.isnan(y)))
            self.one_sided += int(((far_x | far_y) & ~same).sum())
            kept = ~(far_x | far_y)
            x, y = x[kept], y[kept]
        difference = y - x
        sums = self.distance
        sums.largest = max(sums.largest, float(np.abs(difference).max(initial=0.0)))
        # no BLAS: its threads and the runtime's, which spin, would wait for each other
        sums.noise += float(np.square(difference).sum())
        sums.signal += float(np.square(x).sum())
        sums.power += float(np.square(y).sum())
        sums.dot += float((x * y).sum())

    @property
    def complaint(self) -> str:
        """Words on why the deviation is total, or an empty text."""
        if self.one_sided and not self.broken:
            beyond = f"NaN, infinite or beyond {SENTINEL:.0e}"
            return f"{self.one_sided} elements are {beyond} in one of the two models alone"
        return self.broken

    def deviation(self) -> Deviation:
        """Return the deviation over all pairs so far."""
        return TOTAL if self.broken or self.one_sided else self.distance.deviation()
