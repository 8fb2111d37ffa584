# SPDX-License-Identifier: Apache-2.0
"""Planning: the layers and their choices are found, a signal is asked, and what comes out can be spent on any
budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from splitfold.passes.allocation import Allocation
from splitfold.passes.base import Context
from splitfold.passes.carry_out import Carrying
from splitfold.passes.estimated_times import estimate_times
from splitfold.passes.expected_loss import ErrorModel, expected_losses
from splitfold.passes.layers import Layer
from splitfold.passes.limits import Limit, Unit
from splitfold.passes.piece_times import PieceTimes, measure_times
from splitfold.passes.precision import Precision
from splitfold.passes.signals.measured import Sensitivity
from splitfold.passes.signals.signal import Basis, Scores, Signal, measured
from splitfold.passes.signals.subject import Subject, find_subject

__all__ = ["Request", "allocate", "check_choices"]


@dataclass(frozen=True)
class Request:
    """What is asked of a plan, but for its budget.

    Attributes:
        choices: the precisions to choose from: real ones, or simulated ones; float goes with both.
        signal: what tells the layers apart.
        error: how large a layer's error is, for signals that give no losses.
        carrying: how precisions are made.

    Raises:
        ValueError: no choice, one twice, or real and simulated ones together.
    """

    choices: tuple[Precision, ...]
    signal: Signal = field(default_factory=Sensitivity)
    error: ErrorModel = ErrorModel.MEASURED
    carrying: Carrying = field(default_factory=Carrying)

    def __post_init__(self) -> None:
        check_choices(self.choices)


def check_choices(choices: Sequence[Precision]) -> None:
    """Raise `ValueError` for choices that make no plan."""
    if not all(isinstance(item, Precision) for item in choices):
        raise ValueError("choices are precisions.")
    if not any(not item.is_float for item in choices):
        raise ValueError("choices hold no low-bit precision: there is nothing to assign.")
    if len(set(choices)) < len(choices):
        raise ValueError("a choice is given twice.")
    if len({item.simulated for item in choices if not item.is_float}) > 1:
        raise ValueError(
            "choices are real or simulated, not both: simulated layers are neither smaller nor faster."
        )


def allocate(
    model: ir.Model, layers: Sequence[Layer], request: Request, context: Context, budget: Sequence[Limit] = ()
) -> Allocation:
    """Return what any budget can be spent on.

    Args:
        model: float model in canonical form; it is not changed.
        layers: MatMul, Gemm and Conv layers of it.
        request: what is asked for.
        context: target and calibration data.
        budget: limits that are to be kept; times are measured where one of them is in milliseconds.

    Raises:
        CalibrationError: the signal or a choice needs calibration data that is missing or does not fit.
    """
    subject = find_subject(model, layers, request.choices, context, request.carrying)
    if not subject.pieces:
        return Allocation(subject, Scores(request.signal.name, Basis.ORDER, {}), {})
    scores = measured(request.signal, subject)
    losses = expected_losses(scores, subject, request.error)
    timed = any(limit.unit is Unit.MILLISECONDS for limit in budget)
    return Allocation(subject, scores, losses, _times(subject) if timed else None)


def _times(subject: Subject) -> PieceTimes:
    """Return the times that follow from the target's kernel costs, or that are measured where it has none."""
    costs = subject.context.target.costs
    found = estimate_times(subject, costs) if costs is not None else None
    return measure_times(subject) if found is None else found
