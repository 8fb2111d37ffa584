# SPDX-License-Identifier: Apache-2.0
"""Parts of a model as models of their own: the nodes that compute some values from others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from splitfold.runtime.feeds import Feeds

__all__ = ["node_model", "nodes_between", "read_values", "submodel", "type_inputs"]


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values that `node` reads, those that its subgraphs read from around them included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        for graph in _graphs(attribute):
            inside = {value for inner in graph.all_nodes() for value in inner.outputs}
            inside |= {*graph.inputs, *graph.initializers.values()}
            for inner in graph.all_nodes():
                for bodies in inner.attributes.values():
                    for body in _graphs(bodies):
                        inside |= {*body.inputs, *body.initializers.values()}
            read = [value for inner in graph.all_nodes() for value in inner.inputs if value is not None]
            yield from (value for value in (*read, *graph.outputs) if value not in inside)


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.is_ref():
        return []
    if attribute.type is ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type is ir.AttributeType.GRAPHS else []


def nodes_between(outputs: Iterable[ir.Value], given: Collection[ir.Value]) -> set[ir.Node]:
    """Return the nodes that compute `outputs`, walking back no further than the values `given`."""
    found: set[ir.Node] = set()
    pending, seen = [*outputs], set(given)
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        if node not in found:
            found.add(node)
            pending.extend(read_values(node))
    return found


def submodel(model: ir.Model, outputs: Sequence[str], given: Collection[str] = ()) -> ir.Model:
    """Return the part of the main graph that computes `outputs` from the values named in `given` and the
    model's inputs, as a model.

    Its inputs are those of them that it reads, under their own names (see `type_inputs`). Weights are shared,
    not copied; `model` is not changed. A value in both `given` and `outputs` is not computed: leave it out.

    Raises:
        KeyError: a name that no value of the main graph has.
    """
    values = _values(model.graph)
    wanted = [values[name] for name in outputs]
    nodes = nodes_between(wanted, {values[name] for name in given})
    return _model(model, [node for node in model.graph if node in nodes], wanted)


def node_model(model: ir.Model, nodes: Collection[ir.Node]) -> ir.Model:
    """Return `nodes` of the main graph as a model: what they read from elsewhere are its inputs, what is read
    elsewhere (or is an output of the whole) its outputs.

    Weights are shared, not copied; `model` is not changed.
    """
    chosen = [node for node in model.graph if node in nodes]
    inside = set(chosen)
    outside = [node for node in model.graph if node not in inside]
    read = {value for node in outside for value in read_values(node)} | set(model.graph.outputs)
    made = [value for node in chosen for value in node.outputs if value.name]
    leaving = [value for value in made if value in read]
    return _model(model, chosen, leaving or made)


def type_inputs(part: ir.Model, feeds: Feeds) -> None:
    """Give the inputs of a part that have no type that of their arrays: a model cut where no type was
    inferred cannot be opened without."""
    for value in part.graph.inputs:
        array = feeds.get(value.name or "")
        if value.type is None and array is not None:
            value.type = ir.TensorType(ir.DataType.from_numpy(np.asarray(array).dtype))


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    computed = {value.name: value for node in graph for value in node.outputs if value.name}
    given = {value.name: value for value in graph.inputs if value.name}
    return {**computed, **given}


def _model(model: ir.Model, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> ir.Model:
    made = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys(value for node in nodes for value in read_values(node) if value not in made)
    constants = [value for value in read if value.is_initializer() and not value.is_graph_input()]
    view = ir.GraphView(
        [value for value in read if value not in set(constants)],
        outputs,
        nodes=nodes,
        initializers=constants,
        opset_imports=dict(model.graph.opset_imports),
        name=model.graph.name,
    )
    part = ir.Model(view.clone(), ir_version=model.ir_version)
    part.functions.update(model.functions)
    return part
