# SPDX-License-Identifier: Apache-2.0
"""What each choice of each layer is expected to cost, from the scores of a signal.

Losses of layers add up, as independent errors do to first order: an assumption, which holds worse the fewer
bits all layers have at once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import numpy as np

from splitfold.passes.layer_cost import weight_count
from splitfold.passes.precision import Precision
from splitfold.passes.signals.deviations import local_errors
from splitfold.passes.signals.signal import Basis, ByChoice, Scores
from splitfold.passes.signals.subject import Subject

__all__ = ["ErrorModel", "expected_losses", "shifts"]

_SHIFT = 2.0
"""Bits a weight that the layer of highest order gets above the mean, and the lowest below."""
_FLOAT_BITS = 32


class ErrorModel(enum.Enum):
    """How large the relative error of a layer's output is in a precision, for signals that give no losses."""

    MEASURED = "measured"
    """As measured on calibration data, on the layer alone."""
    BITS = "bits"
    """4^-b for the weights and for the activations: a step of a grid halves with each bit."""


def expected_losses(scores: Scores, subject: Subject, model: ErrorModel) -> ByChoice:
    """Return the expected loss of each choice of each layer.

    - A signal of losses gives them itself.
    - An importance is multiplied with the relative squared error of the layer's output.
    - An order counts as an importance of weights x 4^shift, the shift between -2 and 2 bits, evenly by rank:
      under the error 4^-b the best number of bits is the mean plus the shift (the closed form of bit
      allocation), so that the extremes are 4 bits apart.

    Raises:
        CalibrationError: measured errors without calibration data.
    """
    if scores.basis is Basis.LOSS:
        return scores.by_choice
    measured = local_errors(subject, f"error={model.value}") if model is ErrorModel.MEASURED else {}
    importance = scores.by_layer if scores.basis is Basis.IMPORTANCE else _weighted(scores.by_layer, subject)
    return {
        layer: {
            item: importance[layer] * (measured[layer][item] if measured else _by_bits(item)) for item in own
        }
        for layer, own in subject.choices.items()
    }


def _weighted(statistic: Mapping[str, float], subject: Subject) -> dict[str, float]:
    up = shifts(statistic)
    return {layer.name: weight_count(layer) * 4 ** up[layer.name] for layer in subject.layers}


def shifts(statistic: Mapping[str, float]) -> dict[str, float]:
    """Return for each layer a shift in bits between -2 and 2, evenly spaced by rank; ties share the mean."""
    names, values = list(statistic), np.array(list(statistic.values()))
    if len(names) < 2:
        return dict.fromkeys(names, 0.0)
    below = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    ranks = below + (equal - 1) / 2
    return dict(zip(names, (_SHIFT * (2 * ranks / (len(names) - 1) - 1)).tolist(), strict=True))


def _by_bits(precision: Precision) -> float:
    bits = (precision.weight_bits, precision.activation_bits)
    return float(sum(4.0**-width for width in bits if width < _FLOAT_BITS))
