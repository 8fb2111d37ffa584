# SPDX-License-Identifier: Apache-2.0
"""What a search for the best model within a drop came to."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from splitfold.compiler.search.judgement import Decision, Judgement
from splitfold.compiler.search.options import Goal, Search
from splitfold.compiler.search.scores import Scores
from splitfold.passes.plan import PrecisionPlan

__all__ = ["SearchObserver", "Searched", "Stop", "Trial", "manifest_values", "statement"]


class Stop(enum.Enum):
    """Why a search ended."""

    FINISHED = "finished"
    """Nothing was left to try."""
    EVALUATIONS = "evaluations"
    """As many models were evaluated as may be."""
    SECONDS = "seconds"
    """The time was up."""
    INTERRUPTED = "interrupted"
    """By the user."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One model of a search.

    Attributes:
        plan: its precisions.
        size: bytes of all its weights, those of simulated layers as packed codes; 0 where it could not be
            made.
        milliseconds: of a run, as far as the layers' own times tell; NaN where the smallest model is sought.
        judgement: how its metric does.
        digest: of the model.
        cached: whether its scores were known.
    """

    plan: PrecisionPlan
    size: int
    milliseconds: float
    judgement: Judgement
    digest: str = ""
    cached: bool = False

    def cost(self, goal: Goal) -> float:
        """Return what the goal wants least of."""
        return self.size if goal is Goal.SMALLEST else self.milliseconds

    @property
    def cost_text(self) -> str:
        """Size, and time where it is known, for people."""
        size = (
            f"{self.size / 1e6:.3g} MB of weights" if self.size >= 1e6 else f"{self.size:,} bytes of weights"
        )
        return size if math.isnan(self.milliseconds) else f"{self.milliseconds:.4g} ms, {size}"


@runtime_checkable
class SearchObserver(Protocol):
    """Is told of each model of a search; an observer of `compile` that has this method is too."""

    def after_trial(self, trial: Trial, evaluations: int, limit: int) -> None:
        """Is called after each model, with how many were evaluated so far (the original included) and how
        many may be."""


@dataclass(frozen=True, eq=False)
class Searched:
    """What a search along the Pareto front came to.

    Attributes:
        best: the smallest or fastest model that keeps the metric; where none does, the one of least drop.
        scores: of the float model.
        max_drop: what the metric may lose.
        met: whether `best` keeps it.
        trials: every model tried, in order.
        stopped: why it ended.
        options: of the search.
        statement: all this for people, and what would help.
    """

    best: Trial
    scores: Scores
    max_drop: float
    met: bool
    trials: tuple[Trial, ...]
    stopped: Stop
    options: Search
    statement: str = ""

    @property
    def original(self) -> float:
        """The metric of the float model."""
        return self.scores.metric

    @property
    def plan(self) -> PrecisionPlan:
        """The plan of `best`."""
        return self.best.plan

    @property
    def metric(self) -> float:
        """The metric of `best`."""
        return self.best.judgement.metric


def statement(found: Searched) -> str:
    """Return what a search came to in words: what was reached, how sure that is, and what would help."""
    best, options = found.best, found.options
    told = best.judgement
    parts = [
        f"{_headline(found)}: {best.cost_text}, metric {told.metric:.6g}, {_drop(told, options)}."
        if not told.reason
        else f"{_headline(found)}: {told.reason}."
    ]
    if told.decision is Decision.UNDECIDED:
        parts.append(_samples(told))
    elif not found.met:
        parts.append("Give larger choices (fp32), a larger drop, or exclude layers.")
    if found.met and (doubtful := [item for item in found.trials if _doubtful(item, found)]):
        least = min(doubtful, key=lambda item: item.judgement.more or math.inf)
        parts.append(f"{least.cost_text} may keep it too: {_drop(least.judgement, options)}.")
        parts.append(_samples(least.judgement))
    if found.stopped is not Stop.FINISHED:
        parts.append(_ENDED[found.stopped])
    return " ".join(parts)


def _doubtful(item: Trial, found: Searched) -> bool:
    goal, told = found.options.goal, item.judgement
    undecided = told.decision is Decision.UNDECIDED and told.drop <= found.max_drop
    return undecided and item.cost(goal) < found.best.cost(goal)


_ENDED = {
    Stop.EVALUATIONS: "The search ended at its limit of evaluations: a better model may be there.",
    Stop.SECONDS: "The search ended at its limit of time: a better model may be there.",
    Stop.INTERRUPTED: "The search was interrupted: a better model may be there.",
}


def _headline(found: Searched) -> str:
    limit = f"max_drop = {found.max_drop:g} of {found.original:.6g}"
    if found.met:
        return f"within {limit}"
    if found.best.judgement.decision is Decision.UNDECIDED:
        return f"not met, as it is not decided: no model is within {limit} for sure; the best so far"
    return f"not met: no model that was tried is within {limit}; the best of them"


def _drop(found: Judgement, options: Search) -> str:
    if found.interval is None:
        return (
            f"drop {found.drop:.4g}, a point estimate: evaluate returns no score a sample, so no interval is "
            "possible"
        )
    low, high = found.interval
    return f"drop {found.drop:.4g}, between {low:.4g} and {high:.4g} ({options.confidence:.0%} each)"


def _samples(found: Judgement) -> str:
    if found.more is None:
        return "No number of samples would decide."
    return f"About {found.more:,} more samples would decide."


def manifest_values(found: Searched) -> dict[str, Any]:
    """Return a search as plain JSON values, without anything that another run would find otherwise."""
    options = found.options
    return {
        "goal": options.goal.value,
        "max_drop": found.max_drop,
        "confidence": options.confidence,
        "seed": options.seed,
        "met": found.met,
        "stopped": found.stopped.value,
        "statement": found.statement,
        "trials": [_trial(item) for item in found.trials],
    }


def _trial(item: Trial) -> dict[str, Any]:
    found = item.judgement
    return {
        "plan": item.plan.digest,
        "bytes": item.size,
        "milliseconds": _number(item.milliseconds),
        "metric": _number(found.metric),
        "drop": _number(found.drop),
        "interval": None if found.interval is None else [_number(end) for end in found.interval],
        "decision": found.decision.value,
        "more_samples": found.more,
        "reason": found.reason or None,
    }


def _number(value: float) -> float | None:
    return float(f"{value:.10g}") if math.isfinite(value) else None
