# SPDX-License-Identifier: Apache-2.0
"""Bisection: which pass breaks a metric, for which layers, and the pipeline that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitfold.compiler.debug.bisect.culprits import Culprit, Search
from splitfold.compiler.debug.bisect.judge import (
    Evaluation,
    Judge,
    Measure,
    OutputDistance,
    UserMetric,
    Verdict,
)
from splitfold.compiler.driver import Evaluate, complete
from splitfold.compiler.errors import BisectionError
from splitfold.compiler.presets import int8
from splitfold.compiler.source import Source, load_source
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.base import Context, Pass
from splitfold.passes.pipeline import Observer, Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import model_inputs
from splitfold.runtime.target import Target

__all__ = ["Bisection", "Culprit", "bisect"]

_LEAST = 3
"""Evaluations without which nothing can be found: the original, the end, and one between."""


@dataclass(frozen=True)
class Bisection:
    """What `bisect` found.

    Attributes:
        reference: how the original does.
        stages: (text form of the pass, how the model does after it) of the pipeline as given; None where that
            was not evaluated.
        culprits: the passes that break the model, in the order of the pipeline.
        pipeline: the pipeline that works, or None where none was found.
        verdict: how the result of `pipeline` does, or None.
        evaluations: models that were measured.
        cached: how often a model was met again and not measured.
        exhausted: whether the limit ended the search: what was found is then the best known.
        left_out: text forms of the user's passes that `pipeline` lacks.
    """

    reference: Verdict
    stages: tuple[tuple[str, Verdict | None], ...]
    culprits: tuple[Culprit, ...]
    pipeline: Pipeline | None
    verdict: Verdict | None
    evaluations: int
    cached: int
    exhausted: bool
    left_out: tuple[str, ...] = ()


def bisect(
    model: object,
    pipeline: Pipeline | str | None = None,
    *,
    evaluate: Evaluate | None = None,
    drop: float = 0.01,
    data: object = None,
    tolerance: Tolerance | None = None,
    calibration: object = None,
    example_inputs: object = None,
    dynamic_shapes: object = None,
    target: Target | None = None,
    limit: int = 200,
    observers: Sequence[Observer] = (),
    tell: Callable[[Evaluation], None] | None = None,
) -> Bisection:
    """Find the passes and layers that break a metric, and a pipeline that does not.

    The pipeline is run once and the model kept after every pass. A binary search finds a pass after which the
    metric is broken and before which it is not; of the layers which that pass was applied to, the smallest
    set is found whose exclusion mends it; the passes after it are searched in the same way, until the whole
    pipeline meets the metric. A pass that does not work layer by layer is left out.

    Layers that the runtime would not compute in low precision are not put back to float, as `compile` does
    after its last pass.

    Args:
        model, calibration, example_inputs, dynamic_shapes, target: as `compile` takes them.
        pipeline: passes, or their text form; completed as `compile` does. Default `presets.int8()`.
        evaluate: metric of an opened `Session`, more is better; give it or `data`.
        drop: what the metric may lose, absolute.
        data: inputs on which outputs are compared with the original's, in any form that calibration has.
        tolerance: limits on the deviation over `data`; default cosine 0.9.
        limit: models to evaluate at most.
        observers: are told of the passes.
        tell: is called after every evaluation.

    Raises:
        BisectionError: the metric cannot be used, the original does not meet it, or the whole pipeline does.
        SpecError, CalibrationError, CaptureError, ArtifactError: as `compile`.
    """
    place = target or Target.cpu()
    _check(evaluate, data, tolerance, limit)
    source = load_source(model, example_inputs, dynamic_shapes, calibration, place)
    measure = _measure(source, evaluate, drop, data, tolerance, place)
    judge = Judge(measure, limit, tell)
    hints = _data(source, data) if data is not None else source.calibration or Calibration.of(source.feeds)
    given = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline or int8(place)
    steps = complete(given)
    context = Context(place, source.calibration)
    search = Search(steps, source.model, context, judge, hints, observers)
    reference = judge.start(source.model)
    return _outcome(search, judge, search.run(reference), reference, given)


def _outcome(search: Search, judge: Judge, works: bool, reference: Verdict, given: Pipeline) -> Bisection:
    steps = complete(given)
    found = _as_given(search.steps if works else search.steps[: search.good], steps, given)
    rest = () if works else _as_given(search.steps[search.good :], steps, given)
    return Bisection(
        reference,
        tuple((str(step), search.first.get(place)) for place, step in enumerate(steps, 1)),
        tuple(search.culprits),
        Pipeline(found) if found else None,
        search.verdict() if found else None,
        judge.evaluations,
        judge.cached,
        search.exhausted or any(culprit.layers and not culprit.minimal for culprit in search.culprits),
        (*(culprit.step for culprit in search.culprits if culprit.left_out), *map(str, rest)),
    )


def _as_given(steps: Sequence[Pass], completed: Pipeline, given: Pipeline) -> tuple[Pass, ...]:
    """Return `steps` without those that `complete` added."""
    return tuple(step for step in steps if step in given.steps or step not in completed.steps)


def _check(evaluate: object, data: object, tolerance: object, limit: int) -> None:
    if (evaluate is None) == (data is None):
        given = "both evaluate and data were" if data is not None else "neither evaluate nor data was"
        raise BisectionError(f"{given} given: say with one of them what is to be kept.")
    if evaluate is not None and tolerance is not None:
        raise BisectionError("a tolerance is on outputs and needs data; a metric has drop.")
    if limit < _LEAST:
        raise BisectionError(f"limit is {limit}: at least {_LEAST} evaluations are needed.")


def _measure(
    source: Source,
    evaluate: Evaluate | None,
    drop: float,
    data: object,
    tolerance: Tolerance | None,
    target: Target,
) -> Measure:
    if evaluate is not None:
        return UserMetric(evaluate, drop, target)
    return OutputDistance(_data(source, data), tolerance or Tolerance(), target)


def _data(source: Source, data: object) -> Calibration:
    names = tuple(value.name or "" for value in model_inputs(source.model))
    return Calibration.of(data, inputs=names).fitted(source.model).checked(source.model)
