# SPDX-License-Identifier: Apache-2.0
"""What a layer takes in each of its precisions, from the kernel costs of the target: no layer is run."""

from __future__ import annotations

from splitfold.passes.activations import required_calibration
from splitfold.passes.kernel_cases import ConcreteShapes, layer_shape
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.piece_times import PieceTimes, saved_conversions
from splitfold.passes.precision import ActivationRange, Precision
from splitfold.passes.signals.subject import Subject
from splitfold.runtime.bench import bench
from splitfold.runtime.costs.kernel import Form, Kernel, Operation, Shape
from splitfold.runtime.costs.table import KernelCosts

__all__ = ["carrier_kernel", "conversion_times", "estimate_times"]

_NEAR = 4.0
"""Largest ratio of a size to that of the nearest measured shape at which an estimate is used."""
_RUNS = 10
"""Timed runs of the whole float model."""


def estimate_times(subject: Subject, costs: KernelCosts) -> PieceTimes | None:
    """Return the times of all layers of `subject` in all of their choices; None where `costs` lacks a kernel
    of one, or knows it at far other shapes only, or a shape is not known.

    Only the float model as a whole is timed, shortly.

    Raises:
        CalibrationError: there is no calibration data: its first batch gives the shapes.
    """
    data = required_calibration(subject.context.calibration, "a budget in milliseconds", subject.model)
    first, target = next(iter(data)), subject.context.target
    shapes = ConcreteShapes(subject.model, first)
    more: dict[str, dict[Precision, float]] = {}
    casts: dict[str, float] = {}
    for piece in subject.pieces:
        layer, shape = piece.layer, layer_shape(piece.layer, shapes)
        given, made = shapes.size(layer.input), shapes.size(layer.output)
        if shape is None or given is None or made is None:
            return None
        own = {Precision.float(): 0.0}
        plain = _time(costs, carrier_kernel(layer, Precision.float()), shape)
        for precision in piece.forms:
            time = _time(costs, carrier_kernel(layer, precision), shape)
            if time is None or plain is None:
                return None
            own[precision] = time - plain
        if layer.kind is LayerKind.CONV and Precision.int8_static() in own:
            there, back = conversion_times(costs, given), conversion_times(costs, made)
            if there is None or back is None:
                return None
            own[Precision.int8_static()] += there[0] + back[1]
            casts[layer.name] = sum(there)
        more[layer.name] = own
    (whole,) = bench([subject.model], first, runs=_RUNS, target=target)
    return PieceTimes(whole.median_ms, more, saved_conversions(subject, casts))


def carrier_kernel(layer: Layer, precision: Precision) -> Kernel | None:
    """Return the kernel that computes `layer` in `precision`; None where no kernel is measured for it."""
    operation = Operation.MATMUL if layer.is_linear else Operation.CONV
    weight, activation = precision.weight, precision.activation
    if precision.simulated:
        return None
    if weight is None:
        return Kernel(operation)
    if weight.block is not None:
        bits = 4 if weight.bits == 3 else weight.bits
        return Kernel.blocks(bits, weight.block, zero_points=not weight.symmetric)
    static = activation is not None and activation.range is ActivationRange.STATIC
    return Kernel(operation, Form.STATIC_INT8 if static else Form.DYNAMIC_INT8)


def _time(costs: KernelCosts, kernel: Kernel | None, shape: Shape) -> float | None:
    found = None if kernel is None else costs.estimate(kernel, shape)
    return None if found is None or found.factor > _NEAR else found.milliseconds


def conversion_times(costs: KernelCosts, elements: int) -> tuple[float, float] | None:
    """Return milliseconds of quantizing and of dequantizing so many elements; these grow evenly, so that far
    shapes tell as well. None where they were not measured."""
    found = [costs.estimate(Kernel(kind), (elements,)) for kind in (Operation.QUANTIZE, Operation.DEQUANTIZE)]
    there, back = found
    return None if there is None or back is None else (there.milliseconds, back.milliseconds)
