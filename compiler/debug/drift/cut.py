# SPDX-License-Identifier: Apache-2.0
"""A compiled model cut open at its matched values, so that each part can be fed with the reference's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.compiler.debug.drift.probe import Seen
from splitfold.passes.submodel import read_values

__all__ = ["Cut", "cut_open"]

_FED = "__fed"
_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclass(frozen=True)
class Cut:
    """A model whose matched values are inputs for those who read them, and outputs of those who compute them.

    Attributes:
        model: the model; its nodes end at these inputs when walked back.
        inputs: the value of the reference that each new input is to be fed with.
        types: the type and shape of each new input.
        outputs: for each matched value of the reference, the name of the value computed for it.
    """

    model: ir.Model
    inputs: Mapping[str, str]
    types: Mapping[str, Seen]
    outputs: Mapping[str, str]


def cut_open(model: ir.Model, counterparts: Mapping[str, Sequence[str]], types: Mapping[str, Seen]) -> Cut:
    """Return a copy of `model`, open at the values in `counterparts` (by the reference's value, in order).

    A value that is not in `types` cannot take the reference's place: its readers keep what is computed. Where
    several values stand for one of the reference, such as a value and its round trip through a grid, the
    reader of any is fed with the reference's, but the last is computed through all of them.
    """
    opened = model.clone()
    values = {value.name: value for node in opened.graph for value in node.outputs if value.name}
    positions = {node: index for index, node in enumerate(opened.graph)}
    fed = {
        name: _feed(opened.graph, values[name], types[name])
        for names in counterparts.values()
        for name in names
        if name in types
    }
    outputs = {}
    for original, names in counterparts.items():
        last = values[names[-1]]
        if len(names) > 1:
            own = {fed[name]: values[name] for name in names if name in fed}
            last = _through(opened.graph, last, own, positions)
        outputs[original] = last.name or ""
    inputs = {
        fed[name].name or "": original
        for original, names in counterparts.items()
        for name in names
        if name in fed
    }
    return Cut(opened, inputs, {made.name or "": types[name] for name, made in fed.items()}, outputs)


def _feed(graph: ir.Graph, value: ir.Value, seen: Seen) -> ir.Value:
    """Add an input that all readers of `value` read instead of it, and return it."""
    made = ir.Value(
        name=f"{value.name}{_FED}",
        type=ir.TensorType(ir.DataType.from_numpy(seen.dtype)),
    )
    graph.inputs.append(made)
    for use in tuple(value.uses()):
        use.node.replace_input_with(use.idx, made)
    return made


def _through(
    graph: ir.Graph, last: ir.Value, own: dict[ir.Value, ir.Value], positions: Mapping[ir.Node, int]
) -> ir.Value:
    """Return `last` computed through the values in `own` (by the input fed in place of each), on nodes of its
    own: others read the same nodes with the reference's value."""
    held = dict(own)
    for node in sorted(_before(last, own), key=positions.__getitem__):
        inputs = [held.get(value, value) if value is not None else None for value in node.inputs]
        has_body = any(attribute.type in _BODIES for attribute in node.attributes.values())
        if has_body or all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
            continue
        for old, new in zip(node.outputs, _copy(graph, node, inputs, last).outputs, strict=True):
            held[old] = new
            for name, value in own.items():
                if value is old:
                    held[name] = new
    return held.get(last, last)


def _before(last: ir.Value, own: Mapping[ir.Value, ir.Value]) -> Iterator[ir.Node]:
    """Yield the nodes that compute `last`, walking through the values in `own` but through no other cut."""
    pending, seen = [last], set()
    while pending:
        value = pending.pop()
        value = own.get(value, value)
        node = value.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(read_values(node))


def _copy(graph: ir.Graph, node: ir.Node, inputs: Sequence[ir.Value | None], last: ir.Value) -> ir.Node:
    suffix = f"__of_{last.name}"
    outputs = [
        ir.Value(name=f"{value.name}{suffix}", type=value.type, shape=value.shape) for value in node.outputs
    ]
    made = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        overload=node.overload,
        outputs=outputs,
        name=f"{node.name}{suffix}",
        metadata_props=dict(node.metadata_props),
    )
    graph.append(made)
    return made
