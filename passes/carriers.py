# SPDX-License-Identifier: Apache-2.0
"""How a layer is carried in low precision: functions that emit the low-bit form of a layer before it and
return its output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import ActivationGrid, BlockQuantized, pack_codes, quantize_weight
from splitfold.passes.layers import Layer
from splitfold.passes.values import add_initializer, emit
from splitfold.runtime.feeds import Array

__all__ = [
    "Carried",
    "Int8Weight",
    "QuantizedInput",
    "carry_blocks",
    "carry_blocks_qdq",
    "carry_dynamic",
    "carry_static",
    "fake_quantize",
    "int8_weight",
    "multiply_dynamic",
    "weight_graph",
    "with_bias",
]

_BIAS_LIMIT = 2.0**31 - 2**8
"""Largest magnitude of an int32 bias code, with room for the rounding of float32."""


@dataclass(frozen=True)
class Carried:
    """The low-bit form of a layer: its output value, and the name of its low-bit weight initializer."""

    output: ir.Value
    weight: str


@dataclass(frozen=True)
class QuantizedInput:
    """A quantized activation.

    Attributes:
        value: after the round trip, in float.
        codes: its integer codes.
        scale, zero_point: initializers of its grid, scalars.
        grid: the grid.
    """

    value: ir.Value
    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    grid: ActivationGrid


@dataclass(frozen=True)
class Int8Weight:
    """An int8 weight [K, N] in the graph.

    Attributes:
        value: its codes.
        scales, zero_points: initializers, [N].
        name: of the initializer that holds the codes.
    """

    value: ir.Value
    scales: ir.Value
    zero_points: ir.Value
    name: str


def int8_weight(layer: Layer, *, levels: int) -> Int8Weight:
    """Add the int8 weight of a linear layer, symmetric per column."""
    graph = weight_graph(layer)
    codes, scales = quantize_weight(layer.weight_array(), layer.channel_axis, levels=levels)
    held = add_initializer(graph, f"{layer.weight.name}_int8", codes)
    steps = add_initializer(graph, f"{layer.weight.name}_scale", scales)
    zero = add_initializer(graph, f"{layer.weight.name}_zero_point", np.zeros(scales.shape, np.int8))
    return Int8Weight(held, steps, zero, held.name or "")


def weight_graph(layer: Layer) -> ir.Graph:
    """Return the graph that holds the layer's weight: its low-bit form stands there too, so that layers in
    subgraphs share it."""
    graph = layer.weight.graph or layer.node.graph
    if graph is None:
        raise ValueError(f"{layer.name} is in no graph")
    return graph


def fake_quantize(
    value: ir.Value, grid: ActivationGrid, at: ir.Node, *, after: bool = False
) -> QuantizedInput:
    """Emit QuantizeLinear and DequantizeLinear of `value` before (or after) the node `at`, whose layers they
    inherit."""
    graph = at.graph
    if graph is None:
        raise ValueError(f"{at.name} is in no graph")
    scale = add_initializer(graph, f"{value.name}_scale", np.array(grid.scale))
    zero = add_initializer(graph, f"{value.name}_zero_point", np.array(grid.zero_point))
    kind = ir.DataType.UINT8 if grid.zero_point.dtype == np.uint8 else ir.DataType.INT8
    codes = emit(
        at, "QuantizeLinear", [value, scale, zero], names=[f"{value.name}_quantized"], like=value, dtype=kind
    )
    back = emit(at, "DequantizeLinear", [codes, scale, zero], names=[f"{value.name}_dequantized"], like=value)
    if after:
        made = [node for node in (codes.producer(), back.producer()) if node is not None]
        graph.remove(made)
        graph.insert_after(at, made)
    return QuantizedInput(back, codes, scale, zero, grid)


def carry_static(layer: Layer, data: QuantizedInput, *, levels: int) -> Carried:
    """Emit the layer with int8 weights per channel behind DequantizeLinear, reading the quantized input
    `data`.

    A Conv's or Gemm's bias becomes int32 with scale = input scale x weight scale; a channel whose bias would
    not fit in int32 gets a coarser scale.
    """
    codes, scales = quantize_weight(layer.weight_array(), layer.channel_axis, levels=levels)
    if layer.bias is not None and layer.bias.const_value is not None:
        scales = _widened(scales, layer.bias.const_value.numpy(), data.grid.scale)
        codes = _requantized(layer, scales, levels)
    weight, name = _dequantized_weight(layer, codes, scales)
    inputs: list[ir.Value | None] = [data.value, weight]
    if layer.bias is not None:
        inputs.append(_dequantized_bias(layer, scales, data.grid.scale))
    output = emit(
        layer.node,
        layer.node.op_type,
        inputs,
        attributes=dict(layer.node.attributes),
        names=[f"{layer.output.name}_int8"],
        like=layer.output,
    )
    return Carried(output, name)


def _widened(scales: Array, bias: Array, input_scale: np.float32) -> Array:
    needed = np.abs(bias.astype(np.float64)).reshape(-1) / (_BIAS_LIMIT * float(input_scale))
    return np.maximum(scales, np.broadcast_to(needed, scales.shape)).astype(np.float32)


def _requantized(layer: Layer, scales: Array, levels: int) -> Array:
    weight = layer.weight_array()
    spread = scales.reshape([-1 if i == layer.channel_axis else 1 for i in range(weight.ndim)])
    return np.clip(np.rint(weight.astype(np.float32) / spread), -levels, levels).astype(np.int8)


def _dequantized_weight(layer: Layer, codes: Array, scales: Array) -> tuple[ir.Value, str]:
    graph = weight_graph(layer)
    held = add_initializer(graph, f"{layer.weight.name}_int8", codes)
    scale = add_initializer(graph, f"{layer.weight.name}_scale", scales)
    zero = add_initializer(graph, f"{layer.weight.name}_zero_point", np.zeros(scales.shape, np.int8))
    value = emit(
        layer.node,
        "DequantizeLinear",
        [held, scale, zero],
        attributes={"axis": layer.channel_axis},
        names=[f"{held.name}_dequantized"],
        like=layer.weight,
    )
    return value, held.name or ""


def _dequantized_bias(layer: Layer, scales: Array, input_scale: np.float32) -> ir.Value | None:
    bias = layer.bias
    if bias is None or bias.const_value is None:
        return bias
    array = np.broadcast_to(bias.const_value.numpy().astype(np.float64).reshape(-1), scales.shape)
    step = (scales * input_scale).astype(np.float32)
    codes = np.clip(np.rint(array / step), -(2.0**31), 2.0**31 - 1).astype(np.int32)
    graph = weight_graph(layer)
    held = add_initializer(graph, f"{bias.name}_int32", codes)
    scale = add_initializer(graph, f"{bias.name}_scale", step)
    zero = add_initializer(graph, f"{bias.name}_zero_point", np.zeros(step.shape, np.int32))
    return emit(
        layer.node,
        "DequantizeLinear",
        [held, scale, zero],
        attributes={"axis": 0},
        names=[f"{held.name}_dequantized"],
        like=bias,
    )


def carry_dynamic(
    layer: Layer, quantized: tuple[ir.Value, ir.Value, ir.Value], weight: Int8Weight
) -> Carried:
    """Emit x W as MatMulInteger, `quantized` being the outputs of DynamicQuantizeLinear(x), and the bias."""
    result = multiply_dynamic(layer.node, layer.output, quantized, weight)
    return Carried(with_bias(layer, result), weight.name)


def multiply_dynamic(
    at: ir.Node, out: ir.Value, quantized: tuple[ir.Value, ir.Value, ir.Value], weight: Int8Weight
) -> ir.Value:
    """Emit, before the node `at`, what has the shape of `out` and stands in its place.

    y = MatMulInteger(q, W, zx) * (sx * sw): the runtime fuses this to DynamicQuantizeMatMul or
    MatMulIntegerToFloat.
    """
    data, data_scale, data_zero = quantized
    base = out.name
    whole = emit(
        at,
        "MatMulInteger",
        [data, weight.value, data_zero, weight.zero_points],
        names=[f"{base}_sum"],
        like=out,
        dtype=ir.DataType.INT32,
    )
    real = emit(
        at, "Cast", [whole], attributes={"to": ir.DataType.FLOAT.value}, names=[f"{base}_cast"], like=out
    )
    step = emit(at, "Mul", [data_scale, weight.scales], names=[f"{base}_step"], like=weight.scales)
    return emit(at, "Mul", [real, step], names=[f"{base}_product"], like=out)


def with_bias(layer: Layer, result: ir.Value) -> ir.Value:
    """Emit the Add of a Gemm's bias, if it has one."""
    if layer.bias is None:
        return result
    names = [f"{layer.output.name}_biased"]
    return emit(layer.node, "Add", [result, layer.bias], names=names, like=layer.output)


