# SPDX-License-Identifier: Apache-2.0
"""Judging a model: does it meet the user's metric, or a tolerance on its outputs? Verdicts are kept by the
model's digest, and their number is bounded."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from splitfold.compiler.errors import BisectionError, EvaluationError, VerificationError
from splitfold.compiler.search.scores import Evaluate, read_scores
from splitfold.compiler.tolerance import Tolerance
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import Deviation, worst
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import SessionError, SplitfoldError
from splitfold.runtime.session import Session
from splitfold.runtime.side_by_side import compare_sessions
from splitfold.runtime.target import Target

__all__ = ["Evaluation", "Judge", "LimitReachedError", "OutputDistance", "UserMetric", "Verdict"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """How a model does.

    Attributes:
        value: the user's metric, or the lowest cosine of an output; NaN where the model does not run.
        ok: whether it meets the limit.
        text: the value, deviation or error, for people.
        short: the same in few words.
    """

    value: float
    ok: bool
    text: str
    short: str

    @staticmethod
    def stopped(error: Exception) -> Verdict:
        """Return the verdict on a model that does not run."""
        return Verdict(math.nan, False, str(error), "does not run")

    def __str__(self) -> str:
        return f"{self.short}{'' if self.ok else ' (broken)'}"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, for progress.

    Attributes:
        number: how many models were evaluated so far, this one included.
        what: the model that was judged.
        verdict: how it does.
        cached: whether an equal model was met before, so that nothing was run.
    """

    number: int
    what: str
    verdict: Verdict
    cached: bool


class LimitReachedError(SplitfoldError):
    """No further evaluation may be made."""


class Measure(Protocol):
    """Tells how a model does; `start` is asked once, of the original."""

    def start(self, model: ir.Model) -> Verdict:
        """Return the verdict on the original, to which the others are compared."""

    def __call__(self, model: ir.Model, what: str) -> Verdict:
        """Return the verdict on `model`; `what` names it in errors."""


class UserMetric:
    """A metric of the user, more is better, that may fall by `drop` from the original's.

    Args:
        evaluate: the metric of an opened model.
        drop: what it may lose, absolute, at least 0.
        target: where models run.
    """

    def __init__(self, evaluate: Evaluate, drop: float, target: Target) -> None:
        if not 0 <= drop < math.inf:
            raise BisectionError(f"drop is {drop}: give what the metric may lose, a number from 0 up.")
        self._evaluate = evaluate
        self._drop = drop
        self._target = target
        self._reference = math.nan

    def start(self, model: ir.Model) -> Verdict:
        """Measure the original.

        Raises:
            BisectionError: evaluate raises, or returns no finite number.
        """
        try:
            value = self._call(Session(model, self._target), "the original model")
        except SessionError as error:
            raise BisectionError(f"the original model does not run: {error}") from error
        if not math.isfinite(value):
            raise BisectionError(
                f"evaluate returned {value} for the original model: there is nothing to compare with. "
                "Check the metric function."
            )
        self._reference = value
        return self._verdict(value)

    def __call__(self, model: ir.Model, what: str) -> Verdict:
        """Measure `model`; one that does not run, or whose metric is NaN, is broken.

        Raises:
            BisectionError: evaluate raises, or returns no number.
        """
        try:
            return self._verdict(self._call(Session(model, self._target), what))
        except SessionError as error:
            return Verdict.stopped(error)

    def _call(self, session: Session, what: str) -> float:
        try:
            value = self._evaluate(session)
        except SessionError:
            raise
        except Exception as error:
            raise BisectionError(f"evaluate raised {type(error).__name__} for {what}: {error}") from error
        try:
            return read_scores(value, what).metric
        except EvaluationError as error:
            raise BisectionError(str(error)) from error

    def _verdict(self, value: float) -> Verdict:
        return Verdict(value, self._reference - value <= self._drop, f"{value:.6g}", f"{value:.6g}")


class OutputDistance:
    """A tolerance on how far the outputs may be from the original's.

    Args:
        data: inputs that both are run on, checked against the original's.
        tolerance: limits; `metric_drop` is not looked at.
        target: where models run.
    """

    def __init__(self, data: Calibration, tolerance: Tolerance, target: Target) -> None:
        self._data = data
        self._tolerance = tolerance
        self._target = target
        self._reference: Session | None = None

    def start(self, model: ir.Model) -> Verdict:
        """Compare the original with itself.

        Raises:
            BisectionError: it does not run, or is not within the tolerance of itself.
        """
        try:
            self._reference = Session(model, self._target)
        except SessionError as error:
            raise BisectionError(f"the original model does not run: {error}") from error
        verdict = self(model, "the original model")
        if not verdict.ok:
            raise BisectionError(
                f"the original model does not meet the tolerance itself ({verdict.text}): widen "
                "the tolerance, and check that the model gives the same outputs for the same inputs."
            )
        return verdict

    def __call__(self, model: ir.Model, what: str) -> Verdict:
        """Compare `model` with the original; one that does not run, or gives other shapes, is broken."""
        if self._reference is None:
            raise ValueError("start with the original model")
        try:
            found = compare_sessions(self._reference, Session(model, self._target), self._data)[0]
        except SessionError as error:
            return Verdict.stopped(error)
        furthest = worst(found)
        if furthest is None:
            raise BisectionError("the model has no output to compare.")
        lowest = min(deviation.cosine for deviation in found.values())
        short = f"cosine {furthest[1].cosine:.5f}, SQNR {furthest[1].sqnr_db:.1f} dB"
        return Verdict(lowest, self._met(found), f"{furthest[0]}: {furthest[1]}", short)

    def _met(self, found: Mapping[str, Deviation]) -> bool:
        try:
            self._tolerance.check(found, "")
        except VerificationError:
            return False
        return True


class Judge:
    """Measures models, each one once: equal models (by content) are told by their digest.

    Args:
        measure: the metric or tolerance.
        limit: evaluations at most.
        tell: is called after every one.
    """

    def __init__(self, measure: Measure, limit: int, tell: Callable[[Evaluation], None] | None) -> None:
        self._measure = measure
        self._limit = limit
        self._tell = tell
        self._known: dict[str, Verdict] = {}
        self.cached = 0
        """How often an equal model was met before."""

    @property
    def evaluations(self) -> int:
        """How many models were measured."""
        return len(self._known)

    @property
    def left(self) -> int:
        """How many more may be measured."""
        return self._limit - self.evaluations

    def start(self, model: ir.Model) -> Verdict:
        """Return the verdict on the original.

        Raises:
            BisectionError: nothing can be compared with it.
        """
        verdict = self._measure.start(model)
        self._known[content_digest(model)] = verdict
        self._say("the original model", verdict, cached=False)
        return verdict

    def __call__(self, model: ir.Model, what: str) -> Verdict:
        """Return the verdict on `model`, named `what` for people.

        Raises:
            LimitReachedError: it would be one evaluation too many.
            BisectionError: the user's metric cannot be used.
        """
        digest = content_digest(model)
        cached = digest in self._known
        if cached:
            self.cached += 1
        elif self.left < 1:
            raise LimitReachedError(f"{self.evaluations} evaluations were made, the limit is {self._limit}.")
        else:
            self._known[digest] = self._measure(model, what)
        verdict = self._known[digest]
        self._say(what, verdict, cached=cached)
        return verdict

    def _say(self, what: str, verdict: Verdict, *, cached: bool) -> None:
        logger.info("evaluation %d%s: %s: %s", self.evaluations, " (known)" if cached else "", what, verdict)
        if self._tell is not None:
            self._tell(Evaluation(self.evaluations, what, verdict, cached))
