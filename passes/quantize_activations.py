# SPDX-License-Identifier: Apache-2.0
"""Static int8: QuantizeLinear/DequantizeLinear placed so that the runtime computes MatMul, Gemm and Conv in
integers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.activations import activation_stats, required_calibration
from splitfold.passes.affine import ActivationGrid, activation_grid
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.bias_correction import BiasCorrection, correct_biases
from splitfold.passes.candidates import accurate_layers, candidate_layers
from splitfold.passes.known_ranges import known_ranges
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.opset import default_opset
from splitfold.passes.ranges import ActivationStats, Calibrator, activation_range
from splitfold.passes.regions import moved_into_subgraph, output_point, region_values
from splitfold.passes.repq import folded_range
from splitfold.passes.static_int8 import StaticForm, quantize_statically, trial_carrier
from splitfold.passes.trial import local_sqnr
from splitfold.passes.values import constant
from splitfold.runtime.target import Carrier, Target

__all__ = ["QuantizeActivationsPass"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeActivationsPass(LayerPass):
    """Quantize layers statically: uint8 activations per tensor, int8 weights per channel, as Q/DQ that the
    runtime fuses.

    The input of a MatMul or Gemm is quantized on the edge into the layer only, so that a residual keeps the
    float value. Around a Conv whole
    regions are quantized: its output (after Relu or Clip), residual Add, pooling, Concat and moving
        operators up to the next integer layer.
    Values that no 8-bit grid can hold are recognised from what calibration saw, and kept out. An input that
    ``fold-scales{method=repq}`` folded for a grid gets that grid, whatever the calibrator, and a clipped
    softmax the range [0, 1].

    Args:
        calibrator: how ranges are chosen.
        percentile: share in percent that the percentile calibrator keeps.
        symmetric: fix the zero point of activations at the middle.
        weight_bits: 8, or 7 for CPUs whose u8 x s8 sums saturate.
        min_sqnr: a layer whose own output, measured on calibration data, would fall below this SQNR in dB is
            skipped; 0 skips none.
        form: how a linear layer is written: qdq is standard ONNX; integer names the kernel and takes the bias
            along, which saves an Add. A Conv, and all on a target without that kernel, is written as qdq.
        correct_bias: the layers into whose biases goes what rounding moves in the mean of their outputs.

    Before::

        y = MatMul(x, W)

    After::

        y = MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(W_int8))
    """

    name: ClassVar[str] = "quantize-activations"
    contract: ClassVar[Contract] = Contract.LOSSY
    takes: ClassVar[str] = "MatMul, Gemm and Conv with a constant weight"
    calibrator: Calibrator = Calibrator.MINMAX
    percentile: float = 99.999
    symmetric: bool = False
    weight_bits: int = 8
    min_sqnr: float = 0.0
    form: StaticForm = StaticForm.QDQ
    correct_bias: BiasCorrection = BiasCorrection.NONE

    def __post_init__(self) -> None:
        if self.weight_bits not in (7, 8):
            raise ValueError(f"weight-bits is {self.weight_bits}; it may be 8 or 7.")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}; it is a share in percent, such as 99.99.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        layers = candidate_layers(
            self, model, findings, lambda layer: _structural_reason(layer, model, context)
        )
        if not layers:
            return False
        calibration = required_calibration(context.calibration, self.name, model)
        stats = activation_stats(
            model,
            _interesting(model, layers),
            calibration,
            context.target,
            histograms=self.calibrator.needs_histogram,
        )
        layers = [layer for layer in layers if self._holds(layer, stats, findings)]
        grids = {name: self._grid(item) for name, item in stats.items() if item.unholdable() is None}
        grids |= {
            layer.input.name or "": activation_grid(*ends, symmetric=self.symmetric)
            for layer in layers
            if (ends := folded_range(layer.node)) is not None
        }
        grids |= {
            name: activation_grid(*ends, symmetric=self.symmetric)
            for name, ends in known_ranges(model).items()
            if name in grids
        }
        levels = min(context.target.weight_levels, 127 if self.weight_bits == 8 else 63)
        if self.min_sqnr > 0:
            measured = local_sqnr(model, trial_carrier(layers, grids, levels), calibration, context.target)
            layers = accurate_layers(layers, measured, self.min_sqnr, "static int8", findings)
        corrected = self.correct_bias if layers else BiasCorrection.NONE
        reference = None if corrected is BiasCorrection.NONE else model.clone()
        form = self._form(context.target, findings)
        made = quantize_statically(model, layers, grids, levels, form, findings)
        if reference is not None:
            chosen = {name: value for name, value in made.items() if corrected.takes(value)}
            correct_biases(model, reference, chosen, calibration, context.target, findings)
        return bool(layers)

    def _form(self, target: Target, findings: Findings) -> StaticForm:
        if self.form is StaticForm.INTEGER and not target.carries(Carrier.INTEGER_MATMUL):
            findings.notes.append(
                f"written as qdq: target {target.name} does not carry {Carrier.INTEGER_MATMUL.value}"
            )
            return StaticForm.QDQ
        return self.form

    def _holds(self, layer: Layer, stats: Mapping[str, ActivationStats], findings: Findings) -> bool:
        needed = [layer.input] + ([output_point(layer)] if layer.kind is LayerKind.CONV else [])
        for value in needed:
            reason = stats[value.name or ""].unholdable()
            if reason is not None:
                findings.skip(layer.name, f"'{value.name}': {reason}")
                return False
        return True

    def _grid(self, stats: ActivationStats) -> ActivationGrid:
        return activation_grid(
            *activation_range(stats, self.calibrator, percentile=self.percentile), symmetric=self.symmetric
        )


def _structural_reason(layer: Layer, model: ir.Model, context: Context) -> str | None:
    if not context.target.carries(Carrier.STATIC_QDQ):
        return f"target {context.target.name} has no static int8 kernels"
    if default_opset(model) < 13:
        return f"opset {default_opset(model)} has no DequantizeLinear per channel (13 has)"
    if layer.in_subgraph:
        return "it stands in a subgraph, whose activations cannot be calibrated"
    if layer.weight.dtype is not ir.DataType.FLOAT:
        return f"the weight is {layer.weight.dtype}, not FLOAT"
    if layer.kind is LayerKind.CONV and moved_into_subgraph(output_point(layer)):
        return "a subgraph reads its output through a Reshape or the like, which crashes the runtime in int8"
    return _bias_reason(layer)


def _bias_reason(layer: Layer) -> str | None:
    if layer.bias is None:
        return None
    tensor = constant(layer.bias)
    if tensor is None:
        return "its bias is computed, not constant"
    channels = layer.weight_array().shape[layer.channel_axis]
    return (
        None
        if tensor.size in (1, channels)
        else f"its bias has shape {list(tensor.shape)}, not one value a channel"
    )


def _interesting(model: ir.Model, layers: list[Layer]) -> list[str]:
    """Return the names of the values whose range may be asked for: inputs of layers, and all that a region
    could hold."""
    convolutions = [layer for layer in layers if layer.kind is LayerKind.CONV]
    region = region_values(model.graph, convolutions, [layer.node for layer in layers], lambda _: True)
    names = [layer.input.name or "" for layer in layers]
    return list(dict.fromkeys([*names, *(value.name or "" for value in region)]))
