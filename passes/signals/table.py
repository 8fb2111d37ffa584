# SPDX-License-Identifier: Apache-2.0
"""The one table of signals, for the text form."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping

from splitfold.passes.signals.activations import ActivationKurtosis, InfinityNorm
from splitfold.passes.signals.baselines import Random, Reversed, Uniform
from splitfold.passes.signals.gradients import Fisher, GradientActivation
from splitfold.passes.signals.hessian import Hawq, HessianTrace
from splitfold.passes.signals.measured import LocalError, Sensitivity
from splitfold.passes.signals.relevance import LayerRelevance, RelevanceError
from splitfold.passes.signals.signal import Signal
from splitfold.passes.signals.taylor import FirstOrderTaylor, SecondOrderTaylor
from splitfold.passes.signals.weights import Farms, WeightKurtosis

__all__ = ["SignalKind", "make_signal"]


class SignalKind(enum.Enum):
    """Signals by their names in the text form."""

    SENSITIVITY = "sensitivity"
    LOCAL_ERROR = "local-error"
    RELEVANCE = "relevance"
    RELEVANCE_ERROR = "relevance-error"
    GRADIENT_ACTIVATION = "gradient-activation"
    TAYLOR = "taylor"
    TAYLOR_2 = "taylor-2"
    FISHER = "fisher"
    HESSIAN_TRACE = "hessian-trace"
    HAWQ_V2 = "hawq-v2"
    WEIGHT_KURTOSIS = "weight-kurtosis"
    ACTIVATION_KURTOSIS = "activation-kurtosis"
    INFINITY_NORM = "infinity-norm"
    FARMS = "farms"
    UNIFORM = "uniform"
    RANDOM = "random"


_MADE: Mapping[SignalKind, Callable[[], Signal]] = {
    SignalKind.SENSITIVITY: Sensitivity,
    SignalKind.LOCAL_ERROR: LocalError,
    SignalKind.RELEVANCE: LayerRelevance,
    SignalKind.RELEVANCE_ERROR: RelevanceError,
    SignalKind.GRADIENT_ACTIVATION: GradientActivation,
    SignalKind.TAYLOR: FirstOrderTaylor,
    SignalKind.TAYLOR_2: SecondOrderTaylor,
    SignalKind.FISHER: Fisher,
    SignalKind.HESSIAN_TRACE: HessianTrace,
    SignalKind.HAWQ_V2: Hawq,
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
