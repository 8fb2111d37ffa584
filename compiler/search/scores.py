# SPDX-License-Identifier: Apache-2.0
"""What the user's metric says of a model: one number, or a score a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitfold.compiler.errors import EvaluationError
from splitfold.runtime.session import Session

__all__ = ["Evaluate", "Scores", "metric_name", "read_scores"]

Evaluate = Callable[[Session], float | Sequence[float] | npt.NDArray[np.generic]]
"""The user's metric of an opened model, more is better: one number, or an array [samples] of scores whose
mean is the metric. Only from scores can be said how sure a difference of two models is."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What `evaluate` returned for one model.

    Attributes:
        values: float64 [samples], or [1] where it is one number for all.
        per_sample: whether there is a score a sample.
    """

    values: npt.NDArray[np.float64]
    per_sample: bool

    @property
    def metric(self) -> float:
        """The metric: the mean."""
        return math.fsum(self.values.tolist()) / len(self.values)

    @property
    def fault(self) -> str:
        """Which score is NaN or infinite, in words; empty where none is."""
        wrong = np.flatnonzero(~np.isfinite(self.values))
        if not wrong.size:
            return ""
        word = "NaN" if np.isnan(self.values[wrong[0]]) else str(self.values[wrong[0]])
        if not self.per_sample:
            return f"evaluate returned {word}"
        return (
            f"evaluate returned {word} for {len(wrong)} of {len(self.values)} samples (the first: {wrong[0]})"
        )

    def same_as(self, other: Scores) -> bool:
        """Whether both hold the same numbers."""
        return self.per_sample == other.per_sample and np.array_equal(
            self.values, other.values, equal_nan=True
        )


def read_scores(value: object, what: str) -> Scores:
    """Return what `evaluate` returned for the model `what`.

    Raises:
        EvaluationError: it is neither a number nor a row of numbers.
    """
    try:
        array = np.asarray(value)
    except Exception as error:
        raise _wrong(value, what) from error
    if array.dtype.kind not in "fiub" or array.ndim > 1:
        shape = f" of shape {list(array.shape)}" if array.ndim > 1 else ""
        raise _wrong(value, what, shape)
    if not array.size:
        raise EvaluationError(f"evaluate returned no score for {what}: does it get any data?")
    return Scores(array.astype(np.float64).reshape(-1), array.ndim == 1)


def _wrong(value: object, what: str, shape: str = "") -> EvaluationError:
    return EvaluationError(
        f"evaluate returned a {type(value).__name__}{shape} for {what}: it must return one number, or one "
        "score a sample (an array [samples])."
    )


def metric_name(evaluate: object) -> str:
    """Return the module and name of a metric: what tells it from others in a file."""
    inner = getattr(evaluate, "func", evaluate)  # functools.partial
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}:{named.__qualname__}"
