# SPDX-License-Identifier: Apache-2.0
"""Signals that look at the weights alone: kurtosis, and the tail of the spectrum (FARMS)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from splitfold.passes.layers import Layer
from splitfold.passes.signals.signal import Basis, Scores, Signal
from splitfold.passes.signals.subject import Subject
from splitfold.runtime.feeds import Array

__all__ = ["Farms", "WeightKurtosis", "kurtosis", "tail_exponent"]

_BINS = 100
_PEAK_FROM, _PEAK_TO = 0.95, 1.5
_LEAST_TAIL = 10
"""Eigenvalues that a fit needs: with fewer, the exponent is noise."""


@dataclass(frozen=True)
class WeightKurtosis(Signal):
    """Fourth standardized moment of a layer's weights: 3 of a normal distribution, more with outliers, which
    waste the codes of a grid."""

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "weight-kurtosis"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`."""
        found = {layer.name: kurtosis(layer.weight_array()) for layer in subject.layers}
        return Scores(self.name, Basis.ORDER, found)


def kurtosis(values: Array) -> float:
    """Return m4 / m2^2 with central moments over all elements (any shape); 1 where they are all equal."""
    x = values.astype(np.float64).ravel()
    x = x - x.mean()
    second = float(np.mean(np.square(x)))
    return float(np.mean(np.square(np.square(x)))) / second**2 if second > 0 else 1.0


@dataclass(frozen=True)
class Farms(Signal):
    """FARMS (Hu et al., ICML 2025, arXiv 2506.06280): the exponent of the power law that the tail of the
    eigenvalues of W^T W follows, from square windows of the weight, which all have one aspect ratio.

    A smaller exponent is a heavier tail: a better trained layer, which the paper prunes less. That it should
    also keep more bits is our extension. The paper's windows are 2000 wide, 15 x 15 of them.

    Args:
        window: rows and columns of a window; less where the weight is smaller.
        steps: windows along each axis, evenly spaced; they may overlap.
    """

    window: int = 128
    steps: int = 3

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "farms"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`."""
        found = {layer.name: -self.exponent(layer) for layer in subject.layers}
        return Scores(self.name, Basis.ORDER, found)

    def exponent(self, layer: Layer) -> float:
        """Return the exponent of a layer; of a convolution's weight as a matrix [out, rest]."""
        weight = layer.weight_array()
        matrix = weight.reshape(weight.shape[0], -1) if weight.ndim != 2 else weight
        return tail_exponent(self._eigenvalues(matrix.astype(np.float64)))

    def _eigenvalues(self, matrix: Array) -> Array:
        size = min(self.window, *matrix.shape)
        starts = [
            sorted({*np.linspace(0, length - size, self.steps).astype(int).tolist()})
            for length in matrix.shape
        ]
        windows = (
            matrix[row : row + size, column : column + size] for row in starts[0] for column in starts[1]
        )
        return np.concatenate([np.square(np.linalg.svd(part, compute_uv=False)) for part in windows])


def tail_exponent(eigenvalues: Array) -> float:
    """Return the exponent alpha of p(x) ~ x^-alpha for x >= x_min, by maximum likelihood: 1 + n / sum
    ln(x / x_min), with the x_min near the histogram's peak at which the Kolmogorov-Smirnov distance is least.

    Args:
        eigenvalues: positive, any shape; those of 0 are left out.

    Returns:
        alpha, above 1; infinite where fewer than 10 eigenvalues are left or all are equal.
    """
    x = np.sort(eigenvalues[eigenvalues > 0].ravel())
    if len(x) < _LEAST_TAIL or x[0] == x[-1]:
        return math.inf
    counts, edges = np.histogram(np.log10(x), bins=_BINS)
    peak = 10 ** float(edges[int(np.argmax(counts))])
    starts = np.flatnonzero((x >= _PEAK_FROM * peak) & (x <= _PEAK_TO * peak))
    fits = [_fit(x[start:]) for start in starts if len(x) - start >= _LEAST_TAIL] or [_fit(x)]
    return min(fits)[1]


def _fit(tail: Array) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov distance and the exponent of sorted values from x_min on."""
    logs = np.log(tail / tail[0])
    total = float(logs.sum())
    if total == 0:
        return math.inf, math.inf
    alpha = 1 + len(tail) / total
    expected = 1 - np.exp((1 - alpha) * logs)
    seen = np.arange(len(tail)) / len(tail)
    return float(np.abs(expected - seen).max()), alpha
