# SPDX-License-Identifier: Apache-2.0
"""`compile`: capture, canonicalize, the pipeline, legalize, check, open, verify."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from splitfold.compiler.build import Built, Job, build, complete
from splitfold.compiler.checkpoint import Checkpoint
from splitfold.compiler.compiled import Compiled
from splitfold.compiler.debug.failure.blame import name_layer
from splitfold.compiler.debug.reproduce.reproducer import REPRODUCERS, write_reproducer
from splitfold.compiler.errors import VerificationError
from splitfold.compiler.manifest import build_manifest
from splitfold.compiler.realisation import Unrealised
from splitfold.compiler.source import Source, load_source
from splitfold.compiler.tolerance import Budget, Tolerance
from splitfold.passes.errors import Failure, FailureError
from splitfold.passes.pipeline import Observer, Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.digest import content_digest, feeds_digest
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["Evaluate", "compile", "complete"]

Evaluate = Callable[[Session], float]
"""The user's metric of an opened model; more is better."""


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
    dynamic_shapes: object = None,
    observers: Sequence[Observer] = (),
    unrealised: Unrealised = Unrealised.FLOAT,
    reproducers: str | Path | None = REPRODUCERS,
) -> Compiled:
    """Compile a model into a verified ONNX artifact that plain ONNX Runtime runs.

    Args:
        model: `nn.Module` in eval mode, `ExportedProgram`, `fx.GraphModule`, path of an ``.onnx`` or artifact
            folder, `onnx.ModelProto` or `onnx_ir.Model`. It is not changed.
        example_inputs: tuple, dict by input name, or ``(tuple, dict)``; needed for torch modules, else
            calibration's first batch or seeded synthetic inputs serve. The outputs are compared on them.
        pipeline: passes, or their text form; default `presets.int8()`. Canonical form before and legalization
            after it are added where they lack.
        target: where the artifact runs; default ONNX Runtime's CPU provider.
        calibration: representative inputs: re-iterable of feeds, generator function, DataLoader, ``.npz``
            path or folder.
        evaluate: metric of an opened `Session`, recorded before and after.
        budget: limits on the result's cost.
        tolerance: limits on the result's deviation; default cosine 0.9.
        dynamic_shapes: dynamic axes, as `torch.export.export` takes them.
        observers: are told of each pass.
        unrealised: what to do with a low-bit layer that no low-bit kernel computes.
        reproducers: folder into which a failure of a pass, of the runtime or of verification writes a folder
            with the smallest part of the model that still fails, which the error names. The search for it
            ends after about half a minute; None is for writing none.

    Raises:
        CaptureError, ArtifactError: the model cannot be read or traced.
        CalibrationError: a pass needs calibration data that is missing or does not fit.
        PassFailedError: a pass failed or broke its promise.
        VerificationError: the result is out of tolerance, gives NaN or infinity, or does not run as deployed.
        OriginalFailedError: the model that was given does not run on the inputs.
        BudgetError: the result costs too much.
    """
    place = target or Target.cpu()
    source = load_source(model, example_inputs, dynamic_shapes, calibration, place)
    limits = tolerance or Tolerance()
    job = Job(source, complete(pipeline), place, limits, unrealised)
    built = _build(job, observers, None if reproducers is None else Path(reproducers))
    (budget or Budget()).check(weight_bytes(built.model))
    facts = _facts(source, place, source.calibration) | {"put_back": built.put_back}
    facts |= _metric(evaluate, source.model, built.model, place, limits)
    manifest = build_manifest(
        built.model, built.steps, built.records, built.realised, built.deviations, facts
    )
    return Compiled(built.model, manifest, place, records=tuple(built.records), source=source)


def _build(job: Job, observers: Sequence[Observer], reproducers: Path | None) -> Built:
    checkpoint = Checkpoint()
    try:
        return build(job, checkpoint, observers)
    except FailureError as error:
        name_layer(error, job, checkpoint)
        if reproducers is not None:
            write_reproducer(error, job, checkpoint, reproducers)
        raise


def _facts(source: Source, target: Target, calibration: Calibration | None) -> dict[str, Any]:
    return {
        "target": target.name,
        "source": content_digest(source.model),
        "calibration": None if calibration is None else calibration.digest(),
        "feeds": feeds_digest(source.feeds),
        "feeds_synthetic": source.synthetic,
        "metric": None,
        "unverified": source.unverified or None,
    }


def _metric(
    evaluate: Evaluate | None, before: ir.Model, after: ir.Model, target: Target, limits: Tolerance
) -> dict[str, Any]:
    if evaluate is None:
        return {}
    first, last = float(evaluate(Session(before, target))), float(evaluate(Session(after, target)))
    if math.isnan(first) or math.isnan(last):
        raise VerificationError(
            f"evaluate returned NaN ({first} before, {last} after): check the metric function.",
            kind=Failure.METRIC,
        )
    limits.check_metric(first, last)
    return {"metric": {"before": first, "after": last}}
