# SPDX-License-Identifier: Apache-2.0
"""Activations quantized at run time: one range a call and tensor, or one a token. Layers that read one value
share its codes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from splitfold.passes.layers import Layer
from splitfold.passes.values import add_initializer, emit

__all__ = ["DynamicCodes", "TokenCodes", "TokenQuantized"]

Key = tuple[ir.Value, ir.Graph | None]
Quantized = tuple[ir.Value, ir.Value, ir.Value]

_ZERO = 128
"""Zero point of uint8 codes that are int8 shifted: x86 has no fast kernel for signed activations."""
_FLOOR = 1e-30
"""Least largest magnitude of a token: a token of zeros divides by it."""
_AXES_INPUT = 18
"""Opset from which on ReduceMax reads its axes from an input."""


@dataclass
class DynamicCodes:
    """DynamicQuantizeLinear of layers' inputs: uint8, one asymmetric range a call."""

    shared: dict[Key, Quantized] = field(default_factory=dict)

    def of(self, layer: Layer) -> Quantized:
        """Return codes, scale and zero point, emitted before the first layer of its graph that asks."""
        return self.before(layer.node, layer.input)

    def before(self, node: ir.Node, value: ir.Value) -> Quantized:
        """Return those of `value`, which `node` reads."""
        key = (value, node.graph)
        if key not in self.shared:
            self.shared[key] = _dynamic(node, value)
        return self.shared[key]


def _dynamic(node: ir.Node, value: ir.Value) -> Quantized:
    base = value.name
    codes = emit(
        node,
        "DynamicQuantizeLinear",
        [value],
        names=[f"{base}_codes", f"{base}_dynamic_scale", f"{base}_dynamic_zero"],
        like=value,
        dtype=ir.DataType.UINT8,
    )
    producer = codes.producer()
    if producer is None:
        raise ValueError("emit made no node")
    first, second, third = producer.outputs
    second.type, third.type = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.UINT8)
    second.shape = third.shape = ir.Shape(())
    return first, second, third


@dataclass(frozen=True)
class TokenQuantized:
    """A value quantized symmetrically, one scale for each vector of the last axis.

    Attributes:
        codes: uint8 with zero point 128, between 1 and 255.
        scales: float, the last axis 1: what a code is worth.
        one, zero_point: initializers 1.0 and 128, for a kernel that wants scalars.
    """

    codes: ir.Value
    scales: ir.Value
    one: ir.Value
    zero_point: ir.Value


@dataclass
class TokenCodes:
    """Symmetric codes of layers' inputs, one range a token: q = round(x / s), s = max|x| / 127.

    Args:
        opset: default opset of the model.
    """

    opset: int
    shared: dict[Key, TokenQuantized] = field(default_factory=dict)

    def of(self, layer: Layer) -> TokenQuantized:
        """Return the codes, emitted before the first layer of its graph that asks."""
        key = (layer.input, layer.node.graph)
        if key not in self.shared:
            self.shared[key] = self._emit(layer)
        return self.shared[key]

    def _emit(self, layer: Layer) -> TokenQuantized:
        at, x = layer.node, layer.input
        graph = at.graph
        if graph is None:
            raise ValueError(f"{layer.name} is in no graph")
        floor = add_initializer(graph, "token_floor", np.array(_FLOOR, np.float32))
        part = add_initializer(graph, "token_part", np.array(1 / 127, np.float32))
        one = add_initializer(graph, "token_unit", np.array(1, np.float32))
        zero = add_initializer(graph, "token_zero_point", np.array(_ZERO, np.uint8))
        peaks = self._peaks(layer, graph)
        floored = emit(at, "Max", [peaks, floor], names=[f"{x.name}_token_peak"], like=peaks)
        scales = emit(at, "Mul", [floored, part], names=[f"{x.name}_token_scale"], like=peaks)
        scaled = emit(at, "Div", [x, scales], names=[f"{x.name}_token_scaled"], like=x)
        # with scale 1 it rounds half to even, adds the zero point and saturates in one kernel
        codes = emit(
            at,
            "QuantizeLinear",
            [scaled, one, zero],
            names=[f"{x.name}_token_codes"],
            like=x,
            dtype=ir.DataType.UINT8,
        )
        return TokenQuantized(codes, scales, one, zero)

    def _peaks(self, layer: Layer, graph: ir.Graph) -> ir.Value:
        at, x = layer.node, layer.input
        sizes = emit(at, "Abs", [x], names=[f"{x.name}_magnitude"], like=x)
        inputs: list[ir.Value | None] = [sizes]
        attributes: dict[str, object] = {"keepdims": 1}
        if self.opset >= _AXES_INPUT:
            inputs.append(add_initializer(graph, "token_axis", np.array([-1], np.int64)))
        else:
            attributes["axes"] = [-1]
        names = [f"{x.name}_token_max"]
        peaks = emit(at, "ReduceMax", inputs, attributes=attributes, names=names, dtype=ir.DataType.FLOAT)
        peaks.shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], 1])
        return peaks
