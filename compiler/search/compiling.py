# SPDX-License-Identifier: Apache-2.0
"""The search as part of a compilation: its plan takes the place of the pipeline's `assign-precision`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from splitfold.compiler.build import Job
from splitfold.compiler.planning import plan_source
from splitfold.compiler.search.evaluation import Subject, evaluate_all
from splitfold.compiler.search.found import Searched, SearchObserver, statement
from splitfold.compiler.search.judgement import Judgement, judge
from splitfold.compiler.search.options import Goal, Search
from splitfold.compiler.search.scores import Evaluate
from splitfold.compiler.search.search import search_plan
from splitfold.compiler.tolerance import Budget, Tolerance
from splitfold.compiler.verify import Verifier, compare_outputs
from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.errors import SpecError
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.plan import plan_text
from splitfold.runtime.digest import content_digest
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.session import Session

__all__ = ["searched_job", "settled"]


@contextmanager
def searched_job(
    job: Job, evaluate: Evaluate, budget: Budget, search: Search, observers: Sequence[object]
) -> Iterator[tuple[Job, Searched]]:
    """Give the job that carries out the best plan, while its file is there, and what the search came to.

    Args:
        job: its pipeline holds one `assign-precision` that makes its own plan; the budget of that pass does
            not count.
        evaluate: metric of an opened session.
        budget: with `max_drop`.
        search: options.
        observers: those among them that are `SearchObserver` are told of each model.

    Raises:
        SpecError: the pipeline holds no such pass, several, or one that reads a plan.
        EvaluationError, BudgetError, ValueError: as of `search_plan`.
    """
    at, step = _searched_step(job.steps)
    before, after = Pipeline(job.steps.steps[:at]), Pipeline(job.steps.steps[at + 1 :])
    timed = search.goal is Goal.FASTEST
    planning = plan_source(job.source, step, before, after, job.target, timed=timed)
    found = search_plan(
        planning,
        evaluate,
        budget.max_drop or 0.0,
        search=search,
        megabytes=budget.megabytes,
        obstacle=_obstacle(job),
        observers=[item for item in observers if isinstance(item, SearchObserver)],
    )
    with tempfile.TemporaryDirectory(prefix="splitfold-plan-") as folder:
        file = Path(folder) / "plan.toml"
        file.write_text(plan_text(found.plan), encoding="utf-8")
        planned = Pipeline.of(dataclasses.replace(step, plan=str(file)))
        yield dataclasses.replace(job, steps=before + planned + after), found


def _searched_step(steps: Pipeline) -> tuple[int, AssignPrecisionPass]:
    found = [(at, step) for at, step in enumerate(steps) if isinstance(step, AssignPrecisionPass)]
    if len(found) != 1:
        raise SpecError(
            f"budget.max_drop searches the plans of the pass {AssignPrecisionPass.name}, and the pipeline "
            f"holds {len(found) or 'none'} of it: give one, such as assign-precision{{choices=[fp32,w8,w4]}}."
        )
    return found[0]


def _obstacle(job: Job) -> Callable[[ir.Model], str]:
    """Return what says why a model would not be let through by the compilation."""
    source, target = job.source, job.target
    if source.unverified or job.tolerance == Tolerance(cosine=None):
        return lambda model: ""
    reference = Verifier(source.model, source.feeds, target).reference

    def obstacle(model: ir.Model) -> str:
        deviations = compare_outputs(reference, Session(model, target).run(source.feeds))
        job.tolerance.check(deviations, "")
        return ""

    return obstacle


def settled(found: Searched, model: ir.Model, evaluate: Evaluate, job: Job) -> Searched:
    """Return the search with the metric of `model`, which was really built: where the compilation put layers
    back to float, it is not the model that was tried, and is measured once more."""
    digest = content_digest(model)
    if digest == found.best.digest:
        return found
    outcome = evaluate_all(evaluate, [Subject("the result", model)], job.target)[0]
    judgement = (
        Judgement.without(outcome.fault)
        if outcome.scores is None
        else judge(
            found.scores,
            outcome.scores,
            found.max_drop,
            confidence=found.options.confidence,
            seed=found.options.seed,
        )
    )
    best = dataclasses.replace(
        found.best, judgement=judgement, digest=digest, size=weight_bytes(model), cached=False
    )
    again = dataclasses.replace(found, best=best, met=judgement.kept, trials=(*found.trials, best))
    return dataclasses.replace(
        again, statement=f"{statement(again)} The compilation changed the model, which was measured again."
    )
