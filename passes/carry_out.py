# SPDX-License-Identifier: Apache-2.0
"""Precisions are carried out by the passes that make them: one implementation of each carrier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.base import Context, Findings, LayerPass
from splitfold.passes.precision import ActivationRange, Precision
from splitfold.passes.quantize_activations import QuantizeActivationsPass
from splitfold.passes.quantize_dynamic import QuantizeDynamicPass
from splitfold.passes.quantize_weights import QuantizeWeightsPass
from splitfold.passes.ranges import Calibrator
from splitfold.passes.simulate_quantization import SimulateQuantizationPass
from splitfold.passes.static_int8 import StaticForm
from splitfold.passes.weight_methods import WeightMethod
from splitfold.runtime.target import Carrier, Target

__all__ = ["Carrying", "Variant", "carry_out", "make_variant"]


@dataclass(frozen=True)
class Carrying:
    """How the passes that make a precision do it, where they have a choice.

    Attributes:
        method: how weights are rounded to blocks.
        calibrator: how ranges of activations are chosen.
    """

    method: WeightMethod = WeightMethod.RTN
    calibrator: Calibrator = Calibrator.MINMAX


@dataclass(frozen=True)
class Variant:
    """A copy of the model in which all layers that can have a precision have it.

    Attributes:
        model: the copy.
        applied: names of those layers.
        reasons: by layer, why it cannot.
    """

    model: ir.Model
    applied: frozenset[str]
    reasons: Mapping[str, str]


def make_variant(
    model: ir.Model, precision: Precision, names: Sequence[str], context: Context, carrying: Carrying
) -> Variant:
    """Return a copy of `model` with the layers of these names in `precision`, as far as they can have it.

    Raises:
        CalibrationError: a static precision without calibration data, or with data that does not fit.
    """
    copy = model.clone()
    findings = _step(precision, names, context.target, carrying).run(copy, context).findings
    applied = frozenset(layer for layer, _ in findings.applied)
    return Variant(
        copy, applied, {layer: reason for layer, reason in findings.skipped if layer in set(names)}
    )


def carry_out(
    model: ir.Model,
    precisions: Mapping[str, Precision],
    context: Context,
    carrying: Carrying,
    findings: Findings,
) -> bool:
    """Give each layer of `model` its precision, in place; return whether anything changed.

    The layers of one precision go together. Static int8 comes first, as its ranges should be those of the
    float model; after it dynamic int8, blocks and simulated widths, each calibrated, where it is, on the
    model as it then stands.
    """
    groups: dict[Precision, list[str]] = {}
    for layer, precision in precisions.items():
        if not precision.is_float:
            groups.setdefault(precision, []).append(layer)
    changed = False
    for precision in sorted(groups, key=_turn):
        outcome = _step(precision, groups[precision], context.target, carrying).run(model, context)
        _take_over(outcome.findings, precision, set(groups[precision]), findings)
        changed |= outcome.modified
    return changed


def _turn(precision: Precision) -> tuple[int, str]:
    order = {Carrier.STATIC_QDQ: 0, Carrier.DYNAMIC_INT8: 1}
    return order.get(precision.carrier, 2) if precision.carrier is not None else 3, str(precision)


def _take_over(found: Findings, precision: Precision, layers: set[str], findings: Findings) -> None:
    findings.applied += found.applied
    findings.skipped += [(layer, reason) for layer, reason in found.skipped if layer in layers]
    findings.missed += found.missed
    findings.notes += [f"{precision}: {note}" for note in found.notes]
    for layer, weights in found.carried.items():
        findings.carried.setdefault(layer, []).extend(weights)


def _step(precision: Precision, names: Sequence[str], target: Target, carrying: Carrying) -> LayerPass:
    """Return the pass that gives the layers of these names `precision`."""
    only, weight, activation = tuple(names), precision.weight, precision.activation
    if precision.simulated:
        return SimulateQuantizationPass(
            weights=None if weight is None else weight.bits,
            activations=None if activation is None else activation.bits,
            calibrator=carrying.calibrator,
            only=only,
        )
    if weight is None:
        raise ValueError("float layers are left as they are.")
    if weight.block is not None:
        return QuantizeWeightsPass(
            method=carrying.method,
            bits=weight.bits,
            block=weight.block,
            symmetric=weight.symmetric,
            only=only,
        )
    if activation is not None and activation.range is ActivationRange.STATIC:
        form = StaticForm.INTEGER if target.carries(Carrier.INTEGER_MATMUL) else StaticForm.QDQ
        return QuantizeActivationsPass(calibrator=carrying.calibrator, form=form, only=only)
    return QuantizeDynamicPass(only=only)
