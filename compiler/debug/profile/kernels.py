# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a model each kernel of the runtime's optimised graph computes.

The runtime keeps the names of values that survive, gives a fused node the output of the last node that it
replaced, and makes up the rest from the names that it found. What no name tells follows from the graph: what
lies between the values that are known was fused into one of their kernels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from splitfold.passes.identity import layers_of
from splitfold.passes.provenance import stands_for

__all__ = ["Kernel", "match_kernels"]

_TOKEN = re.compile(r"_token_\d+$")
_LAYOUT = "_nchwc"
_MOVERS = {"ReorderInput", "ReorderOutput"}
"""Operators that the runtime puts in for its own layout: they compute nothing of the model."""
_TAKEN_ALONG = {
    "Add", "Clip", "HardSigmoid", "LeakyRelu", "QuantizeLinear", "Relu", "Sigmoid", "Tanh",
}  # fmt: skip
"""Operators that a kernel computes after its own."""
_PASSIVE = {
    "Cast", "Constant", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear", "Reshape", "Shape",
    "Squeeze", "Unsqueeze",
}  # fmt: skip
"""Operators that say nothing on what a kernel is for, where it also computes others."""


@dataclass(eq=False)
class Kernel:
    """A node of the optimised graph.

    Attributes:
        node: it.
        nodes: what it computes of the model; empty for what the runtime put in.
    """

    node: ir.Node
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def significant(self) -> list[ir.Node]:
        """`nodes` without those that any kernel may take along."""
        return [node for node in self.nodes if node.op_type not in _PASSIVE] or self.nodes

    @property
    def layers(self) -> tuple[str, ...]:
        """The user's layers that it computes, in the model's order."""
        return tuple(dict.fromkeys(layer for node in self.significant for layer in layers_of(node)))

    @property
    def values(self) -> frozenset[str]:
        """Names of the original values that it computes, at the end or on the way."""
        computed = [value for node in self.significant for value in node.outputs]
        return frozenset(name for value in computed if (name := stands_for(value)))


def match_kernels(model: ir.Model, optimized: ir.Model) -> list[Kernel]:
    """Return the nodes of `optimized`, subgraphs included, with the nodes of `model` that they compute.

    Args:
        model: with unique names of values and nodes (`name_all`).
        optimized: the runtime's graph of it.
    """
    kernels = [Kernel(node) for graph in optimized.graphs() for node in graph]
    names = _Names(model)
    claimed: set[ir.Node] = set()
    for kernel in kernels:
        kernel.nodes = [node for node in names.claims(kernel.node) if node not in claimed]
        claimed.update(kernel.nodes)
    for kernel in kernels:
        if kernel.nodes and not names.knows_outputs(kernel.node):
            kernel.nodes += _followers(kernel.nodes[-1], claimed)
            claimed.update(kernel.nodes)
    for kernel in kernels:
        kernel.nodes = [*reversed(list(_ancestors(kernel.nodes, claimed))), *kernel.nodes]
    return kernels


class _Names:
    """The model's nodes by the names under which the runtime may show them."""

    def __init__(self, model: ir.Model) -> None:
        nodes = [node for graph in model.graphs() for node in graph]
        self._by_node = {node.name: node for node in nodes if node.name}
        self._by_value = {value.name: node for node in nodes for value in node.outputs if value.name}

    def knows_outputs(self, node: ir.Node) -> bool:
        """Whether an output of the runtime's `node` is a value of the model."""
        return any(value.name in self._by_value for value in node.outputs)

    def claims(self, node: ir.Node) -> list[ir.Node]:
        """Return the nodes of the model that `node` is known to compute: those of its outputs, else that of
        its name."""
        if node.op_type in _MOVERS:
            return []
        made = [self._by_value[value.name] for value in node.outputs if value.name in self._by_value]
        if made:
            return list(dict.fromkeys(made))
        found = self._decode(node)
        return [] if found is None else [found]

    def _decode(self, node: ir.Node) -> ir.Node | None:
        """Return the node that the made-up name of `node` was made from."""
        name = _TOKEN.sub("", node.name or "")
        if name.endswith(_LAYOUT):
            return self._by_value.get(name.removesuffix(_LAYOUT))
        found = self._by_node.get(name)
        if found is not None and found.op_type in node.op_type:  # Conv as QLinearConv, not a chance namesake
            return found
        return self._by_node.get(name.rstrip("/").rpartition("/")[0]) if "Fusion" in name else None


def _followers(last: ir.Node, claimed: set[ir.Node]) -> Iterator[ir.Node]:
    """Yield the nodes after `last` that nobody claims and that a kernel takes along, up to where the value
    has several readers or is quantized: the name of its output does not tell."""
    while True:
        uses = list(last.outputs[0].uses())
        if len(uses) != 1 or last.outputs[0].is_graph_output():
            return
        last = uses[0].node
        if last in claimed or last.op_type not in _TAKEN_ALONG:
            return
        yield last
        if last.op_type == "QuantizeLinear":
            return


def _ancestors(nodes: Iterable[ir.Node], claimed: set[ir.Node]) -> Iterator[ir.Node]:
    """Yield, and claim, the unclaimed nodes that compute what `nodes` read."""
    pending = [value for node in nodes for value in node.inputs]
    while pending:
        value = pending.pop()
        producer = value.producer() if value is not None else None
        if producer is None or producer in claimed or producer.op_type == "Constant":
            continue
        claimed.add(producer)
        yield producer
        pending.extend(producer.inputs)
