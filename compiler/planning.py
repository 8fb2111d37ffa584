# SPDX-License-Identifier: Apache-2.0
"""Plans of precisions for whatever the user brings: made, searched by the user's metric, and opened."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from splitfold.compiler.driver import Evaluate
from splitfold.compiler.errors import BudgetError, VerificationError
from splitfold.compiler.source import load_source
from splitfold.passes.allocation import Allocation
from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.base import Context, Findings
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.carry_out import carry_out
from splitfold.passes.errors import Failure, SpecError
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.plan import PrecisionPlan
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["Planning", "Searched", "plan_precisions", "search_plan"]

logger = logging.getLogger(__name__)

LIMIT = 20
"""Evaluations of the user's metric that a search makes at most."""


@dataclass(frozen=True, eq=False)
class Planning:
    """A model whose plans can be made for any budget.

    Attributes:
        step: the pass, with its options.
        model: as it is before the pass.
        context: target and calibration data.
        allocation: what a budget is spent on.
    """

    step: AssignPrecisionPass
    model: ir.Model
    context: Context
    allocation: Allocation

    def plan(self) -> PrecisionPlan:
        """Return the plan within the budget of the pass.

        Raises:
            BudgetError: there is none.
        """
        return self.allocation.within(self.step.budget)

    def carried_out(self, plan: PrecisionPlan) -> ir.Model:
        """Return the model with a plan carried out, legal for the target."""
        made = self.model.clone()
        carry_out(made, plan.precisions, self.context, self.step.request.carrying, Findings())
        LegalizePass().run(made, self.context)
        return made


def plan_precisions(
    model: object,
    step: AssignPrecisionPass,
    *,
    before: Pipeline | str | None = None,
    example_inputs: object = None,
    dynamic_shapes: object = None,
    calibration: object = None,
    target: Target | None = None,
) -> Planning:
    """Return what plans for `model` are made from.

    Args:
        model: whatever `compile` takes; it is not changed.
        step: the pass whose plan is wanted.
        before: passes that run before it, or their text form; canonical form comes first in any case.
        example_inputs, dynamic_shapes, calibration, target: as of `compile`.

    Raises:
        SpecError: `step` names a plan already, or a layer pattern matches nothing.
        CaptureError, ArtifactError, CalibrationError, PassFailedError: as of `compile`.
    """
    if step.plan:
        raise SpecError("the pass reads its plan from a file: there is none to make.")
    place = target or Target.cpu()
    source = load_source(model, example_inputs, dynamic_shapes, calibration, place)
    context, made = Context(place, source.calibration), source.model.clone()
    passes = Pipeline.parse(before) if isinstance(before, str) else before or Pipeline()
    (Pipeline.of(CanonicalizePass()) + passes).run(made, context)
    layers = step.candidates(made, Findings())
    return Planning(step, made, context, step.allocation(made, layers, context))


@dataclass(frozen=True)
class Searched:
    """What a search along the Pareto front came to.

    Attributes:
        plan: the smallest that was found to keep the metric.
        metric: the user's metric with it.
        original: and of the float model.
        tried: bytes of the plan's layers and metric of each plan evaluated, in order.
    """

    plan: PrecisionPlan
    metric: float
    original: float
    tried: tuple[tuple[int, float], ...] = field(default=())


def search_plan(
    planning: Planning,
    evaluate: Evaluate,
    max_drop: float,
    *,
    limit: int = LIMIT,
    tell: Callable[[int, PrecisionPlan, float], None] | None = None,
) -> Searched:
    """Return the smallest plan of the Pareto front with which the user's metric falls by at most `max_drop`.

    The metric is taken to rise along the front, so that the place is found by bisection: about log2 of its
    length evaluations. Where it does not rise everywhere, a smaller plan that keeps it may be missed; the one
    returned was evaluated and does keep it. Judge it on data that `evaluate` does not see.

    Args:
        planning: what plans are made from.
        evaluate: metric of an opened session, more is better.
        max_drop: what it may lose, absolute.
        limit: evaluations at most, the float model's included; the best plan so far is returned then.
        tell: is told number, plan and metric of each evaluation.

    Raises:
        BudgetError: not even the plan of least expected loss keeps the metric; it says what that reached.
        VerificationError: `evaluate` returned NaN.
    """
    original = _metric(evaluate, planning.model, planning, "the float model")
    floor, front = original - max_drop, planning.allocation.front
    tried: list[tuple[int, float]] = []

    def measure(position: int) -> tuple[PrecisionPlan, float]:
        plan = planning.allocation.at(position)
        found = _metric(evaluate, planning.carried_out(plan), planning, f"a plan of {plan.bytes:,} bytes")
        tried.append((plan.bytes, found))
        logger.info("plan of %d bytes: metric %g, floor %g", plan.bytes, found, floor)
        if tell is not None:
            tell(len(tried), plan, found)
        return plan, found

    best, metric = measure(len(front) - 1)
    if metric < floor:
        raise BudgetError(
            f"no plan keeps the metric within max_drop = {max_drop:g} of {original:g}: the one of least "
            f"expected loss ({best.bytes:,} bytes of its layers) reaches {metric:g}. Give larger choices "
            "(fp32), or a larger drop.",
            reached=f"{metric:g}",
            binds=f"max_drop={max_drop:g}",
        )
    low, high = 0, len(front) - 1
    while low < high and len(tried) + 1 < limit:
        middle = (low + high) // 2
        plan, found = measure(middle)
        if found >= floor:
            best, metric, high = plan, found, middle
        else:
            low = middle + 1
    return Searched(best, metric, original, tuple(tried))


def _metric(evaluate: Evaluate, model: ir.Model, planning: Planning, what: str) -> float:
    value = float(evaluate(Session(model, planning.context.target)))
    if math.isnan(value):
        raise VerificationError(
            f"evaluate returned NaN for {what}: check the metric function.", kind=Failure.METRIC
        )
    return value
