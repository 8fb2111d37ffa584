# SPDX-License-Identifier: Apache-2.0
"""Signals from the curvature of a loss in the weights: the trace of its Hessian, and HAWQ-V2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from splitfold.passes.layer_cost import weight_count
from splitfold.passes.signals.deviations import measured_batches
from splitfold.passes.signals.held_weights import weight_errors
from splitfold.passes.signals.lifting import lifted_model, no_path
from splitfold.passes.signals.measured import loss_scores
from splitfold.passes.signals.signal import Basis, Scores, Signal
from splitfold.passes.signals.subject import Subject
from splitfold.runtime.padding import usual_padding
from splitfold.runtime.relevance.targets import OwnDistance, Target

__all__ = ["Hawq", "HessianTrace", "mean_traces"]


@dataclass(frozen=True)
class HessianTrace(Signal):
    """The mean eigenvalue of the loss's Hessian by a layer's weight, its trace over its size, times the
    squared norm of the weight.

    HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv:1911.03852) ranks layers by the mean eigenvalue. Times the
    weight's squared norm it becomes an importance: what a relative error of the weight costs, as an
    importance is multiplied with a relative squared error.

    Args:
        target: the loss; by default half the squared relative error of the outputs, which needs no labels.
        probes: random vectors of Hutchinson's estimate, for each batch.
        seed: of these.
    """

    target: Target = field(default_factory=OwnDistance)
    probes: int = 4
    seed: int = 0

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "hessian-trace"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`.

        Raises:
            UnsupportedError: torch is missing, an operator cannot be lifted, or no path leads to an output.
        """
        traces = mean_traces(subject, self.target, self.probes, self.seed, self.name)
        sizes = {
            layer.name: float(np.square(layer.weight_array(), dtype=np.float64).sum())
            for layer in subject.layers
        }
        return Scores(
            self.name,
            Basis.IMPORTANCE,
            {name: max(trace, 0.0) * sizes[name] for name, trace in traces.items()},
        )


@dataclass(frozen=True)
class Hawq(Signal):
    """HAWQ-V2 (arXiv:1911.03852, eq. 6): the mean eigenvalue of the Hessian times the squared norm of what
    the choice does to the weights. It looks at weights alone.

    Args:
        target: the loss; by default half the squared relative error of the outputs, which needs no labels.
        probes: random vectors of Hutchinson's estimate, for each batch.
        seed: of these.
    """

    target: Target = field(default_factory=OwnDistance)
    probes: int = 4
    seed: int = 0

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "hawq-v2"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`.

        Raises:
            UnsupportedError: torch is missing, an operator cannot be lifted, or no path leads to an output.
        """
        traces = mean_traces(subject, self.target, self.probes, self.seed, self.name)
        losses = {
            layer.name: {
                item: max(traces[layer.name], 0.0) * float(np.square(error, dtype=np.float64).sum())
                for item, error in weight_errors(subject, layer, self.name).items()
            }
            for layer in subject.layers
        }
        return loss_scores(self.name, losses)


def mean_traces(subject: Subject, target: Target, probes: int, seed: int, name: str) -> Mapping[str, float]:
    """Return for each layer the trace of the Hessian of `target` by its weight over the weight's size, mean
    over the batches.

    Raises:
        CalibrationError: there is no calibration data, or it does not fit.
        UnsupportedError: see the signals.
    """
    who = f"the signal {name}"
    batches, lifted = measured_batches(subject, who), lifted_model(subject, who)
    from splitfold.runtime.lift.hessian import hessian_traces

    weights = {layer.name: layer.weight.name or "" for layer in subject.layers}
    names, padding = tuple(weights.values()), usual_padding(subject.model)
    sums, sizes = dict.fromkeys(weights, 0.0), dict[str, float]()
    if batches:  # a first look, not counted, at how large the traces are
        sizes = hessian_traces(lifted, batches[0], target.at(0), names, seed=seed, padding=padding)
    for turn, feeds in enumerate(batches):
        found = hessian_traces(
            lifted,
            feeds,
            target.at(turn),
            names,
            probes=probes,
            seed=seed + turn + 1,
            padding=padding,
            sizes=sizes,
        )
        for layer in subject.layers:
            if weights[layer.name] not in found:
                raise no_path(layer, who)
            sums[layer.name] += found[weights[layer.name]]
    return {layer.name: sums[layer.name] / (len(batches) * weight_count(layer)) for layer in subject.layers}
