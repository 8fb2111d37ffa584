# SPDX-License-Identifier: Apache-2.0
"""The cheapest carrier of each layer, of those that hold the precision that is wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.candidates import candidate_layers
from splitfold.passes.carrier_times import CarrierTimes, cheapest_carriers, find_times
from splitfold.passes.carry_out import Carrying, carry_out
from splitfold.passes.kernel_cases import ConcreteShapes
from splitfold.passes.layers import Layer
from splitfold.passes.planning import check_choices
from splitfold.passes.precision import ActivationRange, Precision
from splitfold.passes.ranges import Calibrator
from splitfold.passes.signals.subject import find_subject
from splitfold.passes.weight_methods import WeightMethod
from splitfold.runtime.costs.file import shipped_costs
from splitfold.runtime.feeds import Feeds

__all__ = ["ChooseCarriersPass"]

_CHOICES = (Precision.int8_dynamic(), Precision.int8_static(), Precision.blocks(8))
_FEW, _MANY = 1, 128
"""Rows of the two regimes where nothing says which one it is: decoding, and encoding or prefill."""


@dataclass(frozen=True)
class ChooseCarriersPass(LayerPass):
    """Give each layer the carrier that is cheapest for its shape, of several that hold it equally well.

    Which one that is depends on the rows of its input and on the machine: blocks win at one row on one
    processor, int8 at many. Costs are those of the target (`splitfold calibrate-target`), else those that are
    shipped. Between convolutions the conversions that neighbours in codes save count too: the whole graph's
    choice is found exactly, by a minimum cut.

    Args:
        choices: precisions to choose from, the preferred one first; fp32 is one only where it is named.
        rows: of the input of linear layers; 0 is those of the calibration data, and without data both 1 and
            128: then the carrier that is never far from the fastest is taken.
        margin: share by which a later choice must be cheaper than an earlier one.
        method: how weights are rounded to blocks.
        calibrator: how ranges of activations are chosen.

    Before::

        y = MatMul(x, W)

    After::

        q, s, z = DynamicQuantizeLinear(x)
        y = Cast(MatMulInteger(q, W_int8, z)) * (s * W_scale)
    """

    name: ClassVar[str] = "choose-carriers"
    contract: ClassVar[Contract] = Contract.LOSSY
    takes: ClassVar[str] = "MatMul, Gemm and Conv with a constant weight"
    choices: tuple[Precision, ...] = _CHOICES
    rows: int = 0
    margin: float = 0.05
    method: WeightMethod = WeightMethod.RTN
    calibrator: Calibrator = Calibrator.MINMAX

    def __post_init__(self) -> None:
        check_choices(self.choices)
        if any(item.simulated for item in self.choices):
            raise ValueError("choices holds a simulated precision, which no kernel computes.")
        if self.rows < 0 or self.margin < 0:
            raise ValueError(f"rows is {self.rows}, margin {self.margin}; neither is negative.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        layers = candidate_layers(self, model, findings, _obstacle)
        choices = self._possible(context, findings)
        if not layers or not any(not item.is_float for item in choices):
            findings.skipped += [
                (layer.name, "no choice is possible without calibration data") for layer in layers
            ]
            return False
        carrying = Carrying(self.method, self.calibrator)
        subject = find_subject(model, layers, choices, context, carrying)
        findings.skipped += subject.refused
        for layer, precision, reason in subject.lacking:
            findings.miss(layer, str(precision), reason)
        costs = context.target.costs or shipped_costs()
        times, reasons = find_times(
            subject, costs, ConcreteShapes(model, _feeds(context)), self._rows(context)
        )
        findings.skipped += list(reasons.items())
        chosen = cheapest_carriers(subject, times, self.margin)
        changed = carry_out(model, chosen, context, carrying, findings)
        _record(chosen, times, findings)
        if chosen:
            where = costs.machine.processor if context.target.costs is not None else "the shipped table"
            findings.notes.append(_note(chosen, times, where))
        return changed

    def _possible(self, context: Context, findings: Findings) -> tuple[Precision, ...]:
        """Return the choices that can be made without calibration data where there is none."""
        if context.calibration is not None:
            return self.choices
        static = [item for item in self.choices if _is_static(item)]
        if static:
            findings.notes.append(f"without calibration data {', '.join(map(str, static))} is no choice")
        return tuple(item for item in self.choices if item not in static)

    def _rows(self, context: Context) -> tuple[int, ...]:
        if self.rows:
            return (self.rows,)
        return () if context.calibration is not None else (_FEW, _MANY)


def _is_static(precision: Precision) -> bool:
    return precision.activation is not None and precision.activation.range is ActivationRange.STATIC


def _obstacle(layer: Layer) -> str | None:
    kind = layer.weight.dtype
    return None if kind is ir.DataType.FLOAT else f"the weight is {kind}, not FLOAT"


def _feeds(context: Context) -> Feeds:
    return {} if context.calibration is None else next(iter(context.calibration))


def _record(chosen: Mapping[str, Precision], times: Mapping[str, CarrierTimes], findings: Findings) -> None:
    """Record, for each layer, what the other carriers would have taken."""
    for name, precision in chosen.items():
        item = times[name]
        if precision.is_float:
            findings.skip(name, f"fp32 is the cheapest of its carriers: {_milliseconds(item, precision)}")
        for other in item.times:
            if other != precision:
                findings.miss(
                    name,
                    str(other),
                    f"{_milliseconds(item, other)}, against {_milliseconds(item, precision)} as {precision}",
                )


def _milliseconds(item: CarrierTimes, precision: Precision) -> str:
    parts = zip(item.times[precision], item.shapes, strict=True)
    return " and ".join(f"{time:.4f} ms at {'x'.join(map(str, shape))}" for time, shape in parts)


def _note(chosen: Mapping[str, Precision], times: Mapping[str, CarrierTimes], where: str) -> str:
    """Return what was chosen, and what all layers would take in one carrier, in the last regime; what
    neighbours save is not taken off."""
    counts = ", ".join(f"{count} {word}" for word, count in Counter(map(str, chosen.values())).items())
    total = sum(times[name].times[precision][-1] for name, precision in chosen.items())
    words = [
        f"{sum(times[name].times[other][-1] for name in chosen):.3g} all in {other}"
        for other in dict.fromkeys(item for name in chosen for item in times[name].times)
        if all(other in times[name].times for name in chosen)
    ]
    beside = f" ({', '.join(words)})" if words else ""
    return f"{counts}: {total:.3g} ms{beside}, by kernel costs of {where}"
