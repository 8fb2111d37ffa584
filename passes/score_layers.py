# SPDX-License-Identifier: Apache-2.0
"""Analysis: the layers that make queries and keys, found from the Softmax that their product goes into."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from splitfold.passes.values import constant

__all__ = ["score_makers"]

_FUSED = {"Attention", "GroupQueryAttention", "MultiHeadAttention"}
"""Operators that hold the product and the Softmax: their inputs 0 and 1 are queries and keys."""
_PRODUCTS = {"Einsum", "MatMul"}
_THROUGH = {
    "Add",
    "Cast",
    "Clip",
    "Concat",
    "Div",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "LayerNormalization",
    "Max",
    "Min",
    "Mul",
    "Neg",
    "Pow",
    "RMSNormalization",
    "ReduceMean",
    "ReduceSum",
    "Reciprocal",
    "Reshape",
    "RotaryEmbedding",
    "SimplifiedLayerNormalization",
    "Slice",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Sum",
    "Tanh",
    "Tile",
    "Transpose",
    "Unsqueeze",
    "Where",
}
"""Operators between a layer and the product, or the product and the Softmax: biases, heads, rotary embedding,
norms of queries and keys, scaling, masks, soft caps."""


def score_makers(model: ir.Model) -> set[ir.Node]:
    """Return the nodes of all graphs whose output becomes queries or keys: MatMul and Gemm with a constant
    weight.

    From each Softmax it walks back to the product of two computed values, and from both operands to the
    layers. A layer that makes values too (fused q, k, v) counts.
    """
    found: set[ir.Node] = set()
    for graph in model.graphs():
        for node in graph:
            if node.op_type == "Softmax":
                for product in _reached(node.inputs[:1], _is_product):
                    found |= _reached(product.inputs[:2], _is_layer)
            elif node.op_type in _FUSED:
                found |= _reached(node.inputs[:2], _is_layer)
    return found


def _is_layer(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "Gemm") and constant(node.inputs[1]) is not None


def _is_product(node: ir.Node) -> bool:
    return node.op_type in _PRODUCTS and not any(constant(value) is not None for value in node.inputs)


def _reached(values: Iterable[ir.Value | None], accept: Callable[[ir.Node], bool]) -> set[ir.Node]:
    """Return the first accepted nodes behind `values`, through the operators of _THROUGH."""
    found: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    pending = [value.producer() for value in values if value is not None]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if accept(node):
            found.add(node)
        elif node.op_type in _THROUGH and not _is_layer(node):
            pending.extend(value.producer() for value in node.inputs if value is not None)
    return found
