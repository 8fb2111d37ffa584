# SPDX-License-Identifier: Apache-2.0
"""Signals that measure quantization itself: each layer in each of its precisions, one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from splitfold.passes.precision import Precision
from splitfold.passes.signals.deviations import local_errors, output_errors
from splitfold.passes.signals.signal import Basis, ByChoice, Scores, Signal
from splitfold.passes.signals.subject import Subject

__all__ = ["LocalError", "Sensitivity", "loss_scores"]


@dataclass(frozen=True)
class Sensitivity(Signal):
    """Measured sensitivity: the squared relative error of the model's outputs with one layer alone in a
    precision. The honest one, and the dearest: one partial run of the model a layer, choice and batch."""

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "sensitivity"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`."""
        return loss_scores(self.name, output_errors(subject, "the signal sensitivity"))


@dataclass(frozen=True)
class LocalError(Signal):
    """The squared relative error of the layer's own output, as if all layers mattered alike."""

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "local-error"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`."""
        return loss_scores(self.name, local_errors(subject, "the signal local-error"))


def loss_scores(name: str, errors: ByChoice) -> Scores:
    """Return the losses of each choice as scores; a layer's own number is their geometric mean."""
    return Scores(name, Basis.LOSS, {layer: _level(own) for layer, own in errors.items()}, errors)


def _level(errors: Mapping[Precision, float]) -> float:
    """Return the geometric mean of the errors that are neither 0 nor infinite: one number for a table."""
    logs = [math.log(error) for error in errors.values() if 0 < error < math.inf]
    return math.exp(math.fsum(logs) / len(logs)) if logs else 0.0
