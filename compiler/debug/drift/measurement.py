# SPDX-License-Identifier: Apache-2.0
"""How far a compiled model is from its reference at each layer, and where the error arises."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import onnx_ir as ir

from splitfold.compiler.debug.drift.causes import Causes
from splitfold.compiler.debug.drift.comparable import Comparable, comparable
from splitfold.compiler.debug.drift.cut import cut_open
from splitfold.compiler.debug.drift.impact import Suspect, question
from splitfold.compiler.debug.drift.measure import Measured, measure, slice_pair
from splitfold.compiler.debug.drift.padding import PADDING, find_padding
from splitfold.compiler.debug.drift.pairing import pair_models
from splitfold.compiler.debug.drift.points import Place, places, unmatched_layers
from splitfold.compiler.source import runnable_feeds
from splitfold.passes.errors import SpecError
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import Deviation
from splitfold.runtime.errors import did_you_mean
from splitfold.runtime.feeds import model_inputs
from splitfold.runtime.target import Target

__all__ = ["SLICE_BYTES", "Drift", "Point", "drift"]

SLICE_BYTES = 1_000_000_000
"""Default bound on the weights and measured values that are in memory at once."""
_ALIKE = math.sqrt(2)
"""Ratio of relative errors, 3 dB, up to which impacts are alike: they are measured on few batches."""
_IMPACT_BATCHES = 2
"""Batches on which the impact of a suspect is measured."""
_ROUNDING = {"float16": 5e-3, "float32": 1e-5, "float64": 1e-5}
"""Relative error up to which a value of this type is equal but for float rounding."""


@dataclass(frozen=True)
class Point:
    """A value of the reference that the compiled model computes too.

    Attributes:
        layer: user layer, as the reference names it.
        operator: operator of the reference that computes the value.
        value: its name in the reference.
        actual: name of its counterpart in the compiled model.
        depth: longest way from an input to it, in points.
        accumulated: deviation where each model runs by itself.
        local: deviation of what the compiled model computes from the *reference's* values: the error that is
            made between this value and the nearest matched ones before it. The quantization of a layer's
            inputs and weights belongs to the layer that reads them. None where it could not be measured.
        impact: deviation of the reference's worst output where this point carries its local error, with those
            that read a value through the same grid as it does, and nothing else is wrong; measured for the
            worst, else None.
        source: whether an error arises here, beyond float rounding.
        through: operators of the compiled model that compute it from the matched values before it, in order.
        note: what can be seen of the cause, or an empty text.
    """

    layer: str
    operator: str
    value: str
    actual: str
    depth: int
    accumulated: Deviation
    local: Deviation | None
    impact: Deviation | None
    source: bool
    through: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Drift:
    """What `drift` found.

    Attributes:
        points: every value that both models compute, in the reference's order of dependency.
        outputs: deviation of each output of the models.
        batches: how many batches it was measured over.
        slices: parts in which the models were run, to keep memory bounded.
        unmatched: layers of the reference none of whose values the compiled model computes, with the reason.
        padding: input whose zeros mark positions that were left out, or None.
    """

    points: tuple[Point, ...]
    outputs: Mapping[str, Deviation]
    batches: int
    slices: int
    unmatched: tuple[str, ...] = ()
    padding: str | None = None

    def ranked(self) -> list[Point]:
        """Return all points by blame, worst first: sources by their measured impact on the outputs (where two
        are within 3 dB, by local error), the other sources by local error, then what is merely dragged along,
        by accumulated error."""
        measured = [point for point in self.points if point.source and point.impact is not None]
        others = [point for point in self.points if point.source and point.impact is None]
        dragged = [point for point in self.points if not point.source]
        others.sort(key=_local, reverse=True)
        dragged.sort(key=lambda point: _size(point.accumulated.relative), reverse=True)
        return _by_impact(measured) + others + dragged

    def sources(self) -> list[Point]:
        """Return the points where an error arises, by blame."""
        return [point for point in self.ranked() if point.source]

    def by_layer(self) -> dict[str, Point]:
        """Return one point for each layer, in order of dependency: its worst by blame where an error arises
        in it, else its last."""
        rank = {point.value: position for position, point in enumerate(self.ranked())}
        found: dict[str, Point] = {}
        for point in self.points:
            held = found.get(point.layer)
            worse = held is not None and point.source and rank[point.value] < rank[held.value]
            if held is None or not held.source or worse:
                found[point.layer] = point
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; infinite and undefined numbers are texts such as ``"inf"``."""
        rank = {point.value: position + 1 for position, point in enumerate(self.ranked())}
        points = [{"rank": rank[point.value], **_plain(dataclasses.asdict(point))} for point in self.points]
        outputs = {name: _plain(dataclasses.asdict(found)) for name, found in self.outputs.items()}
        return {
            "outputs": outputs,
            "batches": self.batches,
            "slices": self.slices,
            "padding": self.padding,
            "points": points,
            "unmatched": list(self.unmatched),
        }


def _by_impact(points: Sequence[Point]) -> list[Point]:
    """Return the points by impact; where impacts are alike, by local error."""
    left = sorted(points, key=lambda point: _impact(point), reverse=True)
    found: list[Point] = []
    while left:
        alike = [point for point in left if _impact(point) * _ALIKE >= _impact(left[0])]
        found += sorted(alike, key=_local, reverse=True)
        left = left[len(alike) :]
    return found


