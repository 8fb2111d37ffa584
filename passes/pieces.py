# SPDX-License-Identifier: Apache-2.0
"""Layers cut out of a model's low-bit variants, from the float layer's input to its output: each can be put
in the float layer's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.carry_out import Variant
from splitfold.passes.layers import Layer
from splitfold.passes.precision import Precision
from splitfold.passes.provenance import anchors
from splitfold.passes.submodel import submodel
from splitfold.passes.values import sole_consumer

__all__ = ["Piece", "cut_pieces"]

_REACH = 3
"""Operators after a layer that its low-bit form may have taken in, such as a bias Add."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One layer in its low-bit forms.

    Attributes:
        layer: of the float model.
        end: the float model's value that all forms compute: the layer's output, or after its bias.
        forms: by precision, a model of one input, the layer's by its name, and one output, `end`.
    """

    layer: Layer
    end: ir.Value
    forms: Mapping[Precision, ir.Model]


def cut_pieces(
    model: ir.Model, layers: Sequence[Layer], variants: Mapping[Precision, Variant]
) -> tuple[list[Piece], dict[str, str]]:
    """Return the layers that can be cut out, in the order in which their ends are computed, and by layer name
    why one cannot.

    Args:
        model: float model.
        layers: of it, each with a computed input, none in a subgraph.
        variants: made from `model`.
    """
    twins = {precision: anchors(model, variant.model) for precision, variant in variants.items()}
    order = {node: position for position, node in enumerate(model.graph)}
    pieces, reasons = [], {}
    for layer in layers:
        own = [precision for precision, variant in variants.items() if layer.name in variant.applied]
        end = _end(layer, [twins[precision] for precision in own])
        if end is None:
            reasons[layer.name] = "no value after it is found in all of its low-bit forms"
            continue
        forms = {precision: _form(layer, end, variants[precision], twins[precision]) for precision in own}
        if wide := next((form for form in forms.values() if len(form.graph.inputs) != 1), None):
            names = ", ".join(value.name or "" for value in wide.graph.inputs)
            reasons[layer.name] = f"a low-bit form of it reads more than its input: {names}"
            continue
        pieces.append(Piece(layer, end, forms))
    return sorted(pieces, key=lambda piece: order[_maker(piece.end)]), reasons


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise ValueError(f"'{value.name}' is computed by no node")
    return node


def _form(layer: Layer, end: ir.Value, variant: Variant, twins: Mapping[str, str]) -> ir.Model:
    name = layer.input.name or ""
    form = submodel(variant.model, [twins[end.name or ""]], [twins.get(name, name)])
    for value in form.graph.inputs[:1]:
        value.name = name
    return form


def _end(layer: Layer, twins: Sequence[Mapping[str, str]]) -> ir.Value | None:
    """Return the first value from the layer's output on that every variant has."""
    value = layer.output
    for _ in range(_REACH):
        if all(value.name in found for found in twins):
            return value
        reader = sole_consumer(value)
        if reader is None or len(reader.outputs) != 1:
            return None
        value = reader.outputs[0]
    return None
