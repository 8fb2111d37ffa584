# SPDX-License-Identifier: Apache-2.0
"""Inside one pass: the smallest set of layers that the pass must leave alone for the model to work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.compiler.debug.bisect.judge import Judge, Verdict
from splitfold.compiler.debug.bisect.stages import openable
from splitfold.compiler.debug.delta import minimize
from splitfold.passes.base import Context, LayerPass, Require
from splitfold.passes.errors import SpecError
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.errors import CalibrationError, SplitfoldError

__all__ = ["CulpritLayer", "Exclusion", "Trial", "excluding", "narrow"]


@dataclass(frozen=True)
class CulpritLayer:
    """A layer that a pass must leave alone.

    Attributes:
        layer: as the pass names it.
        alone: how the model does where only this layer is left alone; None where it was not tried.
        taken: how it does where all other culprits are left alone and this one is not; None where it was not
            tried.
    """

    layer: str
    alone: Verdict | None
    taken: Verdict | None


@dataclass(frozen=True)
class Exclusion:
    """What `narrow` found.

    Attributes:
        layers: the layers to leave alone; empty where even leaving all alone does not help.
        step: the pass with these layers excluded, or None.
        minimal: whether leaving out any one of them is known to break the model again.
        verdict: how the model does with them excluded.
    """

    layers: tuple[CulpritLayer, ...] = ()
    step: LayerPass | None = None
    minimal: bool = False
    verdict: Verdict | None = None


def excluding(step: LayerPass, patterns: Sequence[str]) -> LayerPass:
    """Return `step` with `patterns` excluded besides what it excludes already; it can then no longer require
    that all is applied."""
    exclude = tuple(dict.fromkeys((*step.exclude, *patterns)))
    return dataclasses.replace(step, exclude=exclude, require=Require.NONE) if patterns else step


class Trial:
    """Runs one pass over the model before it, some layers left alone, and has the result judged.

    Args:
        step: the pass.
        before: the model before it; not changed.
        context: as the pass was run with.
        judge: tells how the result does.
    """

    def __init__(self, step: LayerPass, before: ir.Model, context: Context, judge: Judge) -> None:
        self.step = step
        self.judge = judge
        self._before = before
        self._context = context
        self._split = False
        self.known: dict[frozenset[str], Verdict] = {}

    def __call__(self, layers: Sequence[str]) -> Verdict:
        """Return the verdict on the model where `layers` are left alone.

        Raises:
            LimitReachedError: no further evaluation may be made.
            SpecError: the pass records these layers under names that it cannot exclude.
        """
        key = frozenset(layers)
        if key not in self.known:
            self.known[key] = self._judged(layers)
        return self.known[key]

    def step_without(self, layers: Sequence[str]) -> LayerPass:
        """Return the pass with `layers` excluded."""
        names = [part for layer in layers for part in (layer.split("+") if self._split else (layer,))]
        return excluding(self.step, names)

    def _judged(self, layers: Sequence[str]) -> Verdict:
        try:
            made = self._run(layers)
        except (CalibrationError, SpecError):
            raise
        except SplitfoldError as error:
            return Verdict.stopped(error)
        return self.judge(made, f"the model where {self.step.name} leaves out {_listed(layers)}")

    def _run(self, layers: Sequence[str]) -> ir.Model:
        made = self._before.clone()
        try:
            Pipeline.of(self.step_without(layers)).run(made, self._context)
        except SpecError:
            if self._split or not any("+" in layer for layer in layers):
                raise
            self._split = True  # a group of layers is recorded under all of their names, and excluded by each
            return self._run(layers)
        return openable(made, self._context, str(self.step))


def narrow(trial: Trial, layers: Sequence[str], *, reserve: int) -> Exclusion:
    """Return the smallest found set of `layers` whose exclusion makes the model work.

    Args:
        trial: of the pass that breaks the model.
        layers: what it was applied to, the most suspicious first.
        reserve: evaluations to leave over.

    Raises:
        LimitReachedError: no set was found before the evaluations ran out.
        SpecError: the pass cannot exclude what it says it applied.
    """
    size = 1
    while not trial(layers[:size]).ok:
        if size >= len(layers):
            return Exclusion()
        size = min(2 * size, len(layers))
    limit = trial.judge.left - reserve + 2  # the whole and the empty set are known: they cost nothing
    found = minimize(layers[:size], lambda chosen: bool(chosen) and trial(chosen).ok, limit=max(limit, 2))
    names = found.items
    return Exclusion(
        tuple(_culprit(layer, names, trial.known) for layer in names),
        trial.step_without(names),
        found.minimal,
        trial(names),
    )


def _culprit(layer: str, names: Sequence[str], known: Mapping[frozenset[str], Verdict]) -> CulpritLayer:
    alone = known.get(frozenset({layer}))
    return CulpritLayer(layer, alone, known.get(frozenset(names) - {layer}))


def _listed(layers: Sequence[str]) -> str:
    more = f" and {len(layers) - 3} more layers" if len(layers) > 3 else ""
    return ", ".join(layers[:3]) + more
