# SPDX-License-Identifier: Apache-2.0
"""Small functions on values and nodes: constants, new initializers, emitting nodes, replacing values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitfold.passes.identity import inherit
from splitfold.passes.provenance import mark_new, stand_in
from splitfold.runtime.feeds import Array

__all__ = [
    "add_initializer",
    "constant",
    "drop_computed",
    "drop_initializer",
    "drop_unused",
    "emit",
    "float_attribute",
    "forget_names",
    "import_domains",
    "int_attribute",
    "ints_attribute",
    "rename",
    "replace_value",
    "sole_consumer",
    "take_place",
]


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of a value that no caller can change: an initializer that is not a graph input."""
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def add_initializer(graph: ir.Graph, name: str, tensor: Array | ir.TensorProtocol) -> ir.Value:
    """Add an initializer to `graph` under a free name made from `name`, and return its value.

    A second initializer of one name would silently replace the first. One of that name with the same content
    is returned as it is, so that layers that share a weight share its quantized form.
    """
    taken = _taken_names(graph)
    free, count = name, 0
    while free in taken or free in graph.initializers:
        present = graph.initializers.get(free)
        if present is not None and _same(present.const_value, tensor):
            return present
        count += 1
        free = f"{name}_{count}"
    taken.add(free)
    held = (
        ir.tensor(np.array(tensor, order="C"), name=free)
        if isinstance(tensor, np.ndarray | np.generic)
        else tensor
    )
    value = ir.Value(
        name=free, type=ir.TensorType(held.dtype), shape=ir.Shape(held.shape.numpy()), const_value=held
    )
    graph.register_initializer(value)
    return value


_TAKEN = "splitfold.taken_names"


def forget_names(model: ir.Model) -> None:
    """Look afresh at which names are taken: call it where values may have come or gone by other means than
    `emit`.

    All graphs of a model share one set, as a name in a subgraph must not be one of the graphs around it.
    """
    graphs = list(model.graphs())
    taken = set().union(*map(_own_names, graphs))
    for graph in graphs:
        graph.meta[_TAKEN] = taken


def import_domains(model: ir.Model) -> None:
    """Import, as version 1, domains that nodes of any graph use and the model does not: onnx demands it, the
    runtime does not."""
    known = {*model.opset_imports, "", "ai.onnx"}
    for domain in sorted({node.domain for node in model.graph.all_nodes()} - known):
        model.graph.opset_imports[domain] = 1


def _own_names(graph: ir.Graph) -> set[str]:
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    return {value.name for value in values if value.name} | set(graph.initializers)


def _taken_names(graph: ir.Graph) -> set[str]:
    if _TAKEN not in graph.meta:
        graph.meta[_TAKEN] = _own_names(graph)
    taken: set[str] = graph.meta[_TAKEN]
    return taken


def _free_name(graph: ir.Graph, name: str) -> str:
    taken = _taken_names(graph)
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    taken.add(free)
    return free


def _same(present: ir.TensorProtocol | None, tensor: Array | ir.TensorProtocol) -> bool:
    if present is None or present.shape.numpy() != tuple(tensor.shape):
        return False
    if isinstance(tensor, np.ndarray | np.generic):
        array = present.numpy()
        return bool(array.dtype == tensor.dtype and np.array_equal(array, tensor))
    return present is tensor


def emit(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    origins: Iterable[ir.Node] = (),
    domain: str = "",
    attributes: Mapping[str, object] | None = None,
    names: Sequence[str] = (),
    like: ir.Value | None = None,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Insert a node before `before`, and return its first output.

    Args:
        before: the node that it precedes, and whose layers it inherits.
        op_type: operator.
        inputs: input values; None is an omitted one.
        origins: further nodes whose layers it inherits.
        domain: operator domain.
        attributes: attributes by name; None values are left out.
        names: names of the outputs; a number is added to one that is taken.
        like: a value whose shape (and dtype) the first output has.
        dtype: element type of the first output, where it differs from that of `like`.
    """
    graph = before.graph
    if graph is None:
        raise ValueError(f"{before.name} is in no graph")
    kept = {name: value for name, value in (attributes or {}).items() if value is not None}
    outputs = [ir.Value(name=_free_name(graph, name)) for name in names] or [ir.Value()]
    title = f"node_{outputs[0].name}" if names else None  # a counted name would depend on what ran before
    node = ir.node(op_type, list(inputs), kept, domain=domain, outputs=outputs, name=title)  # type: ignore[arg-type]
    if like is not None:
        node.outputs[0].shape = like.shape
        node.outputs[0].type = like.type
    if dtype is not None:
        node.outputs[0].type = ir.TensorType(dtype)
    graph.insert_before(before, node)
    inherit([node], [before, *origins])
    mark_new(node.outputs[0])
    return node.outputs[0]


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let all consumers of `old` read `new`, which stands for it now, and takes its name where `old` is a
    graph output."""
    stand_in(new, old)
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}_replaced"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name
    else:
        old.replace_all_uses_with(new)
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type


def rename(value: ir.Value, name: str) -> None:
    """Give `value` a free name made from `name`: it holds something else than it did, and stands for no
    original value any more."""
    if value.graph is None:
        raise ValueError(f"{value.name} is in no graph")
    mark_new(value)
    value.name = _free_name(value.graph, name)


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Let `new`, made from `old` and read in its place, stand for it, and be the graph output that it was;
    `old` holds something else from now on."""
    stand_in(new, old)
    name = old.name
    outputs = old.graph.outputs if old.graph is not None else []
    was_output = old.is_graph_output()
    for position, output in enumerate(outputs):
        if output is old:
            outputs[position] = new
    rename(old, f"{name}_before")
    if was_output:
        new.name = name


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads `value` (once), unless it is also a graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def drop_unused(nodes: Iterable[ir.Node]) -> None:
    """Remove those of `nodes` whose outputs nobody reads, and initializers that only they read."""
    for node in nodes:
        if any(output.uses() or output.is_graph_output() for output in node.outputs):
            continue
        inputs = list(node.inputs)
        owner = node.graph
        if owner is None:
            continue
        owner.remove(node, safe=True)
        for value in inputs:
            drop_initializer(value)


def drop_computed(value: ir.Value | None) -> None:
    """Remove `value` where nobody reads it, and all that only computed it."""
    node = value.producer() if value is not None else None
    if node is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    inputs = list(node.inputs)
    drop_unused([node])
    for operand in inputs:
        drop_computed(operand)


def drop_initializer(value: ir.Value | None) -> None:
    """Remove an initializer that nobody reads any more; anything else is left alone."""
    if (
        value is None
        or value.uses()
        or value.is_graph_output()
        or value.is_graph_input()
        or not value.is_initializer()
    ):
        return
    owner = value.graph
    if owner is not None and value.name is not None:
        owner.initializers.pop(value.name, None)


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute, or its default."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def ints_attribute(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """Return an integer list attribute, or None."""
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else None


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """Return a float attribute, or its default."""
    attribute = node.attributes.get(name)
    return attribute.as_float() if attribute is not None else default
