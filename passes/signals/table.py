# SPDX-License-Identifier: Apache-2.0
"""The one table of signals, for the text form."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping

from splitfold.passes.signals.activations import ActivationKurtosis, InfinityNorm
from splitfold.passes.signals.baselines import Random, Reversed, Uniform
from splitfold.passes.signals.measured import LocalError, Sensitivity
from splitfold.passes.signals.signal import Signal
from splitfold.passes.signals.weights import Farms, WeightKurtosis

__all__ = ["SignalKind", "make_signal"]


class SignalKind(enum.Enum):
    """Signals by their names in the text form."""

    SENSITIVITY = "sensitivity"
    LOCAL_ERROR = "local-error"
    WEIGHT_KURTOSIS = "weight-kurtosis"
    ACTIVATION_KURTOSIS = "activation-kurtosis"
    INFINITY_NORM = "infinity-norm"
    FARMS = "farms"
    UNIFORM = "uniform"
    RANDOM = "random"


_MADE: Mapping[SignalKind, Callable[[], Signal]] = {
    SignalKind.SENSITIVITY: Sensitivity,
    SignalKind.LOCAL_ERROR: LocalError,
    SignalKind.WEIGHT_KURTOSIS: WeightKurtosis,
    SignalKind.ACTIVATION_KURTOSIS: ActivationKurtosis,
    SignalKind.INFINITY_NORM: InfinityNorm,
    SignalKind.FARMS: Farms,
    SignalKind.UNIFORM: Uniform,
}


def make_signal(kind: SignalKind, *, seed: int = 0, turned: bool = False) -> Signal:
    """Return the signal of this kind; `seed` is that of the random one, `turned` puts it upside down."""
    signal = Random(seed) if kind is SignalKind.RANDOM else _MADE[kind]()
    return Reversed(signal) if turned else signal
