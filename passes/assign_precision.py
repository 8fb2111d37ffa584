# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: each layer gets the precision that a budget buys it, or that a plan names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.allocation import Allocation
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.candidates import candidate_layers
from splitfold.passes.carry_out import Carrying, carry_out
from splitfold.passes.expected_loss import ErrorModel
from splitfold.passes.fake_bits import simulated_bits
from splitfold.passes.identity import display_layer, layers_of
from splitfold.passes.layers import Layer
from splitfold.passes.limits import Limit, Unit
from splitfold.passes.plan import PrecisionPlan, read_plan
from splitfold.passes.planning import Request, allocate, check_choices
from splitfold.passes.precision import Precision
from splitfold.passes.ranges import Calibrator
from splitfold.passes.signals.table import SignalKind, make_signal
from splitfold.passes.weight_methods import WeightMethod

__all__ = ["AssignPrecisionPass"]

_KEPT = "splitfold.precision"
"""Metadata key of a layer that a plan left in float while it changed others."""
_CHOICES = (Precision.blocks(2), Precision.blocks(4), Precision.blocks(8))


@dataclass(frozen=True)
class AssignPrecisionPass(LayerPass):
    """Give each layer one of several precisions: those of least expected loss that keep a budget.

    A signal says what low precision costs in each layer. The best plan is found exactly: by dynamic
    programming under one limit, as a mixed-integer program under several. It is carried out by the passes
    that make each precision: quantize-activations (int8-static), quantize-dynamic, quantize-weights (blocks),
    simulate-quantization. Layers that share a weight get one precision.

    Args:
        signal: what tells the layers apart.
        choices: precisions to choose from; fp32 is one of them only where it is named.
        budget: limits that all hold: 4.5bits (as stored), 4code-bits, 12MB (the whole model), 3ms (measured).
        error: how large a layer's error is, for signals that only rank: measured on calibration data, or by
            the number of bits.
        method: how weights are rounded to blocks.
        calibrator: how ranges of activations are chosen.
        turned: put the signal upside down, as a control.
        seed: of the random signal.
        plan: file of a plan to carry out instead; signal, choices and budget then do not count.

    Before::

        h = MatMul(x, W1)
        y = MatMul(h, W2)

    After::

        h = com.microsoft::MatMulNBits<bits=8>(x, W1_int8, W1_scales, W1_zero_points)
        y = com.microsoft::MatMulNBits<bits=2>(h, W2_int2, W2_scales, W2_zero_points)
    """

    name: ClassVar[str] = "assign-precision"
    contract: ClassVar[Contract] = Contract.LOSSY
    takes: ClassVar[str] = "MatMul, Gemm and Conv with a constant weight"
    signal: SignalKind = SignalKind.SENSITIVITY
    choices: tuple[Precision, ...] = _CHOICES
    budget: tuple[Limit, ...] = (Limit(4, Unit.CODE_BITS),)
    error: ErrorModel = ErrorModel.MEASURED
    method: WeightMethod = WeightMethod.RTN
    calibrator: Calibrator = Calibrator.MINMAX
    turned: bool = False
    seed: int = 0
    plan: str = ""

    def __post_init__(self) -> None:
        check_choices(self.choices)
        if not self.budget:
            raise ValueError("budget is empty: give a limit such as 4.5bits, 12MB or 3ms.")
        if not all(isinstance(limit, Limit) for limit in self.budget):
            raise ValueError("a budget is made of limits.")
        if len({limit.unit for limit in self.budget}) < len(self.budget):
            raise ValueError("budget holds two limits of one unit.")

    @property
    def request(self) -> Request:
        """What the options ask of a plan."""
        signal = make_signal(self.signal, seed=self.seed, turned=self.turned)
        return Request(self.choices, signal, self.error, Carrying(self.method, self.calibrator))

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        layers = self.candidates(model, findings)
        carrying = self.request.carrying
        if self.plan:
            plan = read_plan(self.plan)
            plan.check_layers(_names(model))
        else:
            allocation = self.allocation(model, layers, context)
            _record(allocation, findings)
            plan = allocation.within(self.budget)
        names = {layer.name for layer in layers}
        wanted = {name: item for name, item in plan.precisions.items() if name in names}
        changed = carry_out(model, wanted, context, carrying, findings)
        _keep_float(layers, wanted, changed, findings)
        if wanted:
            findings.plan = plan
            findings.notes.append(_note(plan, made=not self.plan))
        for row in plan.layers:
            if row.name in wanted and row.why and not self.plan:
                findings.miss(row.name, "another precision", row.why)
        return changed

    def candidates(self, model: ir.Model, findings: Findings) -> list[Layer]:
        """Return the layers that a plan may name, and record why it may not name the others.

        Raises:
            SpecError: a pattern of the user matches no layer.
        """
        return candidate_layers(self, model, findings, _obstacle)

    def allocation(
        self,
        model: ir.Model,
        layers: Sequence[Layer],
        context: Context,
        budget: Sequence[Limit] | None = None,
    ) -> Allocation:
        """Return what a budget (default: that of the pass) or any other can be spent on; times are measured
        where one of its limits is in milliseconds."""
        return allocate(model, layers, self.request, context, self.budget if budget is None else budget)


def _obstacle(layer: Layer) -> str | None:
    if (bits := simulated_bits(layer.node)) is not None:
        return f"already simulated, as {bits}: left as it is"
    if _KEPT in layer.node.metadata_props:
        return "a plan left it in float"
    return (
        None if layer.weight.dtype is ir.DataType.FLOAT else f"the weight is {layer.weight.dtype}, not FLOAT"
    )


def _names(model: ir.Model) -> list[str]:
    nodes = [node for graph in model.graphs() for node in graph]
    return list(
        dict.fromkeys([*(name for node in nodes for name in layers_of(node)), *map(display_layer, nodes)])
    )


def _record(allocation: Allocation, findings: Findings) -> None:
    findings.skipped += allocation.subject.refused
    for layer, precision, reason in allocation.subject.lacking:
        findings.miss(layer, str(precision), reason)


def _keep_float(
    layers: Sequence[Layer], wanted: Mapping[str, Precision], changed: bool, findings: Findings
) -> None:
    """Record the layers that the plan leaves in float, and mark them, so that a second run does too."""
    for layer in layers:
        if layer.name in wanted and wanted[layer.name].is_float:
            findings.skip(layer.name, "the plan leaves it in fp32")
            if changed:
                layer.node.metadata_props[_KEPT] = str(wanted[layer.name])


def _note(plan: PrecisionPlan, *, made: bool) -> str:
    """Return what the plan is; sizes only of a plan just made: those in a file may be of another model."""
    counts = ", ".join(f"{count} {word}" for word, count in plan.counts().items())
    if plan.edited:
        return f"plan edited by hand: {counts}"
    kept = f" within {', '.join(plan.budget)}" if plan.budget else ""
    sizes = f": {plan.bytes:,} bytes, {plan.weight_bits:.2f} bits a weight as stored" if made else ""
    by = f" by {plan.signal}" if plan.signal else ""
    return f"plan{by}{kept}: {counts}{sizes}"