def carry_blocks(layer: Layer, quantized: BlockQuantized, *, block: int, accuracy_level: int) -> Carried:
    """Emit x W as com.microsoft::MatMulNBits, `quantized` holding W transposed; any K is allowed."""
    graph = weight_graph(layer)
    rows, columns = quantized.codes.shape[0], quantized.columns
    packed = add_initializer(
        graph, f"{layer.weight.name}_int{quantized.bits}", pack_codes(quantized.codes, quantized.bits)
    )
    scales = add_initializer(graph, f"{layer.weight.name}_scales", quantized.scales)
    zeros = None
    if quantized.zero_points is not None:
        zeros = add_initializer(
            graph, f"{layer.weight.name}_zero_points", pack_codes(quantized.zero_points, quantized.bits)
        )
    inputs: list[ir.Value | None] = [layer.input, packed, scales]
    inputs += [zeros] if zeros is not None else []
    output = emit(
        layer.node,
        "MatMulNBits",
        inputs,
        domain="com.microsoft",
        attributes={
            "K": columns,
            "N": rows,
            "bits": quantized.bits,
            "block_size": block,
            "accuracy_level": accuracy_level,
        },
        names=[f"{layer.output.name}_int{quantized.bits}"],
        like=layer.output,
    )
    return Carried(with_bias(layer, output), packed.name or "")


