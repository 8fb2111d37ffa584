# SPDX-License-Identifier: Apache-2.0
"""What a pass added to an ONNX model, put into the traced module that the model was made of."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
import torch.fx
from torch import nn

from splitfold.compiler.traced.module import put
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.submodel import part_of
from splitfold.runtime.lift import lift

__all__ = ["Addition", "Rewrite", "graft", "rewritten"]


@dataclass(frozen=True, eq=False)
class Addition:
    """Nodes that a pass added and that depend on each other.

    Attributes:
        model: they as a model.
        inputs: names, before the pass, of the values that they read; by the names of the model's inputs.
        replaced: names, before the pass, of the values whose place the model's outputs take, in order.
    """

    model: ir.Model
    inputs: Mapping[str, str]
    replaced: Sequence[str]

    @property
    def values(self) -> set[str]:
        """All names before the pass."""
        return {*self.inputs.values(), *self.replaced}


@dataclass(frozen=True, eq=False)
class Rewrite:
    """What passes did to a model, which is changed."""

    model: ir.Model
    records: Sequence[PassRecord]
    additions: Sequence[Addition] = field(default=())

    @property
    def values(self) -> set[str]:
        """Names of the values of the model before that the additions read or replace."""
        return {name for addition in self.additions for name in addition.values}


def rewritten(model: ir.Model, steps: Pipeline) -> Rewrite:
    """Run passes over a model, in place, and tell what they added."""
    nodes, names = set(model.graph), _names(model)
    read = {node: tuple(node.inputs) for node in nodes}
    outputs = tuple(model.graph.outputs)
    records = steps.run(model)
    fresh = [node for node in model.graph if node not in nodes]
    pairs = [pair for node in model.graph for pair in zip(read.get(node, ()), node.inputs, strict=False)]
    pairs += zip(outputs, model.graph.outputs, strict=True)
    replaced = {new: old for old, new in pairs if old is not None and new is not None and old is not new}
    additions = [_addition(model, part, replaced, names) for part in _parts(fresh)]
    return Rewrite(model, records, additions)


def _names(model: ir.Model) -> dict[ir.Value, str]:
    made = (value for node in model.graph for value in node.outputs)
    given = (*model.graph.inputs, *model.graph.initializers.values(), *made)
    return {value: value.name or "" for value in given}


def _parts(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """Return nodes in groups that are connected by the values that they make."""
    group: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        joined = [node]
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            other = group.get(maker) if maker is not None else None
            if other is not None and other is not joined:
                joined = [*other, *joined]
        joined = list(dict.fromkeys(joined))
        for member in joined:
            group[member] = joined
    order = {node: at for at, node in enumerate(nodes)}
    found = {id(members): members for members in group.values()}
    return [sorted(members, key=order.__getitem__) for members in found.values()]


def _addition(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    replaced: Mapping[ir.Value, ir.Value],
    names: Mapping[ir.Value, str],
) -> Addition:
    outputs = [value for node in nodes for value in node.outputs if value in replaced]
    part = part_of(model.graph, nodes, outputs)
    made = {value for node in nodes for value in node.outputs}
    inputs = {
        value.name or "": names[value]
        for node in nodes
        for value in node.inputs
        if value is not None and value not in made and not value.is_initializer()
    }
    return Addition(part, inputs, [names[replaced[value]] for value in outputs])


def graft(module: torch.fx.GraphModule, addition: Addition, origins: Mapping[str, str]) -> list[str]:
    """Put an addition into a traced module, in place; return the names of the parameters that are new.

    Args:
        module: the module that the ONNX model was made of.
        addition: what a pass added to it.
        origins: for names of its values the node that computes them.
    """
    graph = module.graph
    nodes = {node.name: node for node in graph.nodes}
    order = {node: at for at, node in enumerate(graph.nodes)}
    lifted = lift(addition.model)
    held = {name: nodes[origins[before]] for name, before in addition.inputs.items()}
    olds = [nodes[origins[before]] for before in addition.replaced]
    users = [list(old.users) for old in olds]
    known = {
        node: held[name]
        for node, name in zip(lifted.module.graph.find_nodes(op="placeholder"), lifted.inputs, strict=True)
    }
    last = max([*held.values(), *olds], key=order.__getitem__)
    added = _share(module, lifted.module, {name: key for key, name in lifted.parameters.items()})
    with graph.inserting_before(last.next):
        outputs = graph.graph_copy(lifted.module.graph, known)
    if not isinstance(outputs, tuple):
        raise TypeError(f"what was lifted gives {type(outputs).__name__}")
    for node in graph.nodes:
        if node not in order:
            node.meta = {key: olds[0].meta[key] for key in ("nn_module_stack",) if key in olds[0].meta}
    for old, new, readers in zip(olds, outputs, users, strict=True):
        for reader in readers:
            reader.replace_input_with(old, new)
    return added


def _share(module: torch.fx.GraphModule, lifted: torch.fx.GraphModule, keys: Mapping[str, str]) -> list[str]:
    """Let `module` hold what the lifted nodes read, under the names of the ONNX model, and let them read it
    there; return the names of trainable parameters."""
    like = next((it for it in module.parameters() if it.is_floating_point()), torch.empty(0))
    added = []
    for node in lifted.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        held = operator.attrgetter(target)(lifted)
        name = keys.get(target, target)
        moved = held.detach().to(like.device)
        if isinstance(held, nn.Parameter) and held.requires_grad:
            put(module, name, nn.Parameter(moved))
            added.append(name)
        else:
            put(module, name, moved, persistent=target in keys)
        node.target = name
    return added
