# SPDX-License-Identifier: Apache-2.0
"""One compilation: the pipeline runs, the result is checked, opened as deployed, repaired where the runtime
does not realise it, and verified."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from splitfold.compiler.checkpoint import Checkpoint
from splitfold.compiler.checks import FirstInvalid, FirstNotDeployed, checker_fault
from splitfold.compiler.errors import OriginalFailedError, VerificationError
from splitfold.compiler.presets import int8
from splitfold.compiler.realisation import Realisation, Unrealised, read_realisation
from splitfold.compiler.source import Source
from splitfold.compiler.tolerance import Tolerance
from splitfold.compiler.verify import Verifier, compare_outputs
from splitfold.passes.base import Context, Contract, LayerPass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import Failure, PassFailedError
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.pipeline import Observer, PassRecord, Pipeline
from splitfold.runtime.compare import Deviation, first_non_finite
from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Array
from splitfold.runtime.placement import Placement
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["Built", "Job", "build", "complete"]

logger = logging.getLogger(__name__)

_REPAIRS = 3
"""Rounds in which layers that the runtime did not realise are put back to float; the second is already rare.
"""


@dataclass(frozen=True)
class Job:
    """What a compilation is asked to do, but for budget and metric.

    Attributes:
        source: the model, the feeds that it is verified on, and the calibration data.
        steps: the whole pipeline.
        target: where the result runs.
        tolerance: limits on its deviation.
        unrealised: what to do with a low-bit layer that no low-bit kernel computes.
    """

    source: Source
    steps: Pipeline
    target: Target
    tolerance: Tolerance
    unrealised: Unrealised = Unrealised.FLOAT


@dataclass(frozen=True)
class Built:
    """What came of a job.

    Attributes:
        model: the result.
        records: what each pass did.
        realised: which kernel each low-bit layer runs in.
        steps: the pipeline that really ran, exclusions included.
        put_back: kernel by layer of those that went back to float.
        deviations: of each output, as deployed, from the reference.
        placement: which provider runs what, as deployed; None where only the CPU provider does.
    """

    model: ir.Model
    records: list[PassRecord]
    realised: list[Realisation]
    steps: Pipeline
    put_back: Mapping[str, str]
    deviations: Mapping[str, Deviation]
    placement: Placement | None = None


def complete(pipeline: Pipeline | str | None, target: Target | None = None) -> Pipeline:
    """Return the pipeline that `compile` runs for this one: canonical form before and legalization after it,
    where they lack; the preset int8 of `target` for none."""
    steps = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline or int8(target)
    if not steps.steps or not isinstance(steps.steps[0], CanonicalizePass):
        steps = Pipeline.of(CanonicalizePass()) + steps
    if not isinstance(steps.steps[-1], LegalizePass):
        steps = steps + Pipeline.of(LegalizePass())
    return steps


def build(job: Job, checkpoint: Checkpoint, observers: Sequence[Observer] = ()) -> Built:
    """Run the pipeline of `job` over a copy of its model, and verify what comes out.

    `checkpoint` holds the model before and after the pass that failed where one did.

    Raises:
        PassFailedError: a pass failed or broke its promise.
        VerificationError: the result is out of tolerance, gives NaN or infinity, or does not run as deployed.
        OriginalFailedError: the model that was given does not run.
    """
    return _Build(job, checkpoint, tuple(observers)).run()


@dataclass
class _Build:
    job: Job
    checkpoint: Checkpoint
    observers: tuple[Observer, ...]

    def __post_init__(self) -> None:
        source = self.job.source
        self.context = Context(self.job.target, source.calibration)
        self.reference: Mapping[str, Any] = {}
        self.placement: Placement | None = None
        if source.unverified:
            logger.warning("the result is not verified: %s", source.unverified)
        else:
            self.reference = _reference(source, self.job.target)

    def run(self) -> Built:
        steps = self.job.steps
        put_back: dict[str, str] = {}
        for _ in range(_REPAIRS):
            model, records = self._pipeline(steps)
            realised = self._realisation(steps, model, records)
            missing = {item.layer: item.kernel for item in realised if not item.realised}
            if not missing or self.job.unrealised is Unrealised.KEEP:
                _warn_idle(records)
                deviations = self._verify(steps, model, records)
                _warn_left(self.placement)
                return Built(model, records, realised, steps, put_back, deviations, self.placement)
            if self.job.unrealised is Unrealised.ERROR:
                raise _unrealised(steps, missing)
            logger.info(
                "%d layers were not realised and go back to float: %s", len(missing), ", ".join(missing)
            )
            put_back |= missing
            steps = _excluding(steps, records, missing)
        raise PassFailedError(
            f"layers remain unrealised after {_REPAIRS} rounds: {', '.join(missing)}",
            failed=str(steps),
            kind=Failure.UNREALISED,
            layer=next(iter(missing)),
        )

    def _pipeline(self, steps: Pipeline) -> tuple[ir.Model, list[PassRecord]]:
        model = self.job.source.model.clone()
        records = steps.run(model, self.context, (self.checkpoint, *self._verifier(), *self.observers))
        self._check_valid(steps, model)
        return model, records

    def _verifier(self) -> tuple[Verifier, ...]:
        if self.job.source.unverified:
            return ()
        return (Verifier.resumed(self.reference, self.job.source.feeds, self.job.target),)

    def _check_valid(self, steps: Pipeline, model: ir.Model) -> None:
        """Raise `PassFailedError` where the ONNX checker refuses the model, and not already the original."""
        fault = checker_fault(model)
        if fault is None:
            return
        if (before := checker_fault(self.job.source.model)) is not None:
            logger.warning("the ONNX checker refuses the original model already: %s", before)
            return
        self._again(steps, FirstInvalid())
        raise PassFailedError(
            f"the result is not valid ONNX: {fault}", failed=str(steps), kind=Failure.INVALID
        )

    def _again(self, steps: Pipeline, search: Observer) -> None:
        """Run the pipeline once more for `search` to raise at the pass that is to blame."""
        steps.run(self.job.source.model.clone(), self.context, (self.checkpoint, search))

    def _realisation(
        self, steps: Pipeline, model: ir.Model, records: Sequence[PassRecord]
    ) -> list[Realisation]:
        if not self.job.source.opens:
            return []
        try:
            return read_realisation(model, records, self.job.target)
        except SessionError as error:
            self._run_deployed(steps, model)
            raise error

    def _run_deployed(self, steps: Pipeline, model: ir.Model) -> dict[str, Array]:
        try:
            session = Session(model, self.job.target)
            self.placement = session.placement
            return session.run(self.job.source.feeds)
        except SessionError as error:
            raise self._not_deployed(steps, error) from error

    def _not_deployed(self, steps: Pipeline, error: SessionError) -> VerificationError:
        """Return what to raise where the result does not run with the runtime's optimisations on."""
        source, target = self.job.source, self.job.target
        try:
            Session(source.model, target).run(source.feeds)
        except SessionError as original:
            raise OriginalFailedError(
                f"the original model does not run with the runtime's optimisations on: {original}",
                kind=Failure.ORIGINAL,
            ) from original
        self._again(steps, FirstNotDeployed(source.feeds, target))
        return VerificationError(f"the result does not run as deployed: {error}", kind=Failure.NOT_DEPLOYED)

    def _verify(
        self, steps: Pipeline, model: ir.Model, records: Sequence[PassRecord]
    ) -> dict[str, Deviation]:
        """Compare the result, as deployed, with the reference, and hold it to the tolerance."""
        source = self.job.source
        if not source.opens:
            return {}
        outputs = self._run_deployed(steps, model)
        if source.unverified:
            return {}
        blame = _blame(records)
        name = first_non_finite(outputs)
        if name is not None and first_non_finite(self.reference) is None:
            raise VerificationError(
                f"output '{name}' holds NaN or infinity.", kind=Failure.NON_FINITE, output=name, blame=blame
            )
        deviations = compare_outputs(self.reference, outputs)
        self.job.tolerance.check(deviations, blame)
        return deviations


