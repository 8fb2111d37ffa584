# SPDX-License-Identifier: Apache-2.0
"""What is known of each matched value without running: its layer, what computes it, how deep it lies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.compiler.debug.drift.cut import Cut
from splitfold.passes.identity import display_layer
from splitfold.passes.submodel import nodes_between, read_values
from splitfold.passes.values import constant

__all__ = ["Place", "places", "unmatched_layers"]

_FUSED = 4
"""Operators up to which those that compute a value are one layer: a product, its bias and an activation."""


@dataclass(frozen=True)
class Place:
    """Where a matched value stands.

    Attributes:
        layer: user layer of the reference.
        operator: operator of the reference that computes it.
        depth: longest way from an input, in matched values.
        reads: matched values that the compiled part reads.
        part: nodes of the cut model that compute it, in order.
        mixed: whether the compiled part begins before the nearest matched values, as one of them has another
            shape there: its error is not all its own.
    """

    layer: str
    operator: str
    depth: int
    reads: tuple[str, ...]
    part: tuple[ir.Node, ...]
    mixed: bool


def places(reference: ir.Model, cut: Cut) -> dict[str, Place]:
    """Return the place of each value of the reference that the cut model computes, in order."""
    values = {value.name: value for node in reference.graph for value in node.outputs}
    matched = {values[name] for name in cut.outputs}
    there = {value.name: value for node in cut.model.graph for value in node.outputs}
    order = {node: index for index, node in enumerate(cut.model.graph)}
    order |= {node: index for index, node in enumerate(reference.graph)}
    unfed = {there[made] for name, made in cut.outputs.items() if name not in cut.inputs.values()}
    found: dict[str, Place] = {}
    for name, made in cut.outputs.items():
        value = values[name]
        nodes = sorted(nodes_between([value], matched - {value}), key=order.__getitem__)
        part = sorted(nodes_between([there[made]], ()), key=order.__getitem__)
        reads = tuple(dict.fromkeys(_fed(part, cut.inputs)))
        before = [v.name or "" for node in nodes for v in read_values(node) if v in matched]
        depth = 1 + max((found[read].depth for read in before if read in found), default=0)
        producer = value.producer()
        operator = producer.op_type if producer is not None else ""
        inside = {output for node in part for output in node.outputs} - {there[made]}
        layer = _layer(value, nodes, there[made].producer())
        found[name] = Place(layer, operator, depth, reads, tuple(part), not inside.isdisjoint(unfed))
    return found


def _fed(part: Iterable[ir.Node], inputs: Mapping[str, str]) -> Iterable[str]:
    for node in part:
        for value in read_values(node):
            if (original := inputs.get(value.name or "")) is not None:
                yield original


def _layer(value: ir.Value, nodes: Sequence[ir.Node], actual: ir.Node | None) -> str:
    """Return the layer with weights among those that compute `value`, where there is one, else its own.

    Where the node that computes it is the same in the compiled model (`actual`), what differs is one of the
    others, which the compiled model lacks: a dropped bias, say.
    """
    producer = value.producer()
    if producer is None:
        return value.name or ""
    lost = [node for node in nodes if node is not producer]
    same = bool(lost) and actual is not None and _same(producer, actual)
    weighted = [node for node in (lost if same else nodes) if _has_weight(node)]
    if len(nodes) > _FUSED:
        return display_layer(producer)
    if len(weighted) == 1 and (same or not _has_weight(producer)):
        return display_layer(weighted[0])
    return display_layer(lost[-1] if same else producer)


def _same(first: ir.Node, second: ir.Node) -> bool:
    """Return whether two nodes compute the same of what they read."""
    if first.op_identifier() != second.op_identifier() or len(first.inputs) != len(second.inputs):
        return False
    attributes = [
        sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items())
        for node in (first, second)
    ]
    constants = [[constant(value) for value in node.inputs] for node in (first, second)]
    return attributes[0] == attributes[1] and all(
        x is y or (x is not None and y is not None and np.array_equal(x.numpy(), y.numpy()))
        for x, y in zip(*constants, strict=True)
    )


def _has_weight(node: ir.Node) -> bool:
    return any(
        value is not None and value.const_value is not None and len(value.shape or ()) > 1
        for value in node.inputs
    )


def unmatched_layers(
    reference: ir.Model, names: Collection[str], refused: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the layers of the reference of which no value is in `names`, each with the reason.

    Args:
        reference: the model.
        names: its matched values.
        refused: why a value that has a counterpart is not compared.
    """
    seen: dict[str, bool] = {}
    reasons: dict[str, str] = {}
    values = [value for node in reference.graph for value in node.outputs if value.name in names]
    covered = {node for value in values for node in nodes_between([value], set(values) - {value})}
    for node in reference.graph:
        layer = display_layer(node)
        seen[layer] = seen.get(layer, False) or any(value.name in names for value in node.outputs)
        reason = next((refused[v.name] for v in node.outputs if v.name and v.name in refused), "")
        if not reason and node in covered:
            reason = "computed together with a later layer"
        reasons[layer] = reason or reasons.get(layer, "") or "the compiled model has no such value"
    return tuple(f"{layer}: {reasons[layer]}" for layer, matched in seen.items() if not matched)
