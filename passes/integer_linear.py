# SPDX-License-Identifier: Apache-2.0
"""The integer form of a linear layer: com.microsoft::MatMulIntegerToFloat, which takes the bias along.

The runtime fuses Q/DQ around a MatMul to the same kernel, but leaves the bias as an Add of its own.
"""

from __future__ import annotations

import onnx_ir as ir

from splitfold.passes.carriers import Carried, Int8Weight, QuantizedInput
from splitfold.passes.layers import Layer
from splitfold.passes.values import constant, emit, sole_consumer

__all__ = ["carry_integer", "following_bias", "missed_bias"]


def following_bias(layer: Layer) -> ir.Node | None:
    """Return the Add of a constant bias, one value a column, that alone reads a MatMul, or None."""
    node = sole_consumer(layer.output)
    if layer.bias is not None or node is None or node.op_type != "Add" or node.domain != "":
        return None
    columns = layer.weight_array().shape[1]
    tensor = constant(_other(node, layer.output))
    fits = tensor is not None and tensor.shape.numpy() == (columns,) and tensor.dtype == ir.DataType.FLOAT
    return node if fits and node.graph is layer.node.graph else None


def missed_bias(layer: Layer) -> str | None:
    """Return why a bias is left as an Add of its own, or None where it is taken along or there is none."""
    columns = layer.weight_array().shape[1]
    if layer.bias is not None:
        shape = layer.bias.shape
        fits = shape is not None and shape.numpy() == (columns,)
        return None if fits else f"its bias has shape {shape}, not [{columns}]"
    readers = [use.node for use in layer.output.uses() if use.node.op_type == "Add" and not use.node.domain]
    add = next((node for node in readers if constant(_other(node, layer.output)) is not None), None)
    if add is None or following_bias(layer) is not None:
        return None
    if sole_consumer(layer.output) is None:
        return "its output has other readers too, which want it without the bias"
    tensor = constant(_other(add, layer.output))
    if tensor is None or add.graph is not layer.node.graph:
        return "the bias is added in another graph"
    return f"what is added is {tensor.dtype.name} {list(tensor.shape.numpy())}, not FLOAT [{columns}]"


def _other(add: ir.Node, value: ir.Value) -> ir.Value | None:
    return add.inputs[1] if add.inputs[0] is value else add.inputs[0]


def carry_integer(layer: Layer, data: QuantizedInput, weight: Int8Weight, *, add: ir.Node | None) -> Carried:
    """Emit the layer on the integer codes of its input; `add` is the bias Add to take along, or None.

    y = MatMulIntegerToFloat(q, W, sx, sw, zx, zw, bias).
    """
    bias = layer.bias if add is None else _other(add, layer.output)
    columns = weight.scales.shape
    taken = bias is not None and bias.shape is not None and bias.shape == columns
    inputs: list[ir.Value | None] = [
        data.codes,
        weight.value,
        data.scale,
        weight.scales,
        data.zero_point,
        weight.zero_points,
    ]
    output = emit(
        layer.node,
        "MatMulIntegerToFloat",
        [*inputs, bias] if taken else inputs,
        domain="com.microsoft",
        names=[f"{layer.output.name}_int8"],
        origins=[] if add is None else [add],
        like=layer.output,
    )
    if bias is not None and not taken:
        output = emit(
            layer.node, "Add", [output, bias], names=[f"{layer.output.name}_biased"], like=layer.output
        )
    return Carried(output, weight.name)
