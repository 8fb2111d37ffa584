# SPDX-License-Identifier: Apache-2.0
"""What a signal has to beat: the same for all layers, chance, and its own reverse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from splitfold.passes.precision import Precision
from splitfold.passes.signals.signal import Basis, Scores, Signal
from splitfold.passes.signals.subject import Subject

__all__ = ["Random", "Reversed", "Uniform"]


@dataclass(frozen=True)
class Uniform(Signal):
    """No layer matters more than another: every weight counts alike."""

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "uniform"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`."""
        return Scores(self.name, Basis.ORDER, {layer.name: 1.0 for layer in subject.layers})


@dataclass(frozen=True)
class Random(Signal):
    """A random order of the layers, the same for the same seed and layers."""

    seed: int = 0

    @property
    def name(self) -> str:
        """See `Signal`."""
        return f"random (seed {self.seed})"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`."""
        order = np.random.default_rng(self.seed).permutation(len(subject.layers)).tolist()
        return Scores(
            self.name,
            Basis.ORDER,
            {layer.name: float(at) for layer, at in zip(subject.layers, order, strict=True)},
        )


@dataclass(frozen=True)
class Reversed(Signal):
    """Another signal upside down: the layer that it ranks highest gets the lowest score, and so on."""

    signal: Signal

    @property
    def name(self) -> str:
        """See `Signal`."""
        return f"reversed {self.signal.name}"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`."""
        found = self.signal.scores(subject)
        ranked = sorted(found.by_layer, key=lambda layer: found.by_layer[layer])
        swapped = {
            layer: found.by_layer[other] for layer, other in zip(ranked, reversed(ranked), strict=True)
        }
        by_choice = {
            layer: _scaled(own, found.by_layer[layer], swapped[layer])
            for layer, own in found.by_choice.items()
        }
        return replace(found, signal=self.name, by_layer=swapped, by_choice=by_choice)


def _scaled(losses: Mapping[Precision, float], before: float, after: float) -> dict[Precision, float]:
    """Return the losses of a layer at the level of another one; a layer without a level keeps them."""
    factor = after / before if before > 0 else 1.0
    return {item: loss * factor for item, loss in losses.items()}
