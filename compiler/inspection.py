# SPDX-License-Identifier: Apache-2.0
"""What a model holds: its weights by layer, with their precision and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.attention import find_attention
from splitfold.passes.attention_block import AttentionReport
from splitfold.passes.base import Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.identity import display_layer, name_layers
from splitfold.passes.shapes import infer_shapes
from splitfold.passes.values import int_attribute

__all__ = [
    "LayerFacts",
    "attention_report",
    "constant_bytes",
    "inspect_layers",
    "operator_counts",
    "weighted_nodes",
]

_CARRIES_ON = {
    "Cast",
    "Concat",
    "DequantizeLinear",
    "GatherElements",
    "Identity",
    "Mul",
    "Reshape",
    "Slice",
    "Squeeze",
    "Sub",
    "Sum",
    "Transpose",
    "Unsqueeze",
}
"""Operators between a stored weight and the one that computes with it."""
_LAYERS = {
    "Attention", "Conv", "ConvInteger", "ConvTranspose", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul",
    "FusedConv", "GRU", "Gather", "GatherBlockQuantized", "Gemm", "LSTM", "MatMul", "MatMulInteger",
    "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearConv", "QLinearMatMul", "RNN",
}  # fmt: skip


@dataclass(frozen=True)
class LayerFacts:
    """One operator with weights.

    Attributes:
        layer: user-facing name.
        kind: operator type.
        shape: of its weight; [K, N] of a MatMulNBits.
        precision: what the weight is held in, and the activations where they are quantized.
        size: bytes of the constants that it reads, scales included; a shared one counts at the first reader.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    precision: str
    size: int


def operator_counts(model: ir.Model) -> dict[str, int]:
    """Return how often each operator stands in the model, subgraphs included, most frequent first."""
    counts = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for graph in model.graphs()
        for node in graph
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def attention_report(model: ir.Model) -> AttentionReport:
    """Return the attention blocks of a model that may come straight from an exporter, with the nodes of a
    copy of it."""
    copy = model.clone()
    name_all(copy, Findings())
    infer_shapes(copy)
    return find_attention(copy)


def constant_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers and all tensors of Constant nodes."""
    held = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    made = [
        _tensor(node.outputs[0]) for graph in model.graphs() for node in graph if node.op_type == "Constant"
    ]
    return sum(tensor.nbytes for tensor in (*held, *made) if tensor is not None)


def inspect_layers(model: ir.Model) -> list[LayerFacts]:
    """Return the operators with weights, in order; `model` is given layer names where it has none."""
    return [facts for _, facts in weighted_nodes(model)]


def weighted_nodes(model: ir.Model) -> list[tuple[ir.Node, LayerFacts]]:
    """Return the same with their nodes."""
    name_layers(model)
    counted: set[str] = set()
    nodes = [node for graph in model.graphs() for node in graph if node.op_type in _LAYERS]
    return [(node, facts) for node in nodes if (facts := _facts(node, counted)) is not None]


def _facts(node: ir.Node, counted: set[str]) -> LayerFacts | None:
    stored = {name: tensor for operand in node.inputs for name, tensor in _constants(operand)}
    weights = [tensor for tensor in stored.values() if len(tensor.shape) > 1]
    if not weights:
        return None
    weight = max(weights, key=lambda tensor: tensor.size)
    size = sum(tensor.nbytes for name, tensor in stored.items() if name not in counted)
    counted.update(stored)
    return LayerFacts(display_layer(node), node.op_type, _shape(node, weight), _precision(node, weight), size)


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    return ir.convenience.get_const_tensor(value)


def _constants(value: ir.Value | None) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Yield the constants that `value` is made from, through the operators that only carry a weight on."""
    if value is None:
        return
    tensor = _tensor(value)
    if tensor is not None:
        yield value.name or "", tensor
        return
    producer = value.producer()
    if producer is not None and producer.op_type in _CARRIES_ON:
        parts = [list(_constants(operand)) for operand in producer.inputs if operand is not None]
        if all(parts):
            yield from (item for part in parts for item in part)


def _shape(node: ir.Node, weight: ir.TensorProtocol) -> tuple[int, ...]:
    if node.op_type == "MatMulNBits":
        return (int_attribute(node, "K", 0), int_attribute(node, "N", 0))
    return tuple(int(dim) for dim in weight.shape.numpy())


def _precision(node: ir.Node, weight: ir.TensorProtocol) -> str:
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return f"{int_attribute(node, 'bits', 4)} bits, block {int_attribute(node, 'block_size', 32)}"
    held = weight.dtype.name.lower()
    if weight.dtype.is_floating_point() or node.op_type in ("Gather", "LSTM", "GRU"):
        return held
    return f"{held}, activations {_activations(node)}"


def _activations(node: ir.Node) -> str:
    producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    made_by = producer.op_type if producer is not None else ""
    if node.op_type in ("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
        return "static" if made_by == "QuantizeLinear" else "dynamic"
    return "static" if node.op_type.startswith("Q") or made_by == "DequantizeLinear" else "float"
