# SPDX-License-Identifier: Apache-2.0
"""Signals from the Taylor expansion of a loss along the error that a choice really makes.

The expansion is written in the layer's output: the derivative by it times what the choice does to it. For a
choice that rounds weights alone that is the derivative by the weights times what happens to them, sample by
sample, since dz = x dW; and it holds for rounded activations too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from splitfold.passes.precision import Precision
from splitfold.passes.signals.deviations import measured_batches
from splitfold.passes.signals.lifting import Moved, lifted_model, moved, samples_of
from splitfold.passes.signals.measured import loss_scores
from splitfold.passes.signals.signal import Scores, Signal
from splitfold.passes.signals.subject import Subject
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.padding import usual_padding
from splitfold.runtime.relevance.targets import RandomProjection, Target

__all__ = ["FirstOrderTaylor", "SecondOrderTaylor"]


@dataclass(frozen=True)
class FirstOrderTaylor(Signal):
    """|dL/dW . dW|, mean over samples: how far the loss moves to first order (Molchanov et al., CVPR 2019,
    arXiv:1906.10771, eq. 8, with the error of quantization in the place of a removed weight). Magnitudes are
    taken sample by sample, so that the sum over layers bounds the whole change.

    Args:
        target: what is expanded; the outputs along random directions by default, which needs no labels.
    """

    target: Target = field(default_factory=RandomProjection)

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "taylor"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`.

        Raises:
            UnsupportedError: torch is missing, an operator cannot be lifted, or no path leads to an output.
        """
        return _expanded(subject, self.target, self.name, lambda changes: float(np.abs(changes).sum()))


@dataclass(frozen=True)
class SecondOrderTaylor(Signal):
    """dW^T H dW, with H the Hessian of half the squared relative error of the outputs, at the float model:
    there its gradient is 0, and H is the Gauss-Newton matrix, exactly. All of a layer's weights count
    together, not the diagonal alone.

    It is estimated without H, as the mean over samples of the squared derivative of a random projection of
    the outputs along the error (Hutchinson's identity); so it is what `sensitivity` measures, to first order
    in the outputs' error.

    Args:
        target: the projection; or a log-likelihood, for its empirical Fisher information in the place of H.
    """

    target: Target = field(default_factory=RandomProjection)

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "taylor-2"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`.

        Raises:
            UnsupportedError: torch is missing, an operator cannot be lifted, or no path leads to an output.
        """
        return _expanded(subject, self.target, self.name, lambda changes: float(np.square(changes).sum()))


def _expanded(subject: Subject, target: Target, name: str, cost: Callable[[Array], float]) -> Scores:
    """Return the mean over samples of the cost of each choice's first-order changes."""
    who = f"the signal {name}"
    batches, lifted = measured_batches(subject, who), lifted_model(subject, who)
    from splitfold.runtime.lift.gradients import value_gradients

    def factors(feeds: Feeds, turn: int, names: Sequence[str]) -> Mapping[str, Array]:
        found = value_gradients(lifted, feeds, target.at(turn), names, usual_padding(subject.model))
        return {value: own.cpu().numpy() for value, (_, own) in found.items() if own is not None}

    losses: dict[str, dict[Precision, float]] = {
        layer: dict.fromkeys(own, 0.0) for layer, own in subject.choices.items()
    }
    for step in moved(subject, who, factors):
        for item in step.errors:
            losses[step.layer.name][item] += cost(_changes(step, item))
    samples = sum(map(samples_of, batches))
    return loss_scores(
        name, {layer: {item: loss / samples for item, loss in own.items()} for layer, own in losses.items()}
    )


def _changes(step: Moved, item: Precision) -> Array:
    """Return the first-order change of the target in each sample; in all of them together where the layer's
    output has another first axis."""
    product = step.factor.astype(np.float64) * step.errors[item]
    samples = samples_of(step.feeds)
    rows = samples if product.ndim and product.shape[0] % samples == 0 else 1
    return np.asarray(product.reshape(rows, -1).sum(1))
