# SPDX-License-Identifier: Apache-2.0
"""Signals from one run forward and one backward a batch: gradient times activation, and the Fisher
information of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from splitfold.passes.layers import Layer
from splitfold.passes.signals.deviations import measured_batches
from splitfold.passes.signals.held_weights import weight_errors
from splitfold.passes.signals.lifting import lifted_model, no_path, samples_of
from splitfold.passes.signals.measured import loss_scores
from splitfold.passes.signals.signal import Basis, Scores, Signal
from splitfold.passes.signals.subject import Subject
from splitfold.runtime.feeds import Array
from splitfold.runtime.padding import usual_padding
from splitfold.runtime.relevance.targets import EmbeddingNorm, RandomProjection, Target

__all__ = ["Fisher", "GradientActivation"]


@dataclass(frozen=True)
class GradientActivation(Signal):
    """The sum over a layer's output of |activation times gradient|, mean over samples, over the sum of all
    layers: what relevance comes to without rules, and the control for it.

    Args:
        target: what of the outputs is differentiated.
    """

    target: Target = field(default_factory=EmbeddingNorm)

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "gradient-activation"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`.

        Raises:
            UnsupportedError: torch is missing, an operator cannot be lifted, or no path leads to an output.
        """
        sums = dict.fromkeys((layer.name for layer in subject.layers), 0.0)
        for batch in _batches(subject, self.target, self.name):
            for layer in subject.layers:
                value, gradient = batch.at(layer.output.name, layer)
                sums[layer.name] += float((value * gradient).abs().double().sum())
        total = math.fsum(sums.values())
        return Scores(
            self.name,
            Basis.IMPORTANCE,
            {layer: found / total if total else 0.0 for layer, found in sums.items()},
        )


@dataclass(frozen=True)
class Fisher(Signal):
    """sum_m F_m dw_m^2, with dw what the choice really does to the weights and F_m the mean over samples of
    the squared derivative by weight m: the diagonal of the Fisher information in the place of the Hessian
    (LeCun et al., Optimal Brain Damage, 1989; Theis et al., arXiv:1801.05787).

    By default samples are drawn from what the outputs themselves say, with Gaussian noise, so that no labels
    are needed, and the loss is in units of the squared relative error of the outputs. It looks at weights
    alone: what a choice does to activations costs nothing here.

    Args:
        target: what is differentiated; a log-likelihood for the Fisher information in the strict sense.
    """

    target: Target = field(default_factory=RandomProjection)

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "fisher"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`.

        Raises:
            UnsupportedError: torch is missing, an operator cannot be lifted, or no path leads to an output.
        """
        diagonals, samples = _diagonals(subject, self.target, self.name)
        losses = {
            layer.name: {
                item: float(np.vdot(diagonals[layer.name], np.square(error, dtype=np.float64))) / samples
                for item, error in weight_errors(subject, layer, self.name).items()
            }
            for layer in subject.layers
        }
        return loss_scores(self.name, losses)


def _diagonals(subject: Subject, target: Target, name: str) -> tuple[dict[str, Array], int]:
    """Return the sum over samples of the squared derivatives by each layer's weight, and the samples."""
    sums: dict[str, Array] = {}
    samples = 0
    for batch in _batches(subject, target, name):
        samples += batch.samples
        for layer in subject.layers:
            found = batch.squares(layer)
            sums[layer.name] = found + sums[layer.name] if layer.name in sums else found
    return sums, samples


@dataclass(frozen=True, eq=False)
class _Batch:
    """Values and derivatives of one batch, torch tensors by value name."""

    lifted: Any
    found: Mapping[str, tuple[Any, Any]]
    samples: int
    who: str

    def at(self, name: str | None, layer: Layer) -> tuple[Any, Any]:
        value, gradient = self.found.get(name or "", (None, None))
        if gradient is None:
            raise no_path(layer, self.who)
        return value, gradient

    def squares(self, layer: Layer) -> Array:
        from splitfold.runtime.lift.gradients import squared_weight_gradients

        name = layer.output.name or ""
        _, gradient = self.at(name, layer)
        read = self.found[layer.input.name or ""][0]
        squares = squared_weight_gradients(self.lifted, name, read, gradient, self.samples)
        return np.asarray(squares.double().cpu().numpy())


def _batches(subject: Subject, target: Target, name: str) -> Iterator[_Batch]:
    who = f"the signal {name}"
    batches, lifted = measured_batches(subject, who), lifted_model(subject, who)
    from splitfold.runtime.lift.gradients import value_gradients

    values = [value.name or "" for layer in subject.layers for value in (layer.input, layer.output)]
    for turn, feeds in enumerate(batches):
        found = value_gradients(lifted, feeds, target.at(turn), values, usual_padding(subject.model))
        yield _Batch(lifted, found, samples_of(feeds), who)
