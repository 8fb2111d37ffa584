# SPDX-License-Identifier: Apache-2.0
"""What of a model's outputs is to be explained or differentiated: a number for each sample, or several."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

__all__ = [
    "AllLogits",
    "EmbeddingNorm",
    "NextTokenLogProbability",
    "OwnDistance",
    "PredictedClass",
    "RandomProjection",
    "Target",
    "UserTarget",
]

Tensor = Any
"""A torch tensor; torch itself is not imported here."""


class Target(abc.ABC):
    """A differentiable function of a model's outputs."""

    @abc.abstractmethod
    def value(self, outputs: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """Return one number for each sample, or for each position [batch, positions], as a float tensor.

        Args:
            outputs: float outputs by name, in the model's order.
            given: inputs by name.

        Raises:
            ValueError: the outputs or inputs are not of the form that this target needs.
        """

    def at(self, turn: int) -> Target:
        """Return the target for a batch of this number: another one only where it is drawn at random."""
        return self


@dataclass(frozen=True)
class PredictedClass(Target):
    """The largest number along the last axis of the first output: the logit of the predicted class, or, of a
    language model, of the most likely next token at each position."""

    def value(self, outputs: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """See `Target`."""
        return _first(outputs).max(-1).values


@dataclass(frozen=True)
class AllLogits(Target):
    """The sum of all numbers along the last axis of the first output."""

    def value(self, outputs: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """See `Target`."""
        return _first(outputs).sum(-1)


@dataclass(frozen=True)
class EmbeddingNorm(Target):
    """The Euclidean norm along the last axis of the first output: all of a vector counts, whatever its
    numbers stand for. It is never negative, so that nothing cancels between samples."""

    def value(self, outputs: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """See `Target`."""
        return _first(outputs).norm(dim=-1)


@dataclass(frozen=True)
class NextTokenLogProbability(Target):
    """The log-probability, from logits [batch, positions, tokens], of the token that really comes next.

    Args:
        tokens: the input that holds the tokens, [batch, positions].
    """

    tokens: str = "input_ids"

    def value(self, outputs: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """See `Target`."""
        logits, tokens = _first(outputs), given.get(self.tokens)
        if tokens is None:
            raise ValueError(f"the model has no input '{self.tokens}' that holds the tokens.")
        if tuple(logits.shape[:-1]) != tuple(tokens.shape) or tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(
                f"the output has the shape {list(logits.shape)} and '{self.tokens}' {list(tokens.shape)}; "
                "they should be [batch, positions, tokens] and [batch, positions], two positions or more."
            )
        following = tokens[:, 1:].long().unsqueeze(-1)
        return logits[:, :-1].log_softmax(-1).gather(-1, following).squeeze(-1)


@dataclass(frozen=True)
class RandomProjection(Target):
    """The outputs along a random direction, a new one for each batch: normal numbers times the outputs, over
    the root mean square norm of a sample's output; of several outputs the sum over the root of their number.

    Its squared derivative along a change of the model is, on average, the squared error of the outputs that
    the change makes to first order, relative to their squared norm (Hutchinson's identity; the derivatives'
    second moment is the Gauss-Newton matrix of that error). So it needs no labels.

    Args:
        seed: of the directions.
    """

    seed: int = 0

    def value(self, outputs: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """See `Target`."""
        random = np.random.default_rng([self.seed, 1])
        found = 0
        for output in outputs.values():
            drawn = output.new_tensor(random.standard_normal(tuple(output.shape)))
            samples = output.shape[0] if output.ndim > 1 else 1
            size = math.sqrt(max(float(output.detach().square().sum()) / samples * len(outputs), 1e-30))
            found = found + (output * drawn).reshape(samples, -1).sum(-1) / size
        return found

    def at(self, turn: int) -> Target:
        """See `Target`."""
        return replace(self, seed=self.seed * 65_537 + turn)


@dataclass(frozen=True)
class OwnDistance(Target):
    """Half the squared distance of the outputs from what they are, relative to their squared norm, mean over
    outputs: 0 with a gradient of 0, but its Hessian says how fast outputs move when weights do."""

    def value(self, outputs: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """See `Target`."""
        found = 0
        for output in outputs.values():
            held = output.detach()
            size = max(float(held.square().sum()), 1e-30) * len(outputs)
            found = found + (output - held).square().sum() / (2 * size)
        return found


@dataclass(frozen=True)
class UserTarget(Target):
    """A function of the user: it gets the float outputs by name and the inputs by name, torch tensors, and
    returns a tensor of numbers that are to be explained, which are added up."""

    function: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]

    def value(self, outputs: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """See `Target`."""
        return self.function(outputs, given)


def _first(outputs: Mapping[str, Tensor]) -> Tensor:
    return next(iter(outputs.values()))
