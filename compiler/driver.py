# SPDX-License-Identifier: Apache-2.0
"""`compile`: capture, canonicalize, the pipeline, legalize, check, open, verify."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from splitfold.compiler.build import Built, Job, build, complete
from splitfold.compiler.checkpoint import Checkpoint
from splitfold.compiler.compiled import Compiled
from splitfold.compiler.debug.failure.blame import name_layer
from splitfold.compiler.debug.reproduce.reproducer import REPRODUCERS, write_reproducer
from splitfold.compiler.errors import EvaluationError
from splitfold.compiler.manifest import build_manifest, installed_version
from splitfold.compiler.outlier_record import outlier_values
from splitfold.compiler.plan_record import named_by_digest
from splitfold.compiler.presets import PRESETS, mixed, preset
from splitfold.compiler.realisation import Unrealised
from splitfold.compiler.search.compiling import searched_job, settled
from splitfold.compiler.search.evaluation import Subject, evaluate_all
from splitfold.compiler.search.found import Searched, manifest_values
from splitfold.compiler.search.options import Search
from splitfold.compiler.search.scores import Evaluate
from splitfold.compiler.source import Source, load_source
from splitfold.compiler.speed.options import IfSlower, SpeedCheck
from splitfold.compiler.speed.outcome import Speed
from splitfold.compiler.speed.repair import check_speed
from splitfold.compiler.tolerance import Budget, Tolerance
from splitfold.passes.errors import FailureError
from splitfold.passes.pipeline import Observer, Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.digest import content_digest, feeds_digest
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.openvino import PACKAGE
from splitfold.runtime.session import usable
from splitfold.runtime.target import Target

__all__ = ["SPEED_CHECK", "Evaluate", "compile", "complete"]

SPEED_CHECK = SpeedCheck()
"""How a compilation is timed where nothing else is asked for."""


def compile(
    model: object,
    example_inputs: object = None,
    *,
    pipeline: Pipeline | str | None = None,
    target: Target | None = None,
    calibration: object = None,
    evaluate: Evaluate | None = None,
    budget: Budget | None = None,
    tolerance: Tolerance | None = None,
    search: Search | None = None,
    dynamic_shapes: object = None,
    observers: Sequence[Observer] = (),
    unrealised: Unrealised = Unrealised.FLOAT,
    speed: SpeedCheck | None = SPEED_CHECK,
    reproducers: str | Path | None = REPRODUCERS,
) -> Compiled:
    """Compile a model into a verified ONNX artifact that plain ONNX Runtime runs.

    Args:
        model: `nn.Module` in eval mode, `ExportedProgram`, `fx.GraphModule`, path of an ``.onnx`` or artifact
            folder, `onnx.ModelProto` or `onnx_ir.Model`. It is not changed.
        example_inputs: tuple, dict by input name, or ``(tuple, dict)``; needed for torch modules. Outputs are
            compared on them, else on calibration's first batch or seeded synthetic inputs.
        pipeline: passes, or their text form, which `complete` completes; default the target's preset int8.
        target: where the artifact runs; default ONNX Runtime's CPU provider.
        calibration: representative inputs, in any form that `Calibration.of` takes.
        evaluate: metric, see `Evaluate`; recorded before and after.
        budget: limits on the result's cost; with `max_drop` a search for the best plan of precisions.
        tolerance: limits on its deviation; default cosine 0.9, and none where `max_drop` is given.
        search: how that search goes about it.
        dynamic_shapes: dynamic axes, as `torch.export.export` takes them.
        observers: are told of each pass.
        unrealised: what to do with a low-bit layer that no low-bit kernel computes.
        speed: how the result is timed beside the model, and what happens where it is slower; None for not.
        reproducers: folder for the smallest part that still fails, see `write_reproducer`; None for none.

    Raises:
        CaptureError, ArtifactError, CalibrationError: model or calibration data cannot be read or do not fit.
        PassFailedError: a pass failed or broke its promise.
        VerificationError: the result is out of tolerance, gives NaN or infinity, or does not run as deployed.
        OriginalFailedError, ProviderError: the model, or the target's provider, does not run here.
        EvaluationError: `evaluate` raised, returned NaN, or something that is no score.
        BudgetError: the result costs too much, or no plan keeps `max_drop` and `search` makes that an error.
    """
    place = usable(target or Target.cpu())
    source = load_source(model, example_inputs, dynamic_shapes, calibration, place)
    folder = None if reproducers is None else Path(reproducers)
    wanted = _Wanted(evaluate, budget or Budget(), speed, observers, folder)
    if wanted.budget.max_drop is None:
        steps = complete(pipeline, place)
        return wanted.made(Job(source, steps, place, tolerance or Tolerance(), unrealised))
    steps = complete(mixed() if pipeline is None else pipeline)
    job = Job(source, steps, place, tolerance or Tolerance(cosine=None), unrealised)
    return wanted.found(job, search or Search())


@dataclass(frozen=True)
class _Wanted:
    """What `compile` is asked beside the job: see there."""

    evaluate: Evaluate | None
    budget: Budget
    speed: SpeedCheck | None
    observers: Sequence[Observer]
    reproducers: Path | None

    def made(self, job: Job) -> Compiled:
        """Carry out the job."""
        built, found = self._timed(job, self._build(job))
        metric = _metric(self.evaluate, job.source.model, built.model, job)
        return _compiled(job, built, self.budget, metric, speed=found)

    def found(self, job: Job, search: Search) -> Compiled:
        """Carry out the job with the best plan of precisions that a search finds."""
        if self.evaluate is None:
            raise ValueError(
                "budget.max_drop is what the metric may lose: give evaluate, a function of a session."
            )
        with searched_job(job, self.evaluate, self.budget, search, self.observers) as (planned, best):
            built = self._build(planned)
            best = settled(best, built.model, self.evaluate, job)
        kept = "It stays as it is: its plan was searched for."
        built, found = self._timed(job, built, kept=kept)
        return _compiled(job, built, self.budget, _searched(best), best, speed=found)

    def _build(self, job: Job) -> Built:
        checkpoint = Checkpoint()
        try:
            return build(job, checkpoint, self.observers)
        except FailureError as error:
            name_layer(error, job, checkpoint)
            if self.reproducers is not None:
                write_reproducer(error, job, checkpoint, self.reproducers)
            raise

    def _timed(self, job: Job, built: Built, *, kept: str = "") -> tuple[Built, Speed | None]:
        """Return the build to keep, and how fast it is; `kept` is why a slower one stays."""
        if self.speed is None:
            return built, None
        if not kept and self.speed.if_slower is IfSlower.KEEP:
            kept = "It stays as it is, as was asked."
        if not kept and self.speed.if_slower is IfSlower.PRESET and not _is_preset(job.steps, job.target):
            kept = "It stays as it is: the pipeline is your own (if_slower=repair changes it)."

        def rebuild(steps: Pipeline) -> Built:
            return self._build(dataclasses.replace(job, steps=steps))

        return check_speed(job, built, self.speed, rebuild, kept=kept)


def _is_preset(steps: Pipeline, target: Target) -> bool:
    made = (preset(name, place) for name in PRESETS for place in (None, target))
    return any(steps == complete(pipeline) for pipeline in (*made, mixed()))


def _compiled(
    job: Job,
    built: Built,
    budget: Budget,
    metric: dict[str, Any],
    search: Searched | None = None,
    *,
    speed: Speed | None = None,
) -> Compiled:
    budget.check(weight_bytes(built.model))
    steps, records = named_by_digest(built.steps, built.records)
    facts = _facts(job.source, job.target, job.source.calibration) | {"put_back": built.put_back} | metric
    if built.placement is not None:
        facts["placement"] = built.placement.values() | {"version": installed_version(PACKAGE)}
    if speed is not None and speed.changed:
        facts["too_slow"] = dict.fromkeys(speed.put_back, "float") | dict.fromkeys(speed.in_int8, "int8")
    facts |= outlier_values(job.source.model, built.model, records, job.source.calibration, job.target)
    manifest = build_manifest(built.model, steps, records, built.realised, built.deviations, facts)
    return Compiled(
        built.model,
        manifest,
        job.target,
        records=tuple(records),
        source=job.source,
        search=search,
        speed=speed,
    )


def _facts(source: Source, target: Target, calibration: Calibration | None) -> dict[str, Any]:
    return {
        "target": target.name,
        "session": target.options.values(),
        "source": content_digest(source.model),
        "calibration": None if calibration is None else calibration.digest(),
        "feeds": feeds_digest(source.feeds),
        "feeds_synthetic": source.synthetic,
        "metric": None,
        "unverified": source.unverified or None,
    }


def _metric(evaluate: Evaluate | None, before: ir.Model, after: ir.Model, job: Job) -> dict[str, Any]:
    if evaluate is None:
        return {}
    first, last = (
        _mean(evaluate, before, "the original model", job),
        _mean(evaluate, after, "the result", job),
    )
    job.tolerance.check_metric(first, last)
    return {"metric": {"before": first, "after": last}}


def _mean(evaluate: Evaluate, model: ir.Model, what: str, job: Job) -> float:
    found = evaluate_all(evaluate, [Subject(what, model)], job.target)[0]
    fault = found.fault if found.scores is None else found.scores.fault
    if found.scores is None or fault:
        raise EvaluationError(f"{fault} for {what}: check the metric function.")
    return found.scores.metric


def _searched(found: Searched) -> dict[str, Any]:
    return {
        "metric": {"before": found.original, "after": found.metric},
        "search": manifest_values(found),
    }