def _impact(point: Point) -> float:
    return _size(point.impact.relative) if point.impact is not None else 0.0


def _local(point: Point) -> float:
    return _size(point.local.relative) if point.local is not None else 0.0


def _size(relative: float) -> float:
    return math.inf if math.isnan(relative) else relative


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def drift(
    reference: object,
    actual: object,
    data: object = None,
    *,
    target: Target | None = None,
    suspects: int = 12,
    slice_bytes: int = SLICE_BYTES,
    only: Sequence[str] = (),
    padding: str | None = PADDING,
) -> Drift:
    """Run two models on the same inputs and return how far they are apart at each layer, and where the error
    arises.

    Args:
        reference, actual: path of an ``.onnx`` file or artifact folder, `Artifact`, `onnx.ModelProto` or
            `onnx_ir.Model`. `actual` may come from any tool that keeps the names of values.
        data: representative inputs, as `splitfold.compiler.compile` takes its calibration; None makes one
            seeded synthetic batch.
        target: where both run; default ONNX Runtime's CPU provider. No optimization of the runtime is used.
        suspects: of how many sources, worst by local error, the impact on the outputs is measured.
        slice_bytes: about the most bytes of weights and measured values in memory at once, what the runtime
            copies aside; larger models are run in slices.
        only: layer patterns (shell wildcards); other layers are not measured.
        padding: input of shape [batch, positions] whose zeros mark positions that are left out of all
            deviations, where the models have it; None leaves out none.

    Raises:
        ArtifactError, CaptureError: a model cannot be read.
        ComparisonError: inputs or outputs differ, or the models have no value in common.
        CalibrationError: `data` does not fit the models.
        SpecError: a pattern of `only` matches no layer.
        SessionError: a model does not run.
    """
    place = target or Target.cpu()
    pair = pair_models(reference, actual)
    batches = _batches(data, pair.reference, place)
    usable = comparable(pair, next(iter(batches)), place, slice_bytes)
    pair = usable.pair
    cut = cut_open(pair.actual, pair.counterparts, usable.types)
    where = places(pair.reference, cut)
    chosen = _chosen(where, only)
    parts = slice_pair(pair, cut, chosen, usable.sizes, place, slice_bytes)
    ignored = find_padding(pair.reference, padding)
    found = measure(parts, pair, cut, batches, ignored, slice_bytes)
    points = [_point(name, usable, where[name], found) for name in chosen]
    worst = _suspects(points, suspects)
    causes = Causes(pair.reference, cut, {p.value: where[p.value].part for p in points if p.source})
    few = list(islice(batches, _IMPACT_BATCHES)) if worst else []
    cases = causes.cases(worst)
    guilt = question(pair, cut, parts, cases, causes.inside, few, place, ignored, causes.explain)
    return Drift(
        tuple(_judged(point, guilt.get(point.value)) for point in points),
        {name: sums.deviation() for name, sums in found.outputs.items()},
        found.batches,
        found.slices,
        unmatched_layers(pair.reference, pair.counterparts, usable.refused),
        ignored.input,
    )


def _batches(data: object, model: ir.Model, target: Target) -> Calibration:
    if data is None:
        return Calibration.of(runnable_feeds(model, target))
    names = tuple(value.name or "" for value in model_inputs(model))
    return Calibration.of(data, inputs=names).fitted(model).checked(model)


def _chosen(where: Mapping[str, Place], only: Sequence[str]) -> list[str]:
    """Return the names of the values to measure.

    Raises:
        SpecError: a pattern matches no layer.
    """
    layers = {place.layer for place in where.values()}
    for pattern in only:
        if not fnmatch.filter(layers, pattern) and pattern not in layers:
            raise SpecError(f"no layer matches '{pattern}'.{did_you_mean(pattern, sorted(layers))}")
    wanted = {layer for layer in layers if not only or layer in only or _matches(layer, only)}
    return [name for name, place in where.items() if place.layer in wanted]


def _matches(layer: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(layer, pattern) for pattern in patterns)


def _rounding(names: Sequence[str], usable: Comparable) -> float:
    """Return the relative error up to which a value computed from such values is equal: by the coarsest type
    of the compiled model's."""
    there = [usable.types.get(usable.pair.counterparts[name][-1], usable.sizes[name]) for name in names]
    return max(_ROUNDING.get(seen.dtype.name, 0.0) for seen in there)


def _suspects(points: Sequence[Point], count: int) -> list[str]:
    """Return the sources with the largest local error; of equal ones the first."""
    sources = sorted((point for point in points if point.source), key=_local, reverse=True)
    return [point.value for point in sources[:count]]


def _judged(point: Point, found: Suspect | None) -> Point:
    if found is None:
        return point
    return dataclasses.replace(point, impact=found.impact, note=point.note or found.note)


def _point(name: str, usable: Comparable, place: Place, found: Measured) -> Point:
    accumulated = found.accumulated[name].deviation()
    sums = found.local.get(name) if not place.mixed else None
    local = sums.deviation() if sums is not None else None
    actual = usable.pair.counterparts[name][-1]
    source = local is not None and not local.relative <= _rounding([name, *place.reads], usable)
    note = found.accumulated[name].complaint
    return Point(
        place.layer,
        place.operator,
        name,
        actual,
        place.depth,
        accumulated,
        local,
        None,
        source,
        tuple(node.op_type for node in place.part),
        note,
    )
