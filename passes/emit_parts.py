# SPDX-License-Identifier: Apache-2.0
"""Writing a layer as parts of its weight: as parallel layers whose outputs are added, or as one layer whose
weight is the sum of its parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitfold.passes.branches import Branch, BranchKind, mark_branch
from splitfold.passes.carriers import weight_graph
from splitfold.passes.clusters import kmeans_thresholds, members
from splitfold.passes.integer_linear import following_bias
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.split_weight import split_parts
from splitfold.passes.values import (
    add_initializer,
    constant,
    drop_initializer,
    drop_unused,
    emit,
    replace_value,
)
from splitfold.runtime.feeds import Array

__all__ = ["add_up", "emit_branch", "replace_by_branches", "replace_weight_by_sum", "weight_position"]


def replace_by_branches(layer: Layer, parts: Sequence[Array], *, split_bias: bool) -> None:
    """Put a layer for each of `parts` in the place of `layer`, and the sum of their outputs.

    The bias stays whole, on the first branch; with `split_bias` it is clustered like a weight, as the paper
    does, and a constant Add that follows a MatMul counts as its bias.
    """
    count = len(parts)
    after = following_bias(layer) if split_bias and layer.is_linear else None
    biases = _biases(layer, after, count) if split_bias else []
    after = after if biases else None
    outputs = []
    for number, part in enumerate(parts, start=1):
        held = add_initializer(weight_graph(layer), f"{layer.weight.name}_part{number}", part)
        bias = layer.bias if number == 1 else None
        if biases and layer.bias is not None:
            bias = _part_of_bias(layer, layer.bias, biases, number)
        value = emit_branch(layer, layer.input, held, bias, f"{layer.output.name}_part{number}")
        if after is not None:
            name = f"{layer.output.name}_biased{number}"
            added = _part_of_bias(layer, _bias_of(layer, after), biases, number)
            value = emit(layer.node, "Add", [value, added], names=[name], origins=[after], like=layer.output)
        mark_branch(value, (after or layer.node).outputs[0], Branch(BranchKind.PART, number, count))
        outputs.append(value)
    replaced = [layer.node] if after is None else [after, layer.node]
    replace_value(replaced[0].outputs[0], add_up(layer, outputs))
    drop_unused(replaced)


def emit_branch(
    layer: Layer, data: ir.Value, weight: ir.Value, bias: ir.Value | None, name: str, group: int | None = None
) -> ir.Value:
    """Emit the operator of `layer` with another input, weight and bias (and number of groups)."""
    reads: list[ir.Value | None] = [data, weight] if layer.kind is not LayerKind.EMBEDDING else [weight, data]
    attributes: dict[str, object] = dict(layer.node.attributes)
    if group is not None:
        attributes["group"] = group
    return emit(
        layer.node,
        layer.node.op_type,
        [*reads, bias] if bias is not None else reads,
        attributes=attributes,
        names=[name],
        like=layer.output,
    )


def add_up(layer: Layer, outputs: Sequence[ir.Value]) -> ir.Value:
    """Emit the sum of the branches' outputs: one Sum, or Adds around a convolution, as these have an integer
    kernel, so that a region of integers goes on through them."""
    name = f"{layer.output.name}_sum"
    if layer.kind is not LayerKind.CONV:
        return emit(layer.node, "Sum", outputs, names=[name], like=layer.output)
    total = outputs[0]
    for value in outputs[1:]:
        total = emit(layer.node, "Add", [total, value], names=[name], like=layer.output)
    return total


def replace_weight_by_sum(layer: Layer, parts: Sequence[Array]) -> None:
    """Let `layer` read the sum of `parts` for its weight; the weight goes where nobody else reads it."""
    weight, graph = layer.weight, weight_graph(layer)
    held = [
        add_initializer(graph, f"{weight.name}_part{number}", part)
        for number, part in enumerate(parts, start=1)
    ]
    total = emit(layer.node, "Sum", held, names=[f"{weight.name}_whole"], like=weight)
    layer.node.replace_input_with(weight_position(layer), total)
    drop_initializer(weight)


def weight_position(layer: Layer) -> int:
    """Return at which input the operator reads its weight."""
    return 0 if layer.kind is LayerKind.EMBEDDING else 1


def _bias_of(layer: Layer, add: ir.Node) -> ir.Value:
    found = add.inputs[1] if add.inputs[0] is layer.output else add.inputs[0]
    if found is None:
        raise ValueError(f"{add.name}: input missing")
    return found


def _biases(layer: Layer, after: ir.Node | None, count: int) -> list[Array]:
    """Return the parts of a constant bias, zeros where it has fewer clusters; empty where there is none."""
    tensor = constant(layer.bias if after is None else _bias_of(layer, after))
    if tensor is None or not np.isfinite(tensor.numpy()).all() or tensor.size == 0:
        return []
    bias = np.asarray(tensor.numpy())
    row = bias.reshape(1, -1)
    parts = split_parts(bias, members(row, kmeans_thresholds(row, count)).reshape(bias.shape))
    return [*parts, *(np.zeros_like(bias) for _ in range(count - len(parts)))]


def _part_of_bias(layer: Layer, bias: ir.Value, parts: Sequence[Array], number: int) -> ir.Value:
    return add_initializer(weight_graph(layer), f"{bias.name}_part{number}", parts[number - 1])
