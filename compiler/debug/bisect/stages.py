# SPDX-License-Identifier: Apache-2.0
"""The model after every pass of a pipeline, kept for going back to; weights are shared, not copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from splitfold.passes.base import Context, Pass
from splitfold.passes.errors import Failure, FailureError, PassFailedError, SpecError
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.pipeline import Observer, PassRecord, Pipeline
from splitfold.runtime.errors import CalibrationError, SplitfoldError

__all__ = ["Stage", "Walk", "openable", "walk"]


@dataclass(frozen=True)
class Stage:
    """The model after one pass, and what the pass did."""

    model: ir.Model
    record: PassRecord


@dataclass(frozen=True)
class Walk:
    """A run of some passes.

    Attributes:
        stages: one for each pass that ran.
        error: what the pass after the last stage raised, or None where all ran.
    """

    stages: tuple[Stage, ...]
    error: SplitfoldError | None = None


@dataclass
class _Keeper:
    """Observer that keeps a clone after every pass."""

    stages: list[Stage] = field(default_factory=list)

    def before_pass(self, step: Pass, model: ir.Model, index: int, total: int) -> None:
        """Nothing to do."""

    def after_pass(self, step: Pass, model: ir.Model, record: PassRecord) -> PassRecord:
        self.stages.append(Stage(_copy(model, str(step)), record))
        return record


def _copy(model: ir.Model, step: str) -> ir.Model:
    """Return a copy of what `step` made of `model`.

    Raises:
        PassFailedError: it left a graph that cannot be walked, such as one that reads a value from nowhere.
    """
    try:
        return model.clone()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = str(cause).splitlines()[0][:200]
        raise PassFailedError(f"it left a broken graph: {text}", failed=step, kind=Failure.INVALID) from error


def walk(
    model: ir.Model, steps: Sequence[Pass], context: Context, observers: Sequence[Observer] = ()
) -> Walk:
    """Run `steps` over a copy of `model` and return every stage, up to a pass that raises.

    Raises:
        SpecError, CalibrationError: the user asked for something that cannot be, such as an unknown layer.
        PassFailedError: less was applied than the user requires.
    """
    keeper = _Keeper()
    try:
        Pipeline(tuple(steps)).run(model.clone(), context, (keeper, *observers))
    except (SpecError, CalibrationError):
        raise
    except SplitfoldError as error:
        if isinstance(error, FailureError) and error.kind is Failure.NOT_APPLIED:
            raise  # `require` is the user's word
        return Walk(tuple(keeper.stages), error)
    return Walk(tuple(keeper.stages))


def openable(model: ir.Model, context: Context, step: str) -> ir.Model:
    """Return a copy of the model that `step` made, fit to be opened.

    Raises:
        SplitfoldError: it cannot be legalized, or it is broken.
    """
    made, legalize = _copy(model, step), LegalizePass()
    try:
        legalize.run(made, context)
    except SplitfoldError:
        raise
    except Exception as error:
        raise PassFailedError(f"{type(error).__name__}: {error}", failed=str(legalize)) from error
    return made
