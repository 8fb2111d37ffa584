# SPDX-License-Identifier: Apache-2.0
"""Signals that look at the layers' inputs over calibration data: kurtosis and infinity norm, streamed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitfold.passes.activations import required_calibration
from splitfold.passes.signals.signal import Basis, Scores, Signal
from splitfold.passes.signals.subject import Subject
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Optimization, Session

__all__ = ["ActivationKurtosis", "InfinityNorm"]


@dataclass(frozen=True)
class ActivationKurtosis(Signal):
    """Fourth standardized moment of a layer's input over all elements of the calibration data."""

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "activation-kurtosis"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`."""
        return Scores(
            self.name, Basis.ORDER, {name: sums.kurtosis() for name, sums in _seen(subject, self).items()}
        )


@dataclass(frozen=True)
class InfinityNorm(Signal):
    """Largest magnitude in a layer's input over the calibration data: what one grid has to span."""

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "infinity-norm"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`."""
        return Scores(
            self.name, Basis.ORDER, {name: sums.largest for name, sums in _seen(subject, self).items()}
        )


@dataclass
class _Moments:
    """Count, mean and central sums of the second to fourth power; batches are merged after Pébay, "Formulas
    for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical Moments", Sandia
    SAND2008-6212, 2008."""

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0
    largest: float = 0.0

    def add(self, array: Array) -> None:
        x = array[np.isfinite(array)].astype(np.float64)
        if not x.size:
            return
        self.largest = max(self.largest, float(np.abs(x).max()))
        mean = float(x.mean())
        x -= mean
        squares = np.square(x)
        other = _Moments(
            x.size, mean, float(squares.sum()), float((squares * x).sum()), float(np.square(squares).sum())
        )
        self._merge(other)

    def _merge(self, b: _Moments) -> None:
        n, delta = self.count + b.count, b.mean - self.mean
        share = self.count * b.count / n
        self.fourth += (
            b.fourth
            + delta**4 * share * (self.count**2 - self.count * b.count + b.count**2) / n**2
            + 6 * delta**2 * (self.count**2 * b.second + b.count**2 * self.second) / n**2
            + 4 * delta * (self.count * b.third - b.count * self.third) / n
        )
        self.third += (
            b.third
            + delta**3 * share * (self.count - b.count) / n
            + 3 * delta * (self.count * b.second - b.count * self.second) / n
        )
        self.second += b.second + delta**2 * share
        self.mean += delta * b.count / n
        self.count = n

    def kurtosis(self) -> float:
        """Return m4 / m2^2; 1 where all elements are equal."""
        return self.fourth * self.count / self.second**2 if self.second > 0 else 1.0


def _seen(subject: Subject, signal: Signal) -> dict[str, _Moments]:
    """Return the moments of each layer's input, by layer name."""
    data = required_calibration(subject.context.calibration, f"the signal {signal.name}", subject.model)
    inputs = {layer.name: layer.input.name or "" for layer in subject.layers}
    taps = list(dict.fromkeys(inputs.values()))
    moments = {name: _Moments() for name in taps}
    session = Session(subject.model, subject.context.target, optimization=Optimization.ALL, taps=taps)
    for feeds in data:
        results = session.run(feeds, taps)
        for name in taps:
            moments[name].add(results[name])
    return {layer: moments[name] for layer, name in inputs.items()}