def _reference(source: Source, target: Target) -> Mapping[str, Any]:
    try:
        return Verifier(source.model, source.feeds, target).reference
    except SessionError as error:
        raise OriginalFailedError(
            f"the original model does not run: {error}", kind=Failure.ORIGINAL
        ) from error


def _unrealised(steps: Pipeline, missing: Mapping[str, str]) -> PassFailedError:
    layer, kernel = next(iter(missing.items()))
    return PassFailedError(
        f"{len(missing)} low-bit layers run in no low-bit kernel; the first is '{layer}' (it runs as "
        f"{kernel})",
        failed=str(steps),
        kind=Failure.UNREALISED,
        layer=layer,
    )


def _excluding(steps: Pipeline, records: Sequence[PassRecord], missing: Mapping[str, str]) -> Pipeline:
    """Return the pipeline with each layer of `missing` excluded from the pass that carried it."""
    changed = []
    for step, record in zip(steps, records, strict=True):
        layers = tuple(layer for layer in record.carried if layer in missing)
        if layers and isinstance(step, LayerPass):
            step = dataclasses.replace(step, exclude=tuple(dict.fromkeys((*step.exclude, *layers))))
        changed.append(step)
    return Pipeline(tuple(changed))


def _warn_idle(records: Sequence[PassRecord]) -> None:
    lossy = [record for record in records if record.contract == Contract.LOSSY.value]
    if lossy and not any(record.applied for record in lossy):
        logger.warning("nothing was quantized: every candidate was skipped, see the records for the reasons")


def _warn_left(placement: Placement | None) -> None:
    if placement is not None and placement.left:
        logger.warning("%s; the first is %s", placement, placement.left[0])


def _blame(records: Sequence[PassRecord]) -> str:
    measured = [record for record in records if record.deviation is not None]
    found = min(
        measured, key=lambda record: record.deviation.sqnr_db if record.deviation else math.inf, default=None
    )
    return found.text if found is not None else ""
