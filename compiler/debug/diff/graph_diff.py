# SPDX-License-Identifier: Apache-2.0
"""The difference of two models, grouped by user layer."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from splitfold.compiler.debug.diff.match import Counterparts, Side, match, operator_of
from splitfold.compiler.debug.diff.nodes import Wiring, details
from splitfold.compiler.debug.diff.tensors import TensorDiff, compare_tensors
from splitfold.compiler.debug.diff.types import (
    Kind,
    LayerChange,
    NodeChange,
    NodeFacts,
    Slot,
    SlotChange,
    Summary,
    TensorChange,
)
from splitfold.passes.base import Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.errors import SpecError
from splitfold.passes.identity import display_layer, layers_of
from splitfold.passes.text import render_operator, render_type
from splitfold.runtime.errors import did_you_mean
from splitfold.runtime.feeds import model_inputs
from splitfold.runtime.model_file import weight_bytes

__all__ = ["GraphDiff", "diff"]

FORMAT = 1
_UNREAD = "(read by no node)"


@dataclass(frozen=True)
class GraphDiff:
    """What is different between two models. Names of nodes and inner values, and metadata, do not count.

    Attributes:
        summary: counts.
        slots: inputs, outputs and opsets that changed.
        layers: changes by user layer, in order of execution.
        known: the user layers of both models, changed or not.
    """

    summary: Summary
    slots: tuple[SlotChange, ...]
    layers: tuple[LayerChange, ...]
    known: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing is different."""
        return not self.slots and not self.layers

    def only(self, pattern: str) -> GraphDiff:
        """Return the changes of the layers that `pattern` (shell wildcards) matches; the summary stays that
        of the whole.

        Raises:
            SpecError: neither model has such a layer.
        """
        wanted = re.compile(fnmatch.translate(pattern))
        chosen = {name for name in self.known if name == pattern or wanted.match(name)}
        if not chosen:
            raise SpecError(f"no layer matches '{pattern}'.{did_you_mean(pattern, self.known)}")
        kept = tuple(
            change
            for change in self.layers
            if change.layer in chosen or chosen & set(change.layer.split("+"))
        )
        return dataclasses.replace(self, slots=(), layers=kept)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; infinity is the text ``inf``, which JSON lacks."""
        values = _plain(self)
        del values["known"]
        return {"format": FORMAT, "equal": self.equal, **values}


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value


def diff(before: ir.Model, after: ir.Model) -> GraphDiff:
    """Return what is different in `after`; neither model is changed.

    Nodes are counterparts where their outputs stand for the same value of the original model, else where
    names or layers agree, so that a fused or split layer still meets its ancestors. Models that splitfold did
    not make are named first.
    """
    first, second = _side(before), _side(after)
    pairs = match(first, second)
    homes = _Homes(first, second, pairs)
    nodes = _node_changes(first, second, pairs)
    tensors = compare_tensors(first, second, pairs)
    known = {layer for side in (first, second) for node in side.nodes for layer in layers_of(node)}
    return GraphDiff(
        _summary(first, second, [change for _, change in nodes], tensors),
        tuple(_slots(first, second)),
        _layers(homes, nodes, tensors.changes),
        tuple(sorted(known)),
    )


def _side(model: ir.Model) -> Side:
    named = model.clone()
    name_all(named, Findings())
    return Side(named)


class _Homes:
    """The layer that the changes of each node are shown under, and where it stands."""

    def __init__(self, before: Side, after: Side, pairs: Sequence[Counterparts]) -> None:
        self._layer = {node: display_layer(node) for node in before.nodes}
        self._place = {
            node: at / max(len(side.nodes), 1)
            for side in (before, after)
            for node, at in side.position.items()
        }
        for pair in pairs:
            own = pair.before[0] if not _is_made_up(pair.before[0]) else pair.after[0]
            for node in (*pair.before, *pair.after):
                self._layer[node] = display_layer(own)
                self._place[node] = self._place[pair.before[0]]
        known = {layer for node in before.nodes for layer in layers_of(node)}
        housed = {node for pair in pairs for node in pair.after}
        for node in reversed(after.nodes):
            if node in housed:
                continue
            self._layer[node] = display_layer(node)
            # one without a name of the user's belongs to the counterpart that reads it
            reader = next((reader for reader in node.successors() if reader in housed), None)
            if reader is not None and _is_made_up(node) and not set(layers_of(node)) <= known:
                self._layer[node] = self._layer[reader]
                housed.add(node)

    def of(self, node: ir.Node | None) -> tuple[float, str]:
        """Return place and layer of a node; None is a place after all of them."""
        return (2.0, _UNREAD) if node is None else (self._place.get(node, 2.0), self._layer[node])


def _is_made_up(node: ir.Node) -> bool:
    """Return whether the layer of `node` is its own name, for want of a name that the user gave."""
    return layers_of(node) == (node.name,)


NodeChanges = list[tuple[ir.Node, NodeChange]]


def _node_changes(before: Side, after: Side, pairs: Sequence[Counterparts]) -> NodeChanges:
    wiring, found = Wiring(before, after, pairs), NodeChanges()
    for pair in pairs:
        if len(pair.before) == len(pair.after) == 1 and operator_of(pair.before[0]) == operator_of(
            pair.after[0]
        ):
            seen = details(pair.before[0], pair.after[0], wiring)
            if seen:
                found.append((pair.before[0], _change(Kind.CHANGED, pair.before, pair.after, details=seen)))
        else:
            found.append((pair.before[0], _change(Kind.REPLACED, pair.before, pair.after)))
    constants = {name for graph in after.model.graphs() for name in graph.initializers}
    first = {node for pair in pairs for node in pair.before}
    second = {node for pair in pairs for node in pair.after}
    for node in before.nodes:
        if node not in first:
            folded = all(value.name in constants for value in node.outputs if value.name)
            found.append((node, _change(Kind.REMOVED, (node,), (), folded=folded)))
    found += [(node, _change(Kind.ADDED, (), (node,))) for node in after.nodes if node not in second]
    return found


def _change(kind: Kind, before: Sequence[ir.Node], after: Sequence[ir.Node], **more: Any) -> NodeChange:
    return NodeChange(kind, tuple(map(_facts, before)), tuple(map(_facts, after)), **more)


def _facts(node: ir.Node) -> NodeFacts:
    return NodeFacts(
        render_operator(node), node.name or "", tuple(value.name or "" for value in node.outputs)
    )


def _layers(
    homes: _Homes, nodes: NodeChanges, tensors: Sequence[tuple[ir.Node | None, TensorChange]]
) -> tuple[LayerChange, ...]:
    places: dict[str, float] = {}
    node_changes: defaultdict[str, list[tuple[float, NodeChange]]] = defaultdict(list)
    tensor_changes: defaultdict[str, list[TensorChange]] = defaultdict(list)
    for node, change in nodes:
        place, layer = homes.of(node)
        places[layer] = min(place, places.get(layer, place))
        node_changes[layer].append((place, change))
    for reader, moved in tensors:
        place, layer = homes.of(reader)
        places[layer] = min(place, places.get(layer, place))
        tensor_changes[layer].append(moved)
    return tuple(
        LayerChange(
            layer,
            tuple(change for _, change in sorted(node_changes[layer], key=lambda item: item[0])),
            tuple(tensor_changes[layer]),
        )
        for layer in sorted(places, key=places.__getitem__)
    )


def _summary(before: Side, after: Side, nodes: Sequence[NodeChange], tensors: TensorDiff) -> Summary:
    def of(kind: Kind) -> int:
        return sum(change.kind is kind for change in nodes)

    kinds = [change.kind for _, change in tensors.changes]
    sides = (before, after)
    return Summary(
        nodes=(len(before.nodes), len(after.nodes)),
        nodes_added=of(Kind.ADDED),
        nodes_removed=of(Kind.REMOVED),
        nodes_replaced=of(Kind.REPLACED),
        nodes_changed=of(Kind.CHANGED),
        tensors=_pair([sum(len(graph.initializers) for graph in side.model.graphs()) for side in sides]),
        tensors_added=kinds.count(Kind.ADDED),
        tensors_removed=kinds.count(Kind.REMOVED),
        tensors_changed=kinds.count(Kind.CHANGED) + kinds.count(Kind.RETYPED),
        tensors_renamed=tensors.renamed,
        weight_bytes=_pair([weight_bytes(side.model) for side in sides]),
    )


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _slots(before: Side, after: Side) -> list[SlotChange]:
    models = (before.model, after.model)
    return [
        *_slot_changes(Slot.OPSET, *map(_opsets, (before, after))),
        *_slot_changes(Slot.INPUT, *(_types(model_inputs(model)) for model in models)),
        *_slot_changes(Slot.OUTPUT, *(_types(model.graph.outputs) for model in models)),
    ]


def _opsets(side: Side) -> dict[str, str]:
    """Return the versions of the domains that are used."""
    used = {operator_of(node)[0] for node in side.nodes}
    versions = {
        "" if domain == "ai.onnx" else domain: number for domain, number in side.model.opset_imports.items()
    }
    return {domain or "ai.onnx": str(number) for domain, number in sorted(versions.items()) if domain in used}


def _types(values: Sequence[ir.Value]) -> dict[str, str]:
    return {value.name or "": render_type(value) for value in values}


def _slot_changes(slot: Slot, before: dict[str, str], after: dict[str, str]) -> list[SlotChange]:
    found = [
        SlotChange(slot, name, before.get(name), after.get(name))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    moved = slot is not Slot.OPSET and set(before) == set(after) and list(before) != list(after)
    return [*found, *(_moved(slot, before, after) if moved else [])]


def _moved(slot: Slot, before: dict[str, str], after: dict[str, str]) -> list[SlotChange]:
    places = [{name: f"position {at}" for at, name in enumerate(values)} for values in (before, after)]
    return [
        SlotChange(slot, name, was, places[1][name])
        for name, was in places[0].items()
        if was != places[1][name]
    ]
