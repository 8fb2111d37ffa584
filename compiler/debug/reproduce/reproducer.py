# SPDX-License-Identifier: Apache-2.0
"""Reproducers: for a failure of `compile`, a folder with the smallest part of the model that still fails."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from splitfold.compiler.build import Job
from splitfold.compiler.checkpoint import Checkpoint
from splitfold.compiler.debug.reproduce.case import Case, Signature, attempt
from splitfold.compiler.debug.reproduce.case_folder import case_facts, read_case, write_case, write_facts
from splitfold.compiler.debug.reproduce.pass_class import hindrance
from splitfold.compiler.debug.reproduce.reduce import Limits, Reduced, reduce
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import Failure, FailureError
from splitfold.passes.identity import display_layer, name_layers
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.errors import SplitfoldError
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.model_file import new_folder, weight_bytes
from splitfold.runtime.target import Target

__all__ = ["REPRODUCERS", "write_reproducer"]

logger = logging.getLogger(__name__)

REPRODUCERS = Path(tempfile.gettempdir(), "splitfold-reproducers")
"""Folder of the reproducers where no other is given."""
_WITHOUT = {Failure.NOT_APPLIED, Failure.METRIC}
"""Failures of what the user asked for, not of the work."""
_FEW_LAYERS = 4
_CONFIRM_SECONDS = 5.0
"""A case that takes longer is not run once more from its files."""
_BATCHES = 4
_BATCH_BYTES = 256_000_000
"""Calibration batches, and their bytes, that a reproducer may begin with."""


def write_reproducer(
    error: FailureError, job: Job, checkpoint: Checkpoint, place: Path, limits: Limits | None = None
) -> None:
    """Write a folder below `place` with the smallest part of the model that still fails, and name it in
    `error`.

    The search for that part ends after about half a minute. The folder's name depends on the failure alone:
    the same one again replaces it. Where none can be written the error says why; nothing is raised.

    Args:
        error: what `build` raised.
        job: what it was asked to do.
        checkpoint: the model before and after the pass that failed.
        place: made where it does not exist.
        limits: bounds on the reduction.
    """
    if error.kind in _WITHOUT:
        return
    try:
        error.reproducer = _write(error, job, checkpoint, place, limits or Limits())
    except Exception as failure:  # must not hide the error itself
        logger.debug("no reproducer", exc_info=failure)
        error.reproducer = f"No reproducer was written: {str(failure) or type(failure).__name__}"


def _write(error: FailureError, job: Job, checkpoint: Checkpoint, place: Path, limits: Limits) -> str:
    wanted = Signature.of(error)
    folder = place / f"splitfold-{_digest(error, wanted, job)}"
    logger.info("looking for the smallest part that fails in the same way: %g s at most", limits.seconds)
    starts = _starts(error, job, checkpoint)
    reduced = _reduce(starts, wanted, {error.layer, *error.layer.split("+")} - {""}, limits)
    logger.info("reproducer: %d attempts in %.1f s", reduced.attempts, reduced.seconds)
    if reduced.case is not None:
        _correct_layer(error, reduced.case)
    case = reduced.case or starts[0]
    with_model = reduced.case is not None or weight_bytes(case.model) <= limits.kept_bytes
    with new_folder(folder, overwrite=True) as scratch:
        seen, hindered, facts = False, _hindrance(case), case_facts(case)
        if with_model:
            write_case(scratch, case)
            quick = reduced.case is not None and reduced.case_seconds < _CONFIRM_SECONDS
            seen = quick and not hindered and _fails_again(scratch, facts, wanted)
        notes = list(_notes(reduced, case, job, with_model, seen, hindered))
        write_facts(scratch, {**_failure_facts(error, wanted), **facts, "notes": notes})
    return _line(folder, case, reduced, with_model, hindered)


def _reduce(starts: list[Case], wanted: Signature, layers: set[str], limits: Limits) -> Reduced:
    try:
        return reduce(starts, wanted, layers, limits)
    except Exception as failure:  # a model not reduced is better than none
        logger.debug("the reduction failed", exc_info=failure)
        note = f"the reduction failed: {type(failure).__name__}: {failure}"
        return Reduced(None, (note,), 0, 0.0, False, 0.0)


def _starts(error: FailureError, job: Job, checkpoint: Checkpoint) -> list[Case]:
    """Return the cases that should fail: the pass alone on the model before it, then all from the source."""
    source = job.source
    batches = tuple(_first_batches(job))
    named = source.model.clone()
    name_layers(named)
    whole = Case(named, source.feeds or None, batches, job.steps, job.target, job.tolerance, job.unrealised)
    step = checkpoint.step
    if error.kind is Failure.ORIGINAL:
        return [dataclasses.replace(whole, steps=Pipeline.of(CanonicalizePass()))]
    if step is None or checkpoint.before is None or error.culprit != str(step):
        return [dataclasses.replace(whole, steps=_given(job.steps))]
    alone = dataclasses.replace(whole, model=checkpoint.before, steps=Pipeline.of(step))
    if not checkpoint.done:
        return [dataclasses.replace(whole, steps=Pipeline.of(step))]
    ran = job.steps.steps[: len(checkpoint.done) + 1]
    return [alone, dataclasses.replace(whole, steps=_given(Pipeline(ran)))]


def _given(steps: Pipeline) -> Pipeline:
    """Return `steps` without what `compile` adds by itself."""
    inner = list(steps.steps)
    if len(inner) > 1 and inner[0] == CanonicalizePass():
        del inner[0]
    if len(inner) > 1 and inner[-1] == LegalizePass():
        del inner[-1]
    return Pipeline(tuple(inner))


def _first_batches(job: Job) -> Iterator[Feeds]:
    size = 0
    for feeds in itertools.islice(job.source.calibration or (), _BATCHES):
        size += sum(array.nbytes for array in feeds.values())
        if size > _BATCH_BYTES:
            return
        yield feeds


def _correct_layer(error: FailureError, case: Case) -> None:
    """Where all that is left is one layer, it is that one that fails; where it is a few, say which."""
    layers = list(dict.fromkeys(display_layer(node) for node in case.model.graph.all_nodes()))
    if len(layers) == 1 and error.layer not in layers:
        error.layer, error.found = layers[0], ""
    elif not error.layer and len(layers) <= _FEW_LAYERS:
        error.found = f"The smallest part that fails holds the layers {', '.join(layers)}."


def _digest(error: FailureError, wanted: Signature, job: Job) -> str:
    """Return eight digits that tell failures apart: by error, pipeline, and the graph without its weights."""
    parts = [str(wanted), error.culprit, error.layer, str(job.steps)]
    for node in job.source.model.graph:
        names = [value.name if value is not None else "" for value in (*node.inputs, *node.outputs)]
        parts.append(f"{node.op_type} {names}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _hindrance(case: Case) -> str:
    """Return why the case cannot be run from its files; empty where it can."""
    try:
        known = Target.named(case.target.name) == case.target
    except SplitfoldError:
        known = False
    return hindrance(case.steps) if known else f"the target '{case.target.name}' is your own"


def _fails_again(folder: Path, facts: Mapping[str, Any], wanted: Signature) -> bool:
    error = attempt(read_case(folder, facts))
    return error is not None and Signature.of(error) == wanted


def _failure_facts(error: FailureError, wanted: Signature) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "kind": error.kind.value,
        "pass": error.culprit,
        "layer": error.layer,
        "message": str(error),
        "signature": dataclasses.asdict(wanted),
    }


def _notes(
    reduced: Reduced, case: Case, job: Job, with_model: bool, seen: bool, hindered: str
) -> Iterator[str]:
    whole, part = _count(job.source.model), _count(case.model)
    if reduced.case is None:
        yield f"not reduced: in {reduced.attempts} attempts no part failed in the same way"
    else:
        yield f"{part} of {whole} nodes, found in {reduced.attempts} attempts"
    if reduced.exhausted:
        yield "the search was ended by its limits"
    yield from reduced.notes
    if not with_model:
        yield "no model: it is too large"
    if hindered:
        yield f"cannot be run as it is: {hindered}"
    elif not seen:
        yield "these files were not seen to fail again"


def _count(model: ir.Model) -> int:
    return sum(len(graph) for graph in model.graphs())


def _line(folder: Path, case: Case, reduced: Reduced, with_model: bool, hindered: str) -> str:
    count = _count(case.model)
    what = f"{count} node{'' if count == 1 else 's'}" if with_model else "no model, it is too large"
    if reduced.case is None and with_model:
        what += ", not reduced"
    line = f"Reproducer: {folder} ({what}): splitfold reproduce {shlex.quote(str(folder))}"
    return f"{line}\nIt cannot be run as it is: {hindered}." if hindered else line
