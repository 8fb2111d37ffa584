# SPDX-License-Identifier: Apache-2.0
"""Dynamic int8: int8 weights per column, activations quantized at run time, in the form that fuses to the
fast kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.activation_codes import DynamicCodes
from splitfold.passes.activations import required_calibration
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.candidates import accurate_layers, candidate_layers
from splitfold.passes.carriers import Carried, carry_dynamic, int8_weight
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.opset import default_opset
from splitfold.passes.trial import local_sqnr
from splitfold.passes.values import drop_unused, replace_value
from splitfold.runtime.target import Carrier

__all__ = ["QuantizeDynamicPass"]


@dataclass(frozen=True)
class QuantizeDynamicPass(LayerPass):
    """Quantize MatMul and Gemm with int8 weights per column; each call chooses the activations' range itself.

    Needs no calibration. Layers that read one value share its quantization. Convolutions are left alone: the
    runtime's ConvInteger is several times slower than its float kernel. Looks into subgraphs.

    Args:
        weight_bits: 8, or 7 for CPUs whose u8 x s8 sums saturate.
        min_sqnr: a layer whose own output, measured on calibration data, would fall below this SQNR in dB is
            skipped; 0 skips none and needs no data.

    Before::

        y = MatMul(x, W)

    After::

        q, s, z = DynamicQuantizeLinear(x)
        y = Cast(MatMulInteger(q, W_int8, z)) * (s * W_scale)
    """

    name: ClassVar[str] = "quantize-dynamic"
    contract: ClassVar[Contract] = Contract.LOSSY
    takes: ClassVar[str] = "MatMul and Gemm with a constant weight"
    weight_bits: int = 8
    min_sqnr: float = 0.0

    def __post_init__(self) -> None:
        if self.weight_bits not in (7, 8):
            raise ValueError(f"weight-bits is {self.weight_bits}; it may be 8 or 7.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        layers = candidate_layers(
            self, model, findings, lambda layer: _structural_reason(layer, model, context)
        )
        levels = min(context.target.weight_levels, 127 if self.weight_bits == 8 else 63)
        if layers and self.min_sqnr > 0:
            calibration = required_calibration(context.calibration, f"{self.name}{{min-sqnr}}", model)
            measured = local_sqnr(model, _trial_carrier(layers, levels), calibration, context.target)
            layers = accurate_layers(layers, measured, self.min_sqnr, "dynamic int8", findings)
        codes = DynamicCodes()
        for layer in (layer.current() for layer in layers):
            carried = carry_dynamic(layer, codes.of(layer), int8_weight(layer, levels=levels))
            replace_value(layer.output, carried.output)
            drop_unused([layer.node])
            findings.apply(layer.name, f"{layer.kind.value} dynamic int8", weight=carried.weight)
        return bool(layers)


def _structural_reason(layer: Layer, model: ir.Model, context: Context) -> str | None:
    if not context.target.carries(Carrier.DYNAMIC_INT8):
        return f"target {context.target.name} has no dynamic int8 kernels"
    if layer.kind is LayerKind.CONV:
        return "a dynamic int8 Conv (ConvInteger) is slower than the float kernel"
    if default_opset(model) < 11:
        return f"opset {default_opset(model)} has no DynamicQuantizeLinear (11 has)"
    if layer.weight.dtype is not ir.DataType.FLOAT:
        return f"the weight is {layer.weight.dtype}, not FLOAT"
    return None


def _trial_carrier(layers: list[Layer], levels: int) -> Callable[[Layer], Carried | None]:
    names = {layer.name for layer in layers}
    codes = DynamicCodes()

    def carry(layer: Layer) -> Carried | None:
        if layer.name not in names:
            return None
        return carry_dynamic(layer, codes.of(layer), int8_weight(layer, levels=levels))

    return carry
