# SPDX-License-Identifier: Apache-2.0
"""Simulated quantization: the accuracy of 2 to 8 bits on any runtime, at the size and speed of float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.activations import activation_stats, required_calibration
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.candidates import candidate_layers
from splitfold.passes.fake_bits import (
    FakeInputs,
    LayerBits,
    SeenGrids,
    simulate_layer,
    simulate_operands,
    simulated_bits,
    weight_bits_stored,
)
from splitfold.passes.gptq import Ranges
from splitfold.passes.identity import display_layer
from splitfold.passes.known_ranges import known_ranges
from splitfold.passes.layers import Layer, LayerKind, find_layers
from splitfold.passes.opset import default_opset
from splitfold.passes.ranges import ActivationStats, Calibrator
from splitfold.passes.repq import folded_range
from splitfold.passes.values import constant

__all__ = ["SimulateQuantizationPass"]

_READS = {"Add": 2, "LayerNormalization": 1, "RMSNormalization": 1}
"""Operators of the residual stream, and how many of their first inputs are activations."""
_OPSET = 11
"""From which on Clip reads its ends from inputs; QuantizeLinear is older."""


@dataclass(frozen=True)
class SimulateQuantizationPass(LayerPass):
    """Let layers compute in float what 2 to 8 bits would leave of their weights and inputs: for research.

    Nothing becomes smaller or faster, and no kernel of few bits runs. A weight is replaced by what it is
    after the round trip through an asymmetric grid for each output channel. The layer's input passes one
    asymmetric grid for the whole tensor, on the edge into the layer, so that a residual keeps the float
    value.

    An input that ``fold-scales{method=repq}`` folded for a grid gets that grid, whatever the calibrator, and
    a clipped softmax the range [0, 1].

    Args:
        weights: bits of the weights, 2 to 8; none leaves them in float.
        activations: bits of the layers' inputs, 2 to 8; none leaves them in float, and needs no calibration
            data.
        calibrator: how the ranges of activations are chosen.
        percentile: share in percent that the percentile calibrator keeps.
        weight_ranges: a weight's grid covers the channel's whole range, or the part of it that is searched
            for the least squared error.
        products: also quantize both operands of a MatMul of two activations, such as the two of attention.
        residuals: also quantize what is added to activations and what norms read, so that the residual
            stream passes grids too, as where every activation is kept in integers. What is added to the
            scores of a softmax (a mask) stays in float.

    Before::

        y = MatMul(x, W)

    After::

        y = MatMul(Clip(DequantizeLinear(QuantizeLinear(x)), low, high), W_6bit)
    """

    name: ClassVar[str] = "simulate-quantization"
    contract: ClassVar[Contract] = Contract.LOSSY
    takes: ClassVar[str] = (
        "MatMul, Gemm and Conv with a constant weight; with products=true MatMul of activations; with "
        "residuals=true Add of activations, LayerNormalization and RMSNormalization"
    )
    weights: int | None = 8
    activations: int | None = 8
    calibrator: Calibrator = Calibrator.MINMAX
    percentile: float = 99.999
    weight_ranges: Ranges = Ranges.WHOLE
    products: bool = False
    residuals: bool = False

    def __post_init__(self) -> None:
        bits = LayerBits(self.weights, self.activations)
        if bits == LayerBits(None, None):
            raise ValueError("weights and activations are both none: nothing would be simulated.")
        for name, wanted in (("products", self.products), ("residuals", self.residuals)):
            if wanted and self.activations is None:
                raise ValueError(f"{name}=true needs a width of the activations, which is none.")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}; it is a share in percent, such as 99.99.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        products = _products(model) if self.products else []
        products += _residuals(model) if self.residuals else []
        layers = candidate_layers(
            self,
            model,
            findings,
            lambda layer: self._reason_against(layer, model),
            others=[product.name for product in products],
        )
        _skip_low_bit(model, context, findings)
        sites = [_Site(layer.node, layer.name, (layer.input,), layer) for layer in layers]
        sites += [product for product in products if self._wants(product, model, findings)]
        if not sites:
            return False
        stats = self._stats(model, sites, context)
        sites = [site for site in sites if _holds(site, stats, findings)]
        folded = {
            site.operands[0].name or "": ends
            for site in sites
            if site.layer is not None and (ends := folded_range(site.node)) is not None
        }
        folded |= known_ranges(model)
        self._replace(model, sites, SeenGrids(stats, self.calibrator, self.percentile, folded), findings)
        return bool(sites)

    def _reason_against(self, layer: Layer, model: ir.Model) -> str | None:
        if layer.weight.dtype is not ir.DataType.FLOAT:
            return f"the weight is {layer.weight.dtype}, not FLOAT"
        if layer.in_subgraph and self.activations is not None:
            return "it stands in a subgraph, whose activations cannot be calibrated"
        if constant(layer.input) is not None and self.activations is not None:
            return "its input is constant"
        return self._obstacle(layer.node, model)

    def _wants(self, product: _Site, model: ir.Model, findings: Findings) -> bool:
        dtypes = {value.dtype for value in product.operands}
        reason = self.unwanted(product.name) or self._obstacle(product.node, model)
        if reason is None and dtypes != {ir.DataType.FLOAT}:
            reason = f"its operands are {' and '.join(sorted(map(str, dtypes)))}, not FLOAT"
        if reason is not None:
            findings.skip(product.name, reason)
        return reason is None

    def _obstacle(self, node: ir.Node, model: ir.Model) -> str | None:
        if (done := simulated_bits(node)) is not None:
            return f"already simulated, as {done}: left as it is"
        if self.activations is not None and default_opset(model) < _OPSET:
            return f"opset {default_opset(model)} has no Clip with ends as inputs ({_OPSET} has)"
        return None

    def _stats(
        self, model: ir.Model, sites: Sequence[_Site], context: Context
    ) -> Mapping[str, ActivationStats]:
        if self.activations is None:
            return {}
        return activation_stats(
            model,
            [value.name or "" for site in sites for value in site.operands],
            required_calibration(context.calibration, self.name, model),
            context.target,
            histograms=self.calibrator.needs_histogram,
        )

    def _replace(self, model: ir.Model, sites: Sequence[_Site], grids: SeenGrids, findings: Findings) -> None:
        inputs, bits = FakeInputs(grids), LayerBits(self.weights, self.activations)
        order = {node: position for position, node in enumerate(model.graph)}
        layers = [site.layer for site in sites if site.layer is not None]
        if sites:
            findings.notes += [*_size_notes(layers, self.weights), *_float_notes(model)]
        for site in sorted(sites, key=lambda site: order.get(site.node, -1)):
            if site.layer is not None:
                simulate_layer(site.layer, bits, inputs, self.weight_ranges)
                findings.apply(site.name, f"{site.node.op_type} simulated as {bits}")
            elif self.activations is not None:
                simulate_operands(site.node, self.activations, inputs, len(site.operands))
                what = "MatMul of activations" if site.node.op_type == "MatMul" else site.node.op_type
                findings.apply(site.name, f"{what} simulated in {self.activations} bits")


@dataclass(frozen=True)
class _Site:
    """What is simulated: a layer, or (no layer) an operator between activations: its first inputs."""

    node: ir.Node
    name: str
    operands: tuple[ir.Value, ...]
    layer: Layer | None = None


def _products(model: ir.Model) -> list[_Site]:
    """Return the MatMuls of the main graph that multiply two computed values."""
    found = []
    for node in model.graph:
        operands = tuple(value for value in node.inputs if value is not None and constant(value) is None)
        if (node.domain, node.op_type) == ("", "MatMul") and len(operands) == 2:
            found.append(_Site(node, display_layer(node), operands))
    return found


def _residuals(model: ir.Model) -> list[_Site]:
    """Return the additions of activations and the norms of the main graph; nothing before a softmax."""
    found = []
    for node in model.graph:
        if node.domain != "" or node.op_type not in _READS or _masks(node):
            continue
        operands = tuple(value for value in node.inputs[: _READS[node.op_type]] if value is not None)
        if all(constant(value) is None for value in operands):
            found.append(_Site(node, display_layer(node), operands))
    return found


def _masks(node: ir.Node) -> bool:
    return any(use.node.op_type == "Softmax" for output in node.outputs for use in output.uses())


def _skip_low_bit(model: ir.Model, context: Context, findings: Findings) -> None:
    """Record the nodes that compute in few bits already; those with Q/DQ weights are known as such."""
    for graph in model.graphs():
        for node in graph:
            if node.op_type in context.target.low_bit_kernels:
                findings.skip(display_layer(node), "already quantized: left as it is")


def _holds(site: _Site, stats: Mapping[str, ActivationStats], findings: Findings) -> bool:
    for value in site.operands:
        reason = stats[value.name or ""].unholdable() if stats else None
        if reason is not None:
            findings.skip(site.name, f"'{value.name}': {reason}")
            return False
    return True


def _size_notes(layers: Sequence[Layer], bits: int | None) -> list[str]:
    """Return what the simulation stores, and what codes of `bits` bits would take."""
    weights = {layer.weight: layer for layer in layers}.values()
    if bits is None or not weights:
        return ["a simulation in float32: nothing is smaller, and no kernel of few bits runs"]
    count = sum(layer.weight_array().size for layer in weights)
    stored = sum(weight_bits_stored(layer, bits) for layer in weights)
    return [
        f"a simulation: {len(weights)} weights are still stored in float32 ({4 * count:,} bytes), and no "
        "kernel of few bits runs",
        f"as packed codes they would take {stored / count:.2f} bits a weight ({-(-stored // 8):,} bytes), a "
        "float32 scale and a zero point for each output channel included",
    ]


def _float_notes(model: ir.Model) -> list[str]:
    tables = {layer.weight for layer in find_layers(model)[0] if layer.kind is LayerKind.EMBEDDING}
    size = sum(value.const_value.nbytes for value in tables if value.const_value is not None)
    return [f"{len(tables)} embedding tables stay in float ({size:,} bytes)"] if tables else []
