# SPDX-License-Identifier: Apache-2.0
"""How a search for the best model within a drop of the user's metric goes about it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Goal", "Search", "Unmet"]


class Goal(enum.Enum):
    """What is sought among the models that keep the metric."""

    SMALLEST = "smallest"
    """The fewest bytes of weights."""
    FASTEST = "fastest"
    """The shortest run on the first batch of the calibration data, as far as the layers' own times tell."""


class Unmet(enum.Enum):
    """What comes of a search that finds no model within the drop."""

    RETURN = "return"
    """The best model that was found, with a statement that says so."""
    RAISE = "raise"
    """`BudgetError`."""


@dataclass(frozen=True)
class Search:
    """Options of the search for the best model within `Budget.max_drop`.

    Args:
        goal: smallest or fastest.
        evaluations: models evaluated at most, the original included; those met before do not count.
        seconds: wall time after which no further evaluation is begun; None is no limit.
        confidence: of each end of the interval of a drop by itself. It is that of one judgement: the best of
            many judged models may have been lucky, so look at data that the search did not see.
        resolution: the search ends where the next smaller model to try would save less than this share.
        seed: of the resampling.
        jobs: models evaluated at a time, as joblib's ``n_jobs``; None leaves it to `joblib.parallel_config`,
            which also names the backend.
        cache: folder in which evaluations are kept for later searches with the same metric and data.
        unmet: what comes of a search that finds no model within the drop.
    """

    goal: Goal = Goal.SMALLEST
    evaluations: int = 20
    seconds: float | None = None
    confidence: float = 0.95
    resolution: float = 0.005
    seed: int = 0
    jobs: int | None = None
    cache: Path | None = None
    unmet: Unmet = Unmet.RETURN

    def __post_init__(self) -> None:
        if self.evaluations < 2:
            raise ValueError(f"evaluations is {self.evaluations}: the original and one more are the least.")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; it is a positive number, or None.")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; it lies between 0.5 and 1.")
        if not (math.isfinite(self.resolution) and self.resolution >= 0):
            raise ValueError(f"resolution is {self.resolution}; it is a share from 0 up.")
        if self.jobs == 0:
            raise ValueError(
                "jobs is 0; it is a number of models, -1 for as many as there are cores, or None."
            )
