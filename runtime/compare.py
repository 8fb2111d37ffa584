# SPDX-License-Identifier: Apache-2.0
"""How far two sets of outputs are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitfold.runtime.feeds import Array

__all__ = ["Deviation", "Distance", "Exactness", "deviation", "exactness", "first_non_finite", "worst"]


_TIES = 1e-3
"""Share of integer elements that may differ between equal outputs."""


@dataclass(frozen=True)
class Deviation:
    """The distance of an output from its reference, over all elements of all runs.

    Attributes:
        max_abs: largest absolute difference.
        relative: L2 norm of the difference over L2 norm of the reference; 0 is equal.
        cosine: cosine of the two, flattened; 1 is equal.
        sqnr_db: 20 log10 of 1 / `relative`, in decibel; infinite is equal.
        top1: share of rows (last axis) whose largest element agrees; None where the last axis has fewer than
            two elements.
    """

    max_abs: float
    relative: float
    cosine: float
    sqnr_db: float
    top1: float | None

    def __str__(self) -> str:
        top1 = "" if self.top1 is None else f", top-1 agreement {self.top1:.3f}"
        return f"cosine {self.cosine:.5f}, SQNR {self.sqnr_db:.1f} dB, max {self.max_abs:.3g}{top1}"


@dataclass(frozen=True)
class Exactness:
    """How equal two outputs are up to re-association: the largest |difference| over (atol + rtol
    |reference|).

    At most 1 is equal. `atol` is `rtol` times the reference's root mean square, so that cancellation does not
    count.
    """

    excess: float
    max_abs: float


def _numeric(array: Array) -> bool:
    return array.dtype.kind in "fiub"


@dataclass
class Distance:
    """Sums over pairs of arrays, from which the deviation over all of them follows; nothing else is kept."""

    largest: float = 0.0
    noise: float = 0.0
    signal: float = 0.0
    power: float = 0.0
    dot: float = 0.0
    hits: int = 0
    rows: int = 0

    def add(self, reference: Array, actual: Array) -> None:
        """Take in one pair; an array that is not numeric is passed over.

        Raises:
            ValueError: the shapes differ.
        """
        if not _numeric(reference):
            return
        x, y = _aligned(reference, actual)
        difference = y - x
        # a NaN must win: max(0.0, nan) would drop it
        self.largest = float(np.maximum(self.largest, np.abs(difference).max(initial=0.0)))
        self.noise += float(np.vdot(difference, difference))
        self.signal += float(np.vdot(x, x))
        self.power += float(np.vdot(y, y))
        self.dot += float(np.vdot(x, y))
        if reference.ndim and reference.shape[-1] > 1 and reference.size:
            self.hits += int((x.argmax(-1) == y.argmax(-1)).sum())
            self.rows += reference.size // reference.shape[-1]

    def deviation(self) -> Deviation:
        """Return the deviation over all pairs so far."""
        noise, signal, power = self.noise, self.signal, self.power
        relative = math.sqrt(noise / signal) if signal else (0.0 if noise == 0 else math.inf)
        cosine = self.dot / math.sqrt(signal * power) if signal and power else float(signal == power)
        sqnr = (
            -20 * math.log10(relative)
            if 0 < relative < math.inf
            else (math.inf if relative == 0 else -math.inf)
        )
        return Deviation(self.largest, relative, cosine, sqnr, self.hits / self.rows if self.rows else None)


def deviation(reference: Iterable[Array], actual: Iterable[Array]) -> Deviation:
    """Return the deviation over pairs of arrays of equal shape (any float or integer dtype, summed in
    float64).

    Equal infinities at equal places count as equal. An integer or Boolean array is compared by value.
    """
    distance = Distance()
    for r, a in zip(reference, actual, strict=True):
        distance.add(r, a)
    return distance.deviation()


def _aligned(reference: Array, actual: Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if reference.shape != actual.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {actual.shape}")
    x = reference.astype(np.float64)
    y = actual.astype(np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    special = same & ~np.isfinite(x)
    return np.where(special, 0.0, x), np.where(special, 0.0, y)


def exactness(reference: Array, actual: Array, *, rtol: float) -> Exactness:
    """Return how equal two arrays are; non-numeric ones are equal or infinitely apart.

    Of integers (indices, codes, flags) one in a thousand may differ: re-association can break a tie.
    """
    if reference.shape != actual.shape or reference.dtype != actual.dtype:
        return Exactness(math.inf, math.inf)
    if not _numeric(reference):
        return Exactness(0.0, 0.0) if np.array_equal(reference, actual) else Exactness(math.inf, math.inf)
    x, y = _aligned(reference, actual)
    difference = np.abs(y - x)
    if not difference.size:
        return Exactness(0.0, 0.0)
    if reference.dtype.kind != "f":
        return Exactness(float(np.mean(difference > 0)) / _TIES, float(difference.max()))
    if not np.isfinite(difference).all():  # NaN or infinity on one side alone
        return Exactness(math.inf, math.inf)
    scale = rtol * (np.abs(x) + math.sqrt(float(np.mean(np.square(x)))))
    excess = np.divide(difference, scale, out=np.where(difference > 0, math.inf, 0.0), where=scale > 0)
    return Exactness(float(excess.max()), float(difference.max()))


def worst(deviations: Mapping[str, Deviation]) -> tuple[str, Deviation] | None:
    """Return the output with the lowest SQNR, or None where there is no output."""
    return min(deviations.items(), key=lambda item: item[1].sqnr_db, default=None)


def first_non_finite(outputs: Mapping[str, Array]) -> str | None:
    """Return the name of the first float output that holds NaN or infinity, or None."""
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return name
    return None
