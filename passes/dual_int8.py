# SPDX-License-Identifier: Apache-2.0
"""Dual-grained weights as one int8 product: the weights expanded to int8, the activations in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from splitfold.passes.activation_codes import DynamicCodes, TokenCodes
from splitfold.passes.affine import ActivationGrid
from splitfold.passes.carriers import (
    Carried,
    Int8Weight,
    QuantizedInput,
    carry_dynamic,
    fake_quantize,
    weight_graph,
    with_bias,
)
from splitfold.passes.dgq import DualGrained
from splitfold.passes.integer_linear import carry_integer, following_bias
from splitfold.passes.layers import Layer
from splitfold.passes.values import add_initializer, drop_unused, emit
from splitfold.passes.weight_forms import BlockForm, Expand
from splitfold.runtime.feeds import Array

__all__ = ["DualInt8"]


@dataclass
class DualInt8:
    """Emits the int8 form of layers, in order; layers share the codes of an input and the expanded weight.

    Args:
        form: one of the int8 forms.
        expand: when weights become int8; those of subgraphs always do at compilation.
        grids: the static grid of each layer's input, by the layer's node.
        opset: default opset of the model.
    """

    form: BlockForm
    expand: Expand
    grids: Mapping[ir.Node, ActivationGrid]
    opset: int
    dynamic: DynamicCodes = field(default_factory=DynamicCodes)
    static: dict[ir.Value, QuantizedInput] = field(default_factory=dict)
    weights: dict[tuple[ir.Value, ir.Graph | None], Int8Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.token = TokenCodes(self.opset)

    def carry(self, layer: Layer, dual: DualGrained) -> tuple[Carried, list[ir.Node]]:
        """Emit the form of `layer`; return it and the nodes whose place it takes, the last computed first."""
        weight = self._weight(layer, dual)
        if self.form is BlockForm.INT8_DYNAMIC:
            return carry_dynamic(layer, self.dynamic.of(layer), weight), [layer.node]
        if self.form is BlockForm.INT8_TOKEN:
            return self._by_token(layer, weight), [layer.node]
        add = following_bias(layer)
        data = self._statically(layer)
        replaced = [layer.node] if add is None else [add, layer.node]
        return carry_integer(layer, data, weight, add=add), replaced

    def finish(self) -> None:
        """Remove what was emitted on the way and is read by nobody."""
        drop_unused([node for data in self.static.values() if (node := data.value.producer()) is not None])

    def _statically(self, layer: Layer) -> QuantizedInput:
        if layer.input not in self.static:
            self.static[layer.input] = fake_quantize(layer.input, self.grids[layer.node], layer.node)
        return self.static[layer.input]

    def _by_token(self, layer: Layer, weight: Int8Weight) -> Carried:
        """Emit y = MatMulIntegerToFloat(q, W, 1, sw, 128) * s with one scale s a token."""
        data = self.token.of(layer)
        inputs = [data.codes, weight.value, data.one, weight.scales, data.zero_point, weight.zero_points]
        names = [f"{layer.output.name}_int8"]
        product = emit(
            layer.node, "MatMulIntegerToFloat", inputs, domain="com.microsoft", names=names, like=layer.output
        )
        scaled = [f"{layer.output.name}_scaled"]
        result = emit(layer.node, "Mul", [product, data.scales], names=scaled, like=layer.output)
        return Carried(with_bias(layer, result), weight.name)

    def _weight(self, layer: Layer, dual: DualGrained) -> Int8Weight:
        key = (layer.weight, layer.node.graph)
        if key not in self.weights:
            inside = layer.node.graph is not weight_graph(layer)
            now = self.expand is Expand.OFFLINE or inside
            self.weights[key] = self._held(layer, dual) if now else self._unfolded(layer, dual)
        return self.weights[key]

    def _held(self, layer: Layer, dual: DualGrained) -> Int8Weight:
        graph, name = weight_graph(layer), layer.weight.name
        codes = add_initializer(graph, f"{name}_int8", np.ascontiguousarray(dual.integers().T))
        return _int8_weight(layer, dual, codes, codes)

    def _unfolded(self, layer: Layer, dual: DualGrained) -> Int8Weight:
        """Emit W_int8 = (q - z) * S1 from 4-bit codes, which the runtime computes once, when it opens the
        model."""
        graph, name, at = weight_graph(layer), layer.weight.name, layer.node
        codes = add_initializer(graph, f"{name}_int4", _uint4(dual.codes.transpose(1, 2, 0)))
        zeros = add_initializer(graph, f"{name}_block_zero_points", _uint4(dual.zero_points.T[:, None]))
        steps = add_initializer(graph, f"{name}_steps", np.ascontiguousarray(dual.steps.T[:, None]))
        n, blocks, block = dual.codes.shape
        kind, to = ir.DataType.INT8, {"to": ir.DataType.INT8.value}
        whole = emit(at, "Cast", [codes], attributes=to, names=[f"{name}_codes"], like=codes, dtype=kind)
        middle = emit(at, "Cast", [zeros], attributes=to, names=[f"{name}_zeros"], like=zeros, dtype=kind)
        centred = emit(at, "Sub", [whole, middle], names=[f"{name}_centred"], like=whole)
        stepped = emit(at, "Mul", [centred, steps], names=[f"{name}_stepped"], like=whole)
        shape = add_initializer(graph, f"{name}_rows_columns", np.array([blocks * block, n], np.int64))
        value = emit(at, "Reshape", [stepped, shape], names=[f"{name}_int8"], dtype=kind)
        value.shape = ir.Shape([blocks * block, n])
        if dual.columns < blocks * block:
            ends = [[0], [dual.columns], [0]]
            bounds = [
                add_initializer(graph, f"{name}_{what}", np.array(numbers, np.int64))
                for what, numbers in zip(("start", "end", "axis"), ends, strict=True)
            ]
            value = emit(at, "Slice", [value, *bounds], names=[f"{name}_int8_cut"], dtype=kind)
            value.shape = ir.Shape([dual.columns, n])
        return _int8_weight(layer, dual, value, codes)


def _int8_weight(layer: Layer, dual: DualGrained, value: ir.Value, codes: ir.Value) -> Int8Weight:
    graph, name = weight_graph(layer), layer.weight.name
    scales = add_initializer(graph, f"{name}_scale", dual.scales)
    zeros = add_initializer(graph, f"{name}_zero_point", np.zeros(dual.scales.shape, np.int8))
    return Int8Weight(value, scales, zeros, codes.name or "")


def _uint4(codes: Array) -> ir.TensorProtocol:
    kind = ir.DataType.UINT4
    return ir.tensor(np.ascontiguousarray(codes).astype(kind.numpy()), dtype=kind)
