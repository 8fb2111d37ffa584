# SPDX-License-Identifier: Apache-2.0
"""Signals from layer-wise relevance propagation: how much of what the model says goes through a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from splitfold.passes.precision import Precision
from splitfold.passes.signals.deviations import measured_batches
from splitfold.passes.signals.lifting import lifted_model, moved, no_path, samples_of
from splitfold.passes.signals.measured import loss_scores
from splitfold.passes.signals.signal import Basis, Scores, Signal
from splitfold.passes.signals.subject import Subject
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.padding import usual_padding
from splitfold.runtime.relevance.composite import Composite, attention_rules
from splitfold.runtime.relevance.propagate import Relevance, propagate
from splitfold.runtime.relevance.targets import EmbeddingNorm, Target

__all__ = ["LayerRelevance", "RelevanceError"]


@dataclass(frozen=True)
class LayerRelevance(Signal):
    """The relevance in a layer's output: the sum of its magnitudes, mean over samples, over the sum of all
    layers (the idea of LRP-QViT, arXiv:2401.11243, whose aggregation is not published: this one is ours).

    As an importance it is multiplied with the relative squared error of the layer's own output.

    Args:
        target: what of the outputs is explained.
        rules: of the propagation.
    """

    target: Target = field(default_factory=EmbeddingNorm)
    rules: Composite = field(default_factory=attention_rules)

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "relevance"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`.

        Raises:
            UnsupportedError: torch is missing, an operator has no rule, or no path leads to an output.
        """
        who = f"the signal {self.name}"
        batches = measured_batches(subject, who)
        outputs = {layer.name: layer.output.name or "" for layer in subject.layers}
        lifted, sums, samples = lifted_model(subject, who), dict.fromkeys(outputs, 0.0), 0
        for feeds in batches:
            found = propagate(
                lifted,
                feeds,
                target=self.target,
                rules=self.rules,
                names=tuple(outputs.values()),
                padding=usual_padding(subject.model),
            )
            _check_paths(subject, outputs, found, who)
            samples += samples_of(feeds)
            for layer, value in outputs.items():
                sums[layer] += _magnitude(found.values.get(value))
        means = {layer: total / samples for layer, total in sums.items()}
        return Scores(self.name, Basis.IMPORTANCE, _shares(means))


@dataclass(frozen=True)
class RelevanceError(Signal):
    """Relevance and the choice's own error, combined element by element: the squared error of each element of
    the layer's output counts by the magnitude of the relevance that the element holds, over the mean square
    of the output; mean over samples, over the sum of all layers' relevance.

    Where relevance is even over a layer's output, this is `LayerRelevance` times the relative squared error.
    The definition is ours.

    Args:
        target: what of the outputs is explained.
        rules: of the propagation.
    """

    target: Target = field(default_factory=EmbeddingNorm)
    rules: Composite = field(default_factory=attention_rules)

    @property
    def name(self) -> str:
        """See `Signal`."""
        return "relevance-error"

    def scores(self, subject: Subject) -> Scores:
        """See `Signal`.

        Raises:
            UnsupportedError: torch is missing, an operator has no rule, or no path leads to an output.
        """
        who = f"the signal {self.name}"
        measured_batches(subject, who)  # before the model is lifted
        lifted, padding = lifted_model(subject, who), usual_padding(subject.model)
        outputs = {piece.end.name or "": piece.layer.output.name or "" for piece in subject.pieces}

        def factors(feeds: Feeds, turn: int, names: Sequence[str]) -> Mapping[str, Array]:
            found = propagate(
                lifted,
                feeds,
                target=self.target,
                rules=self.rules,
                names={*names, *outputs.values()},
                padding=padding,
            )
            _check_paths(
                subject, {piece.layer.name: piece.end.name or "" for piece in subject.pieces}, found, who
            )
            return {name: np.abs(_either(found, name, outputs[name])) for name in names}

        total, losses = 0.0, _no_losses(subject)
        for step in moved(subject, who, factors):
            relevance = (
                step.factor if step.factor.shape == step.expected.shape else np.zeros(step.expected.shape)
            )
            size = float(np.mean(np.square(step.expected, dtype=np.float64))) or 1.0
            total += float(relevance.sum(dtype=np.float64))
            for item, error in step.errors.items():
                weighted = float(np.vdot(relevance.astype(np.float64), np.square(error, dtype=np.float64)))
                losses[step.layer.name][item] += weighted / size
        scaled = {
            layer: {item: loss / (total or 1.0) for item, loss in own.items()}
            for layer, own in losses.items()
        }
        return loss_scores(self.name, scaled)


def _either(found: Relevance, *names: str) -> Array:
    """Return the relevance of the first of these values that has any; a single 0 where none has."""
    return next((found.values[name] for name in names if name in found.values), np.zeros(()))


def _no_losses(subject: Subject) -> dict[str, dict[Precision, float]]:
    return {layer: dict.fromkeys(own, 0.0) for layer, own in subject.choices.items()}


def _check_paths(subject: Subject, outputs: Mapping[str, str], found: Relevance, who: str) -> None:
    for layer in subject.layers:
        if outputs[layer.name] not in found.reaching:
            raise no_path(layer, who)


def _magnitude(relevance: Array | None) -> float:
    return 0.0 if relevance is None else float(np.abs(relevance).sum(dtype=np.float64))


def _shares(values: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(values.values())
    return {name: value / total if total else 0.0 for name, value in values.items()}
