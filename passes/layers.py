# SPDX-License-Identifier: Apache-2.0
"""What a quantizable layer is: an operator with a constant weight, its input, bias, output and user-facing
name."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from splitfold.passes.branches import Part, addresses, branch_of_node
from splitfold.passes.identity import display_layer
from splitfold.passes.keep_float import FLOAT_CONV
from splitfold.passes.values import constant, float_attribute, int_attribute
from splitfold.runtime.feeds import Array

__all__ = ["LINEAR", "Layer", "LayerKind", "find_layers", "unsupported_reason"]


class LayerKind(enum.Enum):
    """The operators whose weights splitfold can hold in low precision."""

    MATMUL = "MatMul"
    GEMM = "Gemm"
    CONV = "Conv"
    EMBEDDING = "Gather"


LINEAR = (LayerKind.MATMUL, LayerKind.GEMM)
_WEIGHT_INPUT = {LayerKind.MATMUL: 1, LayerKind.GEMM: 1, LayerKind.CONV: 1, LayerKind.EMBEDDING: 0}
_NO_CARRIER = {"LSTM", "GRU", "RNN", "ConvTranspose"}


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer.

    Attributes:
        node: the operator.
        name: user-facing name.
        kind: which operator it is.
        input: its activation input (the indices of an embedding).
        weight: its constant weight: [K, N] of MatMul and Gemm (transB = 0), [out, in / groups, ...] of Conv,
            [rows, columns] of an embedding.
        bias: its own bias input, or None.
        in_subgraph: whether it stands in a body of If, Loop or Scan, whose values cannot be tapped.
    """

    node: ir.Node
    name: str
    kind: LayerKind
    input: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    in_subgraph: bool = False

    @property
    def output(self) -> ir.Value:
        """The value that the layer computes."""
        return self.node.outputs[0]

    @property
    def part(self) -> Part | None:
        """What this branch of the user's layer was made for, or None where it is the whole or any branch."""
        return next((branch.part for branch in branch_of_node(self.node) if branch.part is not None), None)

    @property
    def addresses(self) -> tuple[str, ...]:
        """What a pattern may call it: the layer's name, then ``name:part`` where it is a part."""
        return addresses(self.name, branch_of_node(self.node))

    @property
    def is_linear(self) -> bool:
        """Whether it is a MatMul or Gemm."""
        return self.kind in LINEAR

    @property
    def channel_axis(self) -> int:
        """Axis of the weight that indexes output channels."""
        return 1 if self.is_linear else 0

    def current(self) -> Layer:
        """Return the layer as it stands now: what it reads may have been replaced since it was found."""
        found = _layer(self.node, self.in_subgraph)
        return replace(self, input=found.input, weight=found.weight, bias=found.bias)

    def weight_array(self) -> Array:
        """Return the weight as an array (its own dtype)."""
        tensor = self.weight.const_value
        if tensor is None:
            raise ValueError(f"{self.name}: the weight is not a constant")
        return np.asarray(tensor.numpy())


def find_layers(model: ir.Model) -> tuple[list[Layer], list[tuple[str, str]]]:
    """Return the layers of all graphs in order, and (name, reason) of operators with weights that are not
    layers."""
    layers: list[Layer] = []
    refused: list[tuple[str, str]] = []
    for graph in model.graphs():
        for node in graph:
            reason = unsupported_reason(node)
            if reason is None:
                layers.append(_layer(node, graph is not model.graph))
            elif reason:
                refused.append((display_layer(node), reason))
    return layers, refused


def _layer(node: ir.Node, in_subgraph: bool) -> Layer:
    kind = LayerKind(node.op_type)
    at = _WEIGHT_INPUT[kind]
    weight, data = node.inputs[at], node.inputs[1 - at]
    bias = node.inputs[2] if len(node.inputs) > 2 and kind is not LayerKind.EMBEDDING else None
    if weight is None or data is None:
        raise ValueError(f"{node.name}: input missing")
    return Layer(node, display_layer(node), kind, data, weight, bias, in_subgraph)


def unsupported_reason(node: ir.Node) -> str | None:
    """Return None for a layer, an empty text for a node without a weight, else why it is no layer."""
    if (node.domain, node.op_type) == ("com.microsoft", FLOAT_CONV):
        return "kept in float between integer layers"
    if node.domain not in ("", "ai.onnx"):
        return ""
    if node.op_type in _NO_CARRIER:
        return f"{node.op_type} has no low-bit carrier"
    if node.op_type not in {kind.value for kind in LayerKind}:
        return ""
    kind = LayerKind(node.op_type)
    if kind is LayerKind.EMBEDDING:
        return _embedding_reason(node)
    return _product_reason(node, kind)


def _embedding_reason(node: ir.Node) -> str | None:
    table = constant(node.inputs[0])
    if (
        table is None
        or len(table.shape) != 2
        or not table.dtype.is_floating_point()
        or int_attribute(node, "axis", 0) != 0
    ):
        return ""
    if table.shape[1] == 1:  # a column of scales, say
        return ""
    return None if constant(node.inputs[1]) is None else ""


def _product_reason(node: ir.Node, kind: LayerKind) -> str | None:
    data, weight = node.inputs[0], constant(node.inputs[1])
    if weight is None:
        if _is_dequantized(node.inputs[1]):
            return "already quantized: left as it is"
        if _is_sum_of_constants(node.inputs[1]):
            return "its weight is a sum of parts, which quantize-parts takes up"
        return (
            "the weight is the left operand"
            if constant(data) is not None and kind is LayerKind.MATMUL
            else ""
        )
    if weight.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"the weight is {weight.dtype.name}, not FLOAT"
    if kind in LINEAR and len(weight.shape) != 2:
        return f"the weight has rank {len(weight.shape)}, not 2"
    if kind is LayerKind.GEMM and not _plain_gemm(node):
        return "the Gemm is transposed or scaled: canonicalize first"
    if not np.isfinite(weight.numpy()).all():
        return "the weight holds NaN or infinity"
    return None


def _plain_gemm(node: ir.Node) -> bool:
    transposed = int_attribute(node, "transA", 0) or int_attribute(node, "transB", 0)
    scaled = float_attribute(node, "alpha", 1.0) != 1.0 or float_attribute(node, "beta", 1.0) != 1.0
    return not transposed and not scaled


def _is_sum_of_constants(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return (
        producer is not None
        and producer.op_type == "Sum"
        and all(constant(operand) is not None for operand in producer.inputs)
    )


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"
