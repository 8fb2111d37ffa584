# SPDX-License-Identifier: Apache-2.0
"""What a layer takes in each of its precisions, as measured: the layer cut out, on the first batch of
calibration data, side by side with its float form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from splitfold.passes.activations import required_calibration
from splitfold.passes.casts import neighbours
from splitfold.passes.layers import LayerKind
from splitfold.passes.pieces import Piece
from splitfold.passes.precision import Precision
from splitfold.passes.provenance import anchors
from splitfold.passes.regions import output_point
from splitfold.passes.signals.subject import Subject
from splitfold.passes.submodel import submodel, type_inputs
from splitfold.passes.walk import Walk
from splitfold.runtime.bench import bench
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.target import Target

__all__ = ["PieceTimes", "measure_times", "saved_conversions"]

RUNS = 20
"""Timed runs of each form of each layer."""


@dataclass(frozen=True)
class PieceTimes:
    """Times of layers, in milliseconds, medians.

    Layers that share the quantization of one input each pay for it, and what the runtime does between layers
    is as in float: an estimate.

    Attributes:
        float_ms: of the whole float model.
        more: by layer and precision, what the layer alone takes longer than in float (shorter: negative). A
            static int8 convolution pays for quantizing its input and dequantizing its output.
        saved: by two convolutions, the first feeding the second, what they pay too much for conversions where
            both are in static int8.
    """

    float_ms: float
    more: Mapping[str, Mapping[Precision, float]]
    saved: Mapping[tuple[str, str], float] = field(default_factory=dict)


def measure_times(subject: Subject, *, runs: int = RUNS) -> PieceTimes:
    """Return the times of all layers of `subject` in all of their choices.

    Raises:
        CalibrationError: there is no calibration data: its first batch gives the shapes.
    """
    data = required_calibration(subject.context.calibration, "a budget in milliseconds", subject.model)
    first, target = next(iter(data)), subject.context.target
    ends = {piece.layer.input.name or "": piece.end.name or "" for piece in subject.pieces}
    walk = Walk(subject.model, [first], target, until=ends)
    more, casts = {}, {}
    for piece in subject.pieces:
        feeds = walk.values([piece.layer.input.name or ""])[0]
        own = {Precision.float(): 0.0}
        for precision in piece.forms:
            own[precision] = _difference(*_forms(piece, precision, subject), feeds, runs, target)
        more[piece.layer.name] = own
        if (cast := _cast(piece)) is not None:
            casts[piece.layer.name] = _time(cast, feeds, runs, target)
        walk.values([piece.end.name or ""])
    (whole,) = bench([subject.model], first, runs=runs, target=target)
    return PieceTimes(whole.median_ms, more, saved_conversions(subject, casts))


def _forms(piece: Piece, precision: Precision, subject: Subject) -> tuple[ir.Model, ir.Model]:
    """Return the float and the low-bit form between the same two values."""
    given = piece.layer.input.name or ""
    if piece.layer.kind is LayerKind.CONV and precision == Precision.int8_static():
        point, copy = output_point(piece.layer), subject.variants[precision].model
        twins = anchors(subject.model, copy)
        back = _round_trip(copy, twins.get(point.name or "", ""))
        if back is not None:  # a convolution runs in integers only where its output is quantized too
            form = submodel(copy, [back], [twins.get(given, given)])
            for value in form.graph.inputs[:1]:
                value.name = given
            return submodel(subject.model, [point.name or ""], [given]), form
    return submodel(subject.model, [piece.end.name or ""], [given]), piece.forms[precision]


def _round_trip(model: ir.Model, name: str) -> str | None:
    """Return the name of the value that QuantizeLinear and DequantizeLinear make of the value named."""
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None and node.inputs[0].name == name:
            for use in node.outputs[0].uses():
                if use.node.op_type == "DequantizeLinear":
                    return use.node.outputs[0].name
    return None


def _cast(piece: Piece) -> ir.Model | None:
    """Return the conversion of a static convolution's input to codes and back as a model, or None."""
    form = piece.forms.get(Precision.int8_static())
    if form is None or piece.layer.kind is not LayerKind.CONV:
        return None
    given = piece.layer.input.name or ""
    back = _round_trip(form, given)
    return None if back is None else submodel(form, [back], [given])


def saved_conversions(subject: Subject, casts: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """Return what each pair of neighbours saves: quantizing the second one's input, and of dequantizing the
    first one's output the share of this reader; the two take about the same.

    Args:
        subject: whose convolutions are meant.
        casts: by layer, milliseconds of quantizing its input and back.
    """
    layers = subject.layers
    pairs = neighbours(subject.model, layers)
    readers = {start: sum(start == other for other, _ in pairs) for start, _ in pairs}
    return {
        (layers[start].name, layers[end].name): casts[layers[end].name] * (1 + 1 / readers[start]) / 2
        for start, end in pairs
        if layers[end].name in casts
    }


def _difference(plain: ir.Model, form: ir.Model, feeds: Feeds, runs: int, target: Target) -> float:
    for model in (plain, form):
        type_inputs(model, feeds)
    before, after = bench([plain, form], feeds, runs=runs, target=target)
    return after.median_ms - before.median_ms


def _time(model: ir.Model, feeds: Feeds, runs: int, target: Target) -> float:
    type_inputs(model, feeds)
    (timing,) = bench([model], feeds, runs=runs, target=target)
    return timing.median_ms
