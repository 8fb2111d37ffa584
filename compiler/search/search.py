# SPDX-License-Identifier: Apache-2.0
"""The search along the Pareto front of plans for the smallest or fastest model that keeps a metric."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from splitfold.compiler.errors import BudgetError, EvaluationError
from splitfold.compiler.planning import Planning
from splitfold.compiler.search.cache import EvaluationCache
from splitfold.compiler.search.evaluation import Outcome, Subject, evaluate_all, workers
from splitfold.compiler.search.found import Searched, SearchObserver, Stop, Trial, statement
from splitfold.compiler.search.judgement import Judgement, judge
from splitfold.compiler.search.options import Goal, Search, Unmet
from splitfold.compiler.search.scores import Evaluate, Scores, metric_name
from splitfold.passes.allocate import Front
from splitfold.passes.plan import PrecisionPlan
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import SplitfoldError
from splitfold.runtime.model_file import weight_bytes

__all__ = ["search_plan"]

logger = logging.getLogger(__name__)


def search_plan(
    planning: Planning,
    evaluate: Evaluate,
    max_drop: float,
    *,
    search: Search | None = None,
    megabytes: float | None = None,
    obstacle: Callable[[ir.Model], str] | None = None,
    observers: Sequence[SearchObserver] = (),
) -> Searched:
    """Return the smallest or fastest plan of the Pareto front with which the user's metric falls by at most
    `max_drop`.

    The metric is taken to rise along the front, so that the place is found by bisection (with n workers, by
    cutting into n + 1 parts). Where it does not rise everywhere, a better plan may be missed; the one that is
    returned was evaluated. A drop counts as kept where the whole interval of it is. Judge the result on data
    that `evaluate` does not see.

    Args:
        planning: what plans are made from; with measured times where the goal is the fastest model.
        evaluate: metric of an opened session, more is better.
        max_drop: what it may lose, absolute.
        search: options.
        megabytes: most that all weights may take, in 10^6 bytes.
        obstacle: returns why a model may not be taken whatever its metric, or an empty text.
        observers: are told of each model.

    Returns:
        The best model so far, also where the search was interrupted or none keeps the metric: `met` says so.

    Raises:
        EvaluationError: `evaluate` raised, gave the original NaN, or returned what is no score.
        BudgetError: no model could be evaluated at all, not even the smallest is within `megabytes`, or, with
            `Unmet.RAISE`, none keeps the metric.
        ValueError: options that do not go together.
    """
    options = search or Search()
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise ValueError(f"max_drop is {max_drop}: give what the metric may lose, a number from 0 up.")
    if options.goal is Goal.FASTEST and planning.allocation.times is None:
        raise ValueError("the fastest model is sought, but no times were measured.")
    if options.goal is Goal.FASTEST and megabytes is not None:
        raise ValueError("a search for the fastest model takes no limit in megabytes.")
    return _Walk(planning, evaluate, max_drop, options, megabytes, obstacle, tuple(observers)).run()


@dataclass(eq=False)
class _Walk:
    planning: Planning
    evaluate: Evaluate
    max_drop: float
    options: Search
    megabytes: float | None
    obstacle: Callable[[ir.Model], str] | None
    observers: tuple[SearchObserver, ...]
    trials: list[Trial] = field(default_factory=list)
    evaluations: int = 0

    def __post_init__(self) -> None:
        allocation = self.planning.allocation
        smallest = self.options.goal is Goal.SMALLEST
        self.front: Front = allocation.front if smallest else allocation.time_front
        ms = allocation.times.float_ms if allocation.times is not None else 0.0
        self.beside = allocation.rest_bytes if smallest else ms * 1e6
        """What the whole model costs beyond the front's own costs."""
        target = self.planning.context.target
        self.cache = EvaluationCache(metric_name(self.evaluate), target, self.options.cache)
        self.started = time.monotonic()

    def run(self) -> Searched:
        self.original = self._measure_original()
        stopped = Stop.FINISHED
        try:
            stopped = self._walk()
        except KeyboardInterrupt:
            if not any(not trial.judgement.reason for trial in self.trials):
                raise
            stopped = Stop.INTERRUPTED
        return self._result(stopped)

    def _measure_original(self) -> Scores:
        subject = Subject("the original model", self.planning.original)
        outcome = evaluate_all(self.evaluate, [subject], self.planning.context.target)[0]
        if outcome.scores is None:
            raise EvaluationError(f"the original model cannot be evaluated: {outcome.fault}")
        if outcome.scores.fault:
            raise EvaluationError(
                f"{outcome.scores.fault} for the original model: there is nothing to compare with. Check the "
                "metric function."
            )
        if not outcome.scores.per_sample:
            logger.info("evaluate returns one number: drops are point estimates, without an interval")
        digest = content_digest(self.planning.original)
        self.cache.agrees(digest, outcome.scores)
        self.cache.put(digest, outcome.scores)
        self.evaluations = 1
        return outcome.scores

    def _walk(self) -> Stop:
        """Close in on the place where the metric begins to hold."""
        highest, lowest = self._last(), -1
        todo, kept = (
            [highest, *self._between(lowest, highest, workers(self.options.jobs) - 1)],
            len(self.front),
        )
        while todo:
            if self._left < 1:
                return Stop.EVALUATIONS
            if self.trials and self._late:
                return Stop.SECONDS
            found = self._try(todo[: self._left])
            kept = min([kept, *(at for at, judgement in found.items() if judgement.kept)])
            if kept == len(self.front):
                return Stop.FINISHED  # not even the least expected loss keeps it
            lowest = max([lowest, *(at for at, item in found.items() if not item.kept and at < kept)])
            todo = self._between(lowest, kept, workers(self.options.jobs))
        return Stop.FINISHED

    @property
    def _left(self) -> int:
        return self.options.evaluations - self.evaluations

    @property
    def _late(self) -> bool:
        seconds = self.options.seconds
        return seconds is not None and time.monotonic() - self.started > seconds

    def _last(self) -> int:
        """Return the last place of the front that `megabytes` allows."""
        last = len(self.front) - 1
        if self.megabytes is None:
            return last
        sizes, limit = self.front.sizes, math.floor(self.megabytes * 1e6)
        made = self.planning.carried_out(self._plan(last))
        apart = weight_bytes(made) - int(sizes[last])  # of the rest, after all passes
        place = min(last, int(np.searchsorted(sizes, limit - apart, side="right")) - 1)
        if place < 0:
            least = (int(sizes[0]) + apart) / 1e6
            raise BudgetError(
                f"no plan keeps the budget of {self.megabytes:g} MB: with every layer in its smallest choice "
                f"the weights take {least:.6g} MB. Give smaller choices, or a larger budget.",
                reached=f"{least:.6g} MB",
                binds=f"{self.megabytes:g}MB",
            )
        return place

    def _plan(self, place: int) -> PrecisionPlan:
        return self.planning.allocation.planned(self.front.selection(place))

    def _between(self, lowest: int, kept: int, count: int) -> list[int]:
        """Return `count` places between two, evenly spaced in cost; none where too little is to be won."""
        sizes, first = self.front.sizes, lowest + 1
        if first >= kept or count < 1:
            return []
        span = int(sizes[kept] - sizes[first])
        if span < self.options.resolution * abs(float(sizes[kept]) + self.beside):
            return []
        wanted = [int(sizes[first]) + span * part // (count + 1) for part in range(1, count + 1)]
        found = (int(np.searchsorted(sizes, size, side="right")) - 1 for size in wanted)
        return sorted({min(max(place, first), kept - 1) for place in found}, reverse=True)

    def _try(self, places: Sequence[int]) -> dict[int, Judgement]:
        """Make, evaluate and judge the models of some places."""
        plans = {place: self._plan(place) for place in places}
        made = {place: self._made(plan) for place, plan in plans.items()}
        models = {place: model for place, model in made.items() if isinstance(model, ir.Model)}
        digests = {place: content_digest(model) for place, model in models.items()}
        outcomes = {place: Outcome(scores) for place in models if (scores := self.cache.get(digests[place]))}
        fresh = [place for place in models if place not in outcomes]
        subjects = [Subject(f"a plan of {plans[place].bytes:,} bytes", models[place]) for place in fresh]
        target = self.planning.context.target
        found = evaluate_all(self.evaluate, subjects, target, self.options.jobs) if subjects else []
        self.evaluations += len(fresh)
        known = set(outcomes)
        for place, outcome in zip(fresh, found, strict=True):
            outcomes[place] = outcome
            if outcome.scores is not None:
                self.cache.put(digests[place], outcome.scores)
        for place, plan in plans.items():
            model = made[place]
            if isinstance(model, str):
                self._keep(Trial(plan, 0, math.nan, Judgement.without(model)))
                continue
            self._keep(
                Trial(
                    plan,
                    self._size(plan, model),
                    self._milliseconds(place),
                    self._judged(outcomes[place]),
                    digests[place],
                    place in known,
                )
            )
        return {
            place: trial.judgement for place, trial in zip(plans, self.trials[-len(plans) :], strict=True)
        }

    def _made(self, plan: PrecisionPlan) -> ir.Model | str:
        """Return the model of a plan, or why it may not be taken."""
        try:
            model = self.planning.carried_out(plan)
            reason = self.obstacle(model) if self.obstacle is not None else ""
        except SplitfoldError as error:
            return str(error)
        return reason or model

    def _judged(self, outcome: Outcome) -> Judgement:
        if outcome.scores is None:
            return Judgement.without(outcome.fault)
        return judge(
            self.original,
            outcome.scores,
            self.max_drop,
            confidence=self.options.confidence,
            seed=self.options.seed,
        )

    def _size(self, plan: PrecisionPlan, model: ir.Model) -> int:
        if any(layer.precision.simulated for layer in plan.layers):
            return plan.bytes + self.planning.allocation.rest_bytes
        return weight_bytes(model)

    def _milliseconds(self, place: int) -> float:
        if self.options.goal is Goal.SMALLEST:
            return math.nan
        return (float(self.front.sizes[place]) + self.beside) / 1e6

    def _keep(self, trial: Trial) -> None:
        self.trials.append(trial)
        logger.info("plan of %d bytes: %s", trial.plan.bytes, trial.judgement)
        for observer in self.observers:
            observer.after_trial(trial, self.evaluations, self.options.evaluations)

    def _result(self, stopped: Stop) -> Searched:
        judged = [trial for trial in self.trials if not trial.judgement.reason]
        if not judged:
            reason = self.trials[0].judgement.reason
            raise BudgetError(
                f"no plan keeps the metric within max_drop = {self.max_drop:g}: none could be judged. The "
                f"first: {reason}",
                binds=f"max_drop={self.max_drop:g}",
            )
        goal, kept = self.options.goal, [trial for trial in judged if trial.judgement.kept]
        best = (
            min(kept, key=lambda trial: trial.cost(goal))
            if kept
            else min(judged, key=lambda trial: trial.judgement.drop)
        )
        found = Searched(
            best, self.original, self.max_drop, bool(kept), tuple(self.trials), stopped, self.options
        )
        found = dataclasses.replace(found, statement=statement(found))
        if not kept and self.options.unmet is Unmet.RAISE:
            reached, binds = f"{found.metric:g}", f"max_drop={self.max_drop:g}"
            raise BudgetError(f"no plan keeps the metric: {found.statement}", reached=reached, binds=binds)
        if not kept:
            logger.warning("%s", found.statement)
        return found
