# SPDX-License-Identifier: Apache-2.0
"""Measurement: what each choice of each layer does, alone, to the layer's output and to the model's outputs.

The float model is walked through once. At each layer its low-bit forms compute their output from the float
input; from there on only the rest of the model runs again. Positions that an attention mask marks as padding
do not count.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.activations import required_calibration
from splitfold.passes.pieces import Piece
from splitfold.passes.precision import Precision
from splitfold.passes.signals.signal import ByChoice
from splitfold.passes.signals.subject import Subject
from splitfold.passes.submodel import submodel, type_inputs
from splitfold.passes.walk import Walk
from splitfold.runtime.compare import Distance
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.padding import Padding, usual_padding
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["BATCHES", "PieceStep", "local_errors", "measured_batches", "output_errors", "walked"]

logger = logging.getLogger(__name__)

BATCHES = 4
"""Batches of calibration data that a measurement looks at."""


def local_errors(subject: Subject, who: str) -> ByChoice:
    """Return the squared error of each layer's own output relative to its squared norm, fed with the float
    model's activations; 0 in float.

    Args:
        subject: with calibration data, of which the first `BATCHES` are used.
        who: what asks for it, for the error.

    Raises:
        CalibrationError: there is no calibration data, or it does not fit.
    """
    batches, found = measured_batches(subject, who), {}
    counted = _Counted(usual_padding(subject.model), batches)
    for step in walked(subject, batches):
        errors = {item: counted.relative([step.expected], [made]) for item, made in step.made.items()}
        found[step.piece.layer.name] = _complete(subject, step.piece, errors)
    return found


def output_errors(subject: Subject, who: str) -> ByChoice:
    """Return the squared error of the model's outputs relative to their squared norm, mean over the outputs,
    where one layer alone has a precision; 0 in float, infinite where an output is not finite.

    Args and errors: see `local_errors`.
    """
    batches = measured_batches(subject, who)
    counted = _Counted(usual_padding(subject.model), batches)
    whole = Session(subject.model, subject.context.target, optimization=Optimization.ALL)
    reference = _floats([whole.run(feeds) for feeds in batches])
    del whole
    found = {}
    for step in walked(subject, batches):
        rest = _Rest(step, subject, tuple(reference))
        errors = {
            item: counted.relative(reference.values(), rest.outputs(made)) for item, made in step.made.items()
        }
        found[step.piece.layer.name] = _complete(subject, step.piece, errors)
    return found


def measured_batches(subject: Subject, who: str) -> list[Feeds]:
    """Return the batches of calibration data that a measurement looks at.

    Raises:
        CalibrationError: there is none, or it does not fit.
    """
    data = required_calibration(subject.context.calibration, who, subject.model)
    return list(itertools.islice(data, BATCHES))


def _floats(runs: Sequence[Mapping[str, Array]]) -> dict[str, list[Array]]:
    """Return the arrays of all runs by output: of the float outputs, or of all where none is float."""
    names = [name for name, array in runs[0].items() if array.dtype.kind == "f"] or list(runs[0])
    return {name: [run[name] for run in runs] for name in names}


@dataclass(frozen=True)
class PieceStep:
    """The walk at the end of a layer: what comes out in float and in each low-bit form, one array a batch."""

    piece: Piece
    walk: Walk
    expected: Sequence[Array]
    made: Mapping[Precision, Sequence[Array]]


def walked(subject: Subject, batches: Sequence[Feeds]) -> Iterator[PieceStep]:
    """Yield the layers of `subject` in the order of execution, each with what it and its low-bit forms
    compute from the float model's activations."""
    target = subject.context.target
    ends = {piece.layer.input.name or "": piece.end.name or "" for piece in subject.pieces}
    walk = Walk(subject.model, batches, target, until=ends)
    for at, piece in enumerate(subject.pieces):
        given, end = piece.layer.input.name or "", piece.end.name or ""
        inputs = [values[given] for values in walk.values([given])]
        expected = [values[end] for values in walk.values([end])]
        made = {item: _run(form, inputs, target) for item, form in piece.forms.items()}
        logger.info("layer %d of %d: %s", at + 1, len(subject.pieces), piece.layer.name)
        yield PieceStep(piece, walk, expected, made)


def _run(form: ir.Model, inputs: Sequence[Array], target: Target) -> list[Array]:
    name = form.graph.inputs[0].name or ""
    type_inputs(form, {name: inputs[0]})
    session = Session(form, target, optimization=Optimization.ALL)
    return [session.run({name: array})[session.outputs[0]] for array in inputs]


class _Rest:
    """What the model computes from the end of a layer on."""

    def __init__(self, step: PieceStep, subject: Subject, outputs: Sequence[str]) -> None:
        graph = subject.model.graph
        made = {value.name: at for at, node in enumerate(graph) for value in node.outputs}
        self._end, self._outputs = step.piece.end.name or "", outputs
        later = [name for name in outputs if made.get(name, -1) > made[self._end]]
        self._session: Session | None = None
        self._held: list[dict[str, Array]] = [{} for _ in step.expected]
        if later:
            part = submodel(subject.model, later, step.walk.held)
            names = [value.name or "" for value in part.graph.inputs]
            self._held = step.walk.values(names)
            type_inputs(part, self._held[0])
            self._session = Session(part, subject.context.target, optimization=Optimization.ALL)

    def outputs(self, made: Sequence[Array]) -> list[list[Array]]:
        """Return, for each output of the model, an array a batch; none where the layer does not come
        before it."""
        runs = [self._one(held, array) for held, array in zip(self._held, made, strict=True)]
        return [[run[name] for run in runs if name in run] for name in self._outputs]

    def _one(self, held: Mapping[str, Array], array: Array) -> dict[str, Array]:
        given = {name: array if name == self._end else value for name, value in held.items()}
        found = self._session.run(given) if self._session is not None else {}
        return {**found, self._end: array}


@dataclass(frozen=True)
class _Counted:
    """The positions of each batch that count."""

    padding: Padding
    batches: Sequence[Feeds]

    def relative(self, expected: Iterable[Sequence[Array]], actual: Iterable[Sequence[Array]]) -> float:
        """Return the squared relative error, mean over outputs; one without arrays has none."""
        errors = []
        for reference, found in zip(expected, actual, strict=True):
            distance = Distance()
            for feeds, x, y in zip(self.batches, reference, found, strict=False):
                distance.add(self.padding.without(feeds, x), self.padding.without(feeds, y))
            error = distance.deviation().relative ** 2
            errors.append(error if math.isfinite(error) else math.inf)
        return math.fsum(errors) / len(errors) if errors else 0.0


def _complete(subject: Subject, piece: Piece, errors: Mapping[Precision, float]) -> dict[Precision, float]:
    return {item: errors.get(item, 0.0) for item in subject.choices[piece.layer.name]}
