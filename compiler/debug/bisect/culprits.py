# SPDX-License-Identifier: Apache-2.0
"""The search of a bisection: what breaks the model is found and taken out, pass after pass, until nothing
does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.compiler.debug.bisect.judge import Judge, LimitReachedError, Verdict
from splitfold.compiler.debug.bisect.narrow import CulpritLayer, Exclusion, Trial, narrow
from splitfold.compiler.debug.bisect.stages import openable, walk
from splitfold.compiler.debug.bisect.suspects import by_suspicion, suspects
from splitfold.compiler.errors import BisectionError
from splitfold.passes.base import Context, LayerPass, Pass
from splitfold.passes.errors import SpecError
from splitfold.passes.identity import display_layer
from splitfold.passes.layers import find_layers
from splitfold.passes.pipeline import Observer, PassRecord, Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import SplitfoldError

__all__ = ["Culprit", "Search"]

_FEW = 2
"""Layers that are tried as they come: measuring suspicion would take longer."""
_SUSPECTS = 3
"""Layers that are named where a pass cannot be narrowed down."""


@dataclass(frozen=True)
class Culprit:
    """A pass that breaks the model.

    Attributes:
        step: its text form.
        applied: the layers that it says it changed.
        before, after: how the model does before and after it; `after` is None where the pass raised.
        error: what it raised, or an empty text.
        layers: the layers that it must leave alone; empty where it cannot be narrowed down to layers.
        minimal: whether leaving out any one of `layers` is known to break the model again.
        suspects: where `layers` is empty, layers by the error they add, the worst first: a hint.
        remedy: text form of the pass that takes its place; empty where there is none.
        left_out: whether the pipeline that was found goes on without it.
        reason: why it could not be narrowed down, or an empty text.
    """

    step: str
    applied: tuple[str, ...]
    before: Verdict
    after: Verdict | None
    error: str = ""
    layers: tuple[CulpritLayer, ...] = ()
    minimal: bool = False
    suspects: tuple[str, ...] = ()
    remedy: str = ""
    left_out: bool = False
    reason: str = ""


class Search:
    """Mends a pipeline.

    Args:
        steps: the completed pipeline.
        original: the model before it.
        context: what the passes may know.
        judge: tells how a model does; it was started.
        hints: data on which suspicion is measured.
        observers: are told of the passes.
    """

    def __init__(
        self,
        steps: Pipeline,
        original: ir.Model,
        context: Context,
        judge: Judge,
        hints: Calibration,
        observers: Sequence[Observer],
    ) -> None:
        self.steps: list[Pass] = list(steps)
        self.culprits: list[Culprit] = []
        self.first: dict[int, Verdict] = {}
        """Verdicts on the pipeline as given, by the number of passes that ran."""
        self.good = 0
        """How many of the passes, from the front, are known to work."""
        self.exhausted = False
        """Whether the evaluations ran out."""
        self._context = context
        self._judge = judge
        self._hints = hints
        self._observers = observers
        self._models = [original]
        self._records: list[PassRecord] = []
        self._verdicts: dict[int, Verdict] = {}
        self._error: SplitfoldError | None = None
        self._ranked: dict[int, tuple[str, ...]] = {}

    def run(self, reference: Verdict) -> bool:
        """Mend the pipeline and return whether all of it works now.

        Raises:
            BisectionError: nothing is broken.
        """
        self._verdicts[0] = self.first[0] = reference
        self._walk(0)
        try:
            while bad := self._first_broken():
                if not self._mend(bad):
                    return False
        except LimitReachedError:
            self.exhausted = True
            return False
        if not self.culprits:
            raise BisectionError(_nothing(reference, self._verdicts[len(self.steps)]))
        return True

    def verdict(self) -> Verdict:
        """Return how the model does after the passes that are known to work."""
        return self._verdicts[self.good]

    def _walk(self, start: int) -> None:
        """Run the passes from `start` on, and keep the models after them."""
        walked = walk(self._models[start], self.steps[start:], self._context, self._observers)
        self._models[start + 1 :] = [stage.model for stage in walked.stages]
        self._records[start:] = [stage.record for stage in walked.stages]
        self._error = walked.error
        self._ranked = {}
        self._verdicts = {place: verdict for place, verdict in self._verdicts.items() if place <= start}

    def _judged(self, place: int) -> Verdict:
        """Return how the model after `place` passes does."""
        if place not in self._verdicts:
            self._verdicts[place] = self._measured(place)
            if not self.culprits:
                self.first[place] = self._verdicts[place]
        return self._verdicts[place]

    def _measured(self, place: int) -> Verdict:
        try:
            made = openable(self._models[place], self._context, str(self.steps[place - 1]))
        except SplitfoldError as error:
            return Verdict.stopped(error)
        return self._judge(made, f"the model after {self.steps[place - 1]}")

    def _first_broken(self) -> int | None:
        """Return the number of passes after which the model is broken and one fewer not, or None."""
        last = len(self._models) - 1
        if self._judged(last).ok:
            self.good = last
            return None if self._error is None else last + 1
        high = last
        while high - self.good > 1:
            middle = (self.good + high) // 2
            if self._judged(middle).ok:
                self.good = middle
            else:
                high = middle
        return high

    def _mend(self, bad: int) -> bool:
        """Take out what breaks the model in the `bad`-th pass, and return whether that could be done."""
        step = self.steps[bad - 1]
        found, reason = self._narrowed(step, bad)
        culprit = self._culprit(bad, found, reason)
        self.culprits.append(culprit)
        if self.exhausted:
            return False
        if found.step is not None and found.verdict is not None:
            self.steps[bad - 1] = found.step
            self._walk(bad - 1)
            self._verdicts[bad] = found.verdict
            self.good = bad
            return True
        if not self._may_go(bad):
            return False
        del self.steps[bad - 1]
        self._walk(bad - 1)
        return True

    def _narrowed(self, step: Pass, bad: int) -> tuple[Exclusion, str]:
        """Return the layers that `step` must leave alone, or why there are none."""
        if not isinstance(step, LayerPass):
            return Exclusion(), "it does not work layer by layer"
        trial = Trial(step, self._models[bad - 1], self._context, self._judge)
        if self._ran(bad):
            trial.known[frozenset()] = self._judged(bad)
        reason = "it names no layer"
        for layers in self._candidates(bad):
            try:
                found = narrow(trial, layers, reserve=len(self.steps) - bad + 1)
            except LimitReachedError:
                self.exhausted = True
                return Exclusion(), "the limit of evaluations was reached before"
            except SpecError as error:
                reason = f"it cannot exclude these layers ({error})"
            else:
                return found, "" if found.layers else "it breaks the model with all layers excluded too"
        return Exclusion(), reason

    def _may_go(self, bad: int) -> bool:
        return 1 < bad < len(self.steps)  # no pipeline is without its canonical form and its legalization

    def _ran(self, bad: int) -> bool:
        return bad < len(self._models)

    def _candidates(self, bad: int) -> Iterator[list[str]]:
        """Yield lists of layers that the `bad`-th pass may be told to leave alone, the most suspicious first:
        what it says it changed, or what it may have stumbled over."""
        applied = self._applied(bad)
        if self._ran(bad):
            if applied:
                few = len(applied) <= _FEW
                yield applied if few else by_suspicion(applied, self._suspects(bad))
            return
        before = self._models[bad - 1]
        yield by_suspicion(list(dict.fromkeys(map(display_layer, before.graph))), applied)
        yield by_suspicion([layer.name for layer in find_layers(before)[0]], applied)

    def _culprit(self, bad: int, found: Exclusion, reason: str) -> Culprit:
        ran = self._ran(bad)
        return Culprit(
            step=str(self.steps[bad - 1]),
            applied=tuple(self._applied(bad)),
            before=self._judged(bad - 1),
            after=self._judged(bad) if ran else None,
            error="" if ran else getattr(self._error, "message", str(self._error)),
            layers=found.layers,
            minimal=found.minimal,
            suspects=self._suspects(bad)[:_SUSPECTS] if ran and not found.layers else (),
            remedy="" if found.step is None else str(found.step),
            left_out=found.step is None and not self.exhausted and self._may_go(bad),
            reason=reason,
        )

    def _applied(self, bad: int) -> list[str]:
        """Return the layers that the `bad`-th pass changed, or which it names in its error."""
        if self._ran(bad):
            return list(dict.fromkeys(layer for layer, _ in self._records[bad - 1].applied))
        layer = getattr(self._error, "layer", "")
        return [layer] if layer else []

    def _suspects(self, bad: int) -> tuple[str, ...]:
        """Return the layers that the `bad`-th pass is likely to have harmed, the worst first."""
        if bad not in self._ranked:
            self._ranked[bad] = self._measured_suspects(bad)
        return self._ranked[bad]

    def _measured_suspects(self, bad: int) -> tuple[str, ...]:
        try:
            before, after = (openable(self._models[place], self._context, "") for place in (bad - 1, bad))
        except SplitfoldError:
            return ()
        return suspects(before, after, self._hints, self._context.target)


def _nothing(reference: Verdict, end: Verdict) -> str:
    return (
        "nothing to bisect: the whole pipeline meets the limit "
        f"({reference.text} before it, {end.text} after it)."
    )
