# SPDX-License-Identifier: Apache-2.0
"""Emitting static int8: Q/DQ on the values of integer regions and on the edges into linear layers, then the
layers themselves."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from splitfold.passes.affine import ActivationGrid
from splitfold.passes.base import Findings
from splitfold.passes.carriers import Carried, QuantizedInput, carry_static, fake_quantize, int8_weight
from splitfold.passes.identity import display_layer
from splitfold.passes.integer_linear import carry_integer, following_bias, missed_bias
from splitfold.passes.keep_float import keep_float_convolutions
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.provenance import stand_in
from splitfold.passes.regions import missed_points, region_values
from splitfold.passes.values import drop_unused, replace_value

__all__ = ["StaticForm", "quantize_statically", "trial_carrier"]

Grids = Mapping[str, ActivationGrid]
"""Grid by value name, of the values that a grid can hold."""


def trial_carrier(layers: Sequence[Layer], grids: Grids, levels: int) -> Callable[[Layer], Carried | None]:
    """Return a function that emits a layer (of a copy of the model) with quantized input and weight, its
    output left in float."""
    names = {layer.name for layer in layers}

    def carry(layer: Layer) -> Carried | None:
        if layer.name not in names or layer.kind is LayerKind.EMBEDDING:
            return None
        data = fake_quantize(layer.input, grids[layer.input.name or ""], layer.node)
        return carry_static(layer, data, levels=levels)

    return carry


class StaticForm(enum.Enum):
    """How a statically quantized linear layer is written; a Conv is always written as Q/DQ."""

    QDQ = "qdq"
    """Standard QuantizeLinear / DequantizeLinear, which the runtime fuses."""
    INTEGER = "integer"
    """com.microsoft::MatMulIntegerToFloat, which takes the bias along."""


def quantize_statically(
    model: ir.Model, layers: Sequence[Layer], grids: Grids, levels: int, form: StaticForm, findings: Findings
) -> dict[str, ir.Value]:
    """Replace `layers` by their static int8 form, regions included, and record each with its weight.

    Returns:
        by name of a value that a layer computed in float, before its grid: what computes it now. A bias that
        the integer form takes along counts to the layer.
    """
    names = {layer: _result(layer, form).name or "" for layer in layers}
    made = {}
    convolutions = [layer for layer in layers if layer.kind is LayerKind.CONV]
    nodes = [layer.node for layer in layers]
    region = region_values(model.graph, convolutions, nodes, lambda value: (value.name or "") in grids)
    for outside, reason in missed_points(model.graph, convolutions, nodes, region):
        findings.miss(display_layer(outside), "integer region", reason)
    order = {node: position for position, node in enumerate(model.graph)}
    inputs = {value: _quantize_for_all(value, grids[source.name or ""]) for value, source in region.items()}
    for layer in layers:
        if layer.input not in inputs:
            inputs[layer.input] = _quantize_edge(layer.input, grids[layer.input.name or ""], nodes, order)
    for layer in layers:
        if form is StaticForm.INTEGER and layer.is_linear and (obstacle := missed_bias(layer)) is not None:
            findings.miss(layer.name, "bias taken along by the integer kernel", obstacle)
        carried = _replace(layer, inputs[layer.input], levels, form)
        made[names[layer]] = carried.output
        findings.apply(layer.name, f"{layer.kind.value} static int8", weight=carried.weight)
    if kept := keep_float_convolutions(model.graph):
        findings.notes.append(f"{len(kept)} float convolutions are guarded: the runtime would quantize them")
    drop_unused([node for data in inputs.values() if (node := data.value.producer()) is not None])
    if region:
        findings.notes.append(f"{len(region)} values of integer regions are quantized for all their readers")
    return made


def _result(layer: Layer, form: StaticForm) -> ir.Value:
    """Return what `form` computes: the layer's output, or that with the bias that is taken along."""
    add = following_bias(layer) if form is StaticForm.INTEGER and layer.is_linear else None
    return layer.output if add is None else add.outputs[0]


def _replace(layer: Layer, data: QuantizedInput, levels: int, form: StaticForm) -> Carried:
    """Put the low-bit form in the place of `layer` and return it."""
    if form is StaticForm.INTEGER and layer.is_linear:
        add = following_bias(layer)
        carried = carry_integer(layer, data, int8_weight(layer, levels=levels), add=add)
        replaced = [layer.node] if add is None else [add, layer.node]
    else:
        carried = carry_static(layer, data, levels=levels)
        replaced = [layer.node]
    replace_value(replaced[0].outputs[0], carried.output)
    drop_unused(replaced)
    return carried


def _first(nodes: Sequence[ir.Node], order: Mapping[ir.Node, int]) -> ir.Node:
    return min((node for node in nodes if node in order), key=lambda node: order[node])


def _quantize_for_all(value: ir.Value, grid: ActivationGrid) -> QuantizedInput:
    """Let every reader of `value`, graph outputs included, read its round trip."""
    uses = list(value.uses())
    producer = value.producer()
    graph = value.graph
    if graph is None or producer is None:
        raise ValueError(f"'{value.name}' is computed by no node of the graph")
    data = fake_quantize(value, grid, producer, after=True)
    for use in uses:
        use.node.replace_input_with(use.idx, data.value)
    if value.is_graph_output():
        stand_in(data.value, value)
        name = value.name
        value.name = f"{name}_float"
        for position, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[position] = data.value
        data.value.name = name
    return data


def _quantize_edge(
    value: ir.Value, grid: ActivationGrid, readers: Sequence[ir.Node], order: Mapping[ir.Node, int]
) -> QuantizedInput:
    chosen = set(readers)
    return fake_quantize(value, grid, _first([use.node for use in value.uses() if use.node in chosen], order))
