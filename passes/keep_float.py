# SPDX-License-Identifier: Apache-2.0
"""Keep convolutions that are to stay in float in float.

ONNX Runtime (WeightBiasQuantization, seen in 1.31.1) quantizes the weights of a float Conv between
DequantizeLinear and QuantizeLinear on its own, with one scale for all channels. So a layer that was excluded,
or skipped because int8 would hurt it, is hurt more.
"""

from __future__ import annotations

import onnx_ir as ir

from splitfold.passes.values import constant, emit, sole_consumer

__all__ = ["FLOAT_CONV", "keep_float_convolutions"]

FLOAT_CONV = "FusedConv"
"""com.microsoft operator that computes a Conv (and an activation, which is left out here) in float."""
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu")


def keep_float_convolutions(graph: ir.Graph) -> list[ir.Node]:
    """Change each float convolution of `graph` between integer neighbours so that it stays float; return
    them.

    A Conv is written as com.microsoft::FusedConv. A ConvTranspose reads a Clip without bounds, which is no
    DequantizeLinear.
    """
    kept = [node for node in graph if _is_between(node)]
    for node in kept:
        if node.op_type == "Conv":
            node.op_type, node.domain = FLOAT_CONV, "com.microsoft"
            graph.opset_imports.setdefault("com.microsoft", 1)
        else:
            data = node.inputs[0]
            node.replace_input_with(
                0, emit(node, "Clip", [data], names=[f"{node.outputs[0].name}_input"], like=data)
            )
    return kept


def _is_between(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "ConvTranspose") or node.domain != "" or constant(node.inputs[1]) is None:
        return False
    return _made_by(node.inputs[0], "DequantizeLinear") and _ends_in_codes(node.outputs[0])


def _made_by(value: ir.Value | None, op_type: str) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op_type


def _ends_in_codes(value: ir.Value) -> bool:
    follower = sole_consumer(value)
    if follower is not None and follower.op_type in _ACTIVATIONS:
        value = follower.outputs[0]
    return any(use.node.op_type == "QuantizeLinear" for use in value.uses())
