# SPDX-License-Identifier: Apache-2.0
"""Plans of precisions for whatever the user brings: made for any budget, and carried out."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from splitfold.compiler.source import Source, load_source
from splitfold.passes.allocation import Allocation
from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.base import Context, Findings
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.carry_out import carry_out
from splitfold.passes.errors import SpecError
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.limits import Limit, Unit
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.plan import PrecisionPlan
from splitfold.runtime.target import Target

__all__ = ["Planning", "plan_precisions", "plan_source"]

_TIMED = Limit(1e9, Unit.MILLISECONDS)


@dataclass(frozen=True, eq=False)
class Planning:
    """A model whose plans can be made for any budget.

    Attributes:
        step: the pass, with its options.
        model: as it is before the pass.
        context: target and calibration data.
        allocation: what a budget is spent on.
        original: as it came, before any pass.
        after: passes that run after the plan's.
    """

    step: AssignPrecisionPass
    model: ir.Model
    context: Context
    allocation: Allocation
    original: ir.Model
    after: Pipeline = field(default_factory=lambda: Pipeline.of(LegalizePass()))

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
        self.after.run(made, self.context)
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
    timed: bool = False,
) -> Planning:
    """Return what plans for `model` are made from.

    Args:
        model: whatever `compile` takes; it is not changed.
        step: the pass whose plan is wanted.
        before: passes that run before it, or their text form; canonical form comes first in any case.
        example_inputs, dynamic_shapes, calibration, target: as of `compile`.
        timed: measure what the choices take, also where the budget of `step` is not one of time.

    Raises:
        SpecError: `step` names a plan already, or a layer pattern matches nothing.
        CaptureError, ArtifactError, CalibrationError, PassFailedError: as of `compile`.
    """
    place = target or Target.cpu()
    source = load_source(model, example_inputs, dynamic_shapes, calibration, place)
    passes = Pipeline.parse(before) if isinstance(before, str) else before or Pipeline()
    return plan_source(
        source,
        step,
        Pipeline.of(CanonicalizePass()) + passes,
        Pipeline.of(LegalizePass()),
        place,
        timed=timed,
    )


def plan_source(
    source: Source,
    step: AssignPrecisionPass,
    before: Pipeline,
    after: Pipeline,
    target: Target,
    *,
    timed: bool = False,
) -> Planning:
    """Return what plans for a model that was read are made from; `before` and `after` stand around `step`.

    Raises:
        SpecError, CalibrationError, PassFailedError: as of `plan_precisions`.
    """
    if step.plan:
        raise SpecError("the pass reads its plan from a file: there is none to make.")
    context, made = Context(target, source.calibration), source.model.clone()
    before.run(made, context)
    layers = step.candidates(made, Findings())
    budget = (*step.budget, _TIMED) if timed else step.budget
    allocation = step.allocation(made, layers, context, budget)
    return Planning(step, made, context, allocation, source.model, after)
