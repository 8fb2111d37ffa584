# SPDX-License-Identifier: Apache-2.0
"""`compile`: capture, canonicalize, the pipeline, legalize, check, open, verify."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from splitfold.compiler.compiled import Compiled
from splitfold.compiler.errors import VerificationError
from splitfold.compiler.manifest import build_manifest
from splitfold.compiler.presets import int8
from splitfold.compiler.realisation import Realisation, Unrealised, read_realisation
from splitfold.compiler.source import Source, load_source
from splitfold.compiler.tolerance import Budget, Tolerance
from splitfold.compiler.verify import Verifier, compare_outputs, name_non_finite
from splitfold.passes.base import Context, Contract, LayerPass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import PassFailedError
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.pipeline import Observer, PassRecord, Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import Deviation, first_non_finite
from splitfold.runtime.digest import content_digest, feeds_digest
from splitfold.runtime.errors import SessionError
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["Evaluate", "compile", "complete"]

logger = logging.getLogger(__name__)

Evaluate = Callable[[Session], float]
"""The user's metric of an opened model; more is better."""

_CHECKED_BELOW = 1_000_000_000
"""Bytes of weights above which the ONNX checker is not asked: protobuf ends at 2 GB."""
_REPAIRS = 3
"""Rounds in which layers that the runtime did not realise are put back to float; the second is already rare.
"""


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

    Raises:
        CaptureError, ArtifactError: the model cannot be read or traced.
        CalibrationError: a pass needs calibration data that is missing or does not fit.
        PassFailedError: a pass failed or broke its promise.
        VerificationError: the result is out of tolerance, or gives NaN or infinity.
        BudgetError: the result costs too much.
    """
    place = target or Target.cpu()
    source = load_source(model, example_inputs, dynamic_shapes, calibration, place)
    steps = complete(pipeline)
    build = _Build(source, place, source.calibration, tuple(observers), unrealised)
    result, records, realised, steps = build.run(steps)
    _warn_idle(records)
    limits = tolerance or Tolerance()
    deviations = _verify(result, build.reference, source, place, limits, records)
    (budget or Budget()).check(weight_bytes(result))
    facts = _facts(source, place, source.calibration) | {"put_back": build.put_back}
    facts |= _metric(evaluate, source.model, result, place, limits)
    manifest = build_manifest(result, steps, records, realised, deviations, facts)
    return Compiled(result, manifest, place, records=tuple(records), source=source)


def complete(pipeline: Pipeline | str | None) -> Pipeline:
    """Return the pipeline that `compile` runs for this one: canonical form before and legalization after it,
    where they lack."""
    steps = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline or int8()
    if not steps.steps or not isinstance(steps.steps[0], CanonicalizePass):
        steps = Pipeline.of(CanonicalizePass()) + steps
    if not isinstance(steps.steps[-1], LegalizePass):
        steps = steps + Pipeline.of(LegalizePass())
    return steps


@dataclass
class _Build:
    """One compilation: the pipeline runs, the runtime's own graph is read back, and what was not realised is
    repaired."""

    source: Source
    target: Target
    calibration: Calibration | None
    observers: tuple[Observer, ...]
    unrealised: Unrealised

    def __post_init__(self) -> None:
        self.reference: Mapping[str, Any] = {}
        self.put_back: dict[str, str] = {}
        if self.source.unverified:
            logger.warning("the result is not verified: %s", self.source.unverified)
        else:
            self.reference = Verifier(self.source.model, self.source.feeds, self.target).reference

    def run(self, steps: Pipeline) -> tuple[ir.Model, list[PassRecord], list[Realisation], Pipeline]:
        for _ in range(_REPAIRS):
            model = self.source.model.clone()
            records = steps.run(
                model, Context(self.target, self.calibration), (*self._verifier(), *self.observers)
            )
            _check_valid(model, self.source.model, steps)
            if not self.source.opens:
                return model, records, [], steps
            realised = read_realisation(model, records, self.target)
            missing = {item.layer: item.kernel for item in realised if not item.realised}
            if not missing or self.unrealised is Unrealised.KEEP:
                return model, records, realised, steps
            if self.unrealised is Unrealised.ERROR:
                layer, kernel = next(iter(missing.items()))
                raise PassFailedError(
                    f"{len(missing)} low-bit layers run in no low-bit kernel; the first is '{layer}' (it "
                    f"runs as {kernel})",
                    failed=str(steps),
                )
            logger.info(
                "%d layers were not realised and go back to float: %s", len(missing), ", ".join(missing)
            )
            self.put_back |= missing
            steps = _excluding(steps, records, missing)
        raise PassFailedError(
            f"layers remain unrealised after {_REPAIRS} rounds: {', '.join(missing)}", failed=str(steps)
        )

    def _verifier(self) -> tuple[Verifier, ...]:
        if self.source.unverified:
            return ()
        return (Verifier.resumed(self.reference, self.source.feeds, self.target),)


def _excluding(steps: Pipeline, records: Sequence[PassRecord], missing: Mapping[str, str]) -> Pipeline:
    """Return the pipeline with each layer of `missing` excluded from the pass that carried it."""
    changed = []
    for step, record in zip(steps, records, strict=True):
        layers = tuple(layer for layer in record.carried if layer in missing)
        if layers and isinstance(step, LayerPass):
            step = dataclasses.replace(step, exclude=tuple(dict.fromkeys((*step.exclude, *layers))))
        changed.append(step)
    return Pipeline(tuple(changed))


def _check_valid(model: ir.Model, original: ir.Model, steps: Pipeline) -> None:
    """Raise `PassFailedError` where the ONNX checker refuses the model, and did not refuse the original."""
    fault = _fault(model)
    if fault is None:
        return
    if (before := _fault(original)) is not None:
        logger.warning("the ONNX checker refuses the original model already: %s", before)
        return
    raise PassFailedError(f"the result is not valid ONNX: {fault}", failed=str(steps))


def _fault(model: ir.Model) -> str | None:
    if weight_bytes(model) > _CHECKED_BELOW:
        return None  # the session that opens next checks the same
    try:
        onnx.checker.check_model(ir.to_proto(model))
    except onnx.checker.ValidationError as error:
        return str(error).splitlines()[0]
    return None


def _check_original_runs(source: Source, target: Target) -> None:
    """Raise `SessionError` where the original model does not run as deployed either."""
    try:
        Session(source.model, target).run(source.feeds)
    except SessionError as error:
        raise SessionError(
            f"the original model does not run with the runtime's optimisations on: {error}"
        ) from error


def _verify(
    result: ir.Model,
    reference: Mapping[str, Any],
    source: Source,
    target: Target,
    limits: Tolerance,
    records: Sequence[PassRecord],
) -> dict[str, Deviation]:
    """Compare the result, as deployed, with the reference, and hold it to the tolerance."""
    if not source.opens:
        return {}
    try:
        outputs = Session(result, target).run(source.feeds)
    except SessionError as error:
        _check_original_runs(source, target)
        raise VerificationError(f"the result does not run as deployed: {error}") from error
    if source.unverified:
        return {}
    blame = _blame(records)
    name = first_non_finite(outputs)
    if name is not None and first_non_finite(reference) is None:
        where = name_non_finite(result, source.feeds, target)
        raise VerificationError(f"output '{name}' holds NaN or infinity; {where}.", output=name, blame=blame)
    deviations = compare_outputs(reference, outputs)
    limits.check(deviations, blame)
    return deviations


def _warn_idle(records: Sequence[PassRecord]) -> None:
    lossy = [record for record in records if record.contract == Contract.LOSSY.value]
    if lossy and not any(record.applied for record in lossy):
        logger.warning("nothing was quantized: every candidate was skipped, see the records for the reasons")


def _blame(records: Sequence[PassRecord]) -> str:
    measured = [record for record in records if record.deviation is not None]
    found = min(
        measured, key=lambda record: record.deviation.sqnr_db if record.deviation else math.inf, default=None
    )
    return found.text if found is not None else ""


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
            f"evaluate returned NaN ({first} before, {last} after): check the metric function."
        )
    limits.check_metric(first, last)
    return {"metric": {"before": first, "after": last}}