def carry_blocks_qdq(layer: Layer, quantized: BlockQuantized, *, block: int) -> Carried:
    """Emit the layer behind a blocked DequantizeLinear (opset 21) over axis 0 of its [K, N] weight; K is a
    multiple of `block`."""
    graph = layer.node.graph  # the runtime fails on a DequantizeLinear whose weight stands in another graph
    if graph is None:
        raise ValueError(f"{layer.name} is in no graph")
    half = 2 ** (quantized.bits - 1)
    codes = quantized.codes.reshape(quantized.codes.shape[0], -1).T
    if quantized.zero_points is None:
        kind, codes = (
            (ir.DataType.INT4 if quantized.bits == 4 else ir.DataType.INT8),
            codes.astype(np.int16) - half,
        )
    else:
        kind = ir.DataType.UINT4 if quantized.bits == 4 else ir.DataType.UINT8
    held = add_initializer(graph, f"{layer.weight.name}_int{quantized.bits}", _typed(codes, kind))
    inputs: list[ir.Value | None] = [
        held,
        add_initializer(graph, f"{layer.weight.name}_scales", np.ascontiguousarray(quantized.scales.T)),
    ]
    if quantized.zero_points is not None:
        inputs.append(
            add_initializer(graph, f"{layer.weight.name}_zero_points", _typed(quantized.zero_points.T, kind))
        )
    weight = emit(
        layer.node,
        "DequantizeLinear",
        inputs,
        attributes={"axis": 0, "block_size": block},
        names=[f"{held.name}_dequantized"],
        like=layer.weight,
    )
    rest = [layer.bias] if layer.bias is not None else []
    output = emit(
        layer.node,
        layer.node.op_type,
        [layer.input, weight, *rest],
        attributes=dict(layer.node.attributes),
        names=[f"{layer.output.name}_int{quantized.bits}"],
        like=layer.output,
    )
    return Carried(output, held.name or "")


def _typed(codes: Array, kind: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(codes).astype(kind.numpy()), dtype=kind)
