# SPDX-License-Identifier: Apache-2.0
"""Give a Reshape its target as a constant, where the graph computes one that it could say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.dims import Dim
from splitfold.passes.identity import display_layer
from splitfold.passes.shapes import infer_shapes
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import add_initializer, constant, drop_computed, int_attribute

__all__ = ["SimplifyReshapesPass"]


@dataclass(frozen=True)
class SimplifyReshapesPass(LayerPass):
    """Write computed targets of Reshape as constants: 0 copies an axis, -1 is what remains. Exact.

    Exporters compute the target of every split and merge of attention heads from the shape of some tensor: a
    dozen small operators each, which at one short sentence take as long as the arithmetic.

    Before::

        y = Reshape(x, Concat(Shape(ids), [12, 32]))

    After::

        y = Reshape(x, [0, 0, 12, 32])
    """

    name: ClassVar[str] = "simplify-reshapes"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "a Reshape whose target is computed"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        computed = [node for node in model.graph.all_nodes() if _is_computed(node)]
        self.check_patterns(map(display_layer, computed))
        shapes = symbolic_shapes(model) if computed else SymbolicShapes()
        before = len(findings.applied)
        for node in computed:
            layer = display_layer(node)
            target = _target(node, shapes)
            reason = self.unwanted(layer) or (target if isinstance(target, str) else None)
            if isinstance(target, str) or reason is not None:
                findings.skip(layer, reason or "")
                continue
            _set_target(node, target)
            findings.apply(layer, f"target of Reshape is {target}")
        if len(findings.applied) > before:
            infer_shapes(model)  # a constant target says more
        return len(findings.applied) > before


def _is_computed(node: ir.Node) -> bool:
    reshapes = node.op_type == "Reshape" and node.domain == "" and len(node.inputs) == 2
    return reshapes and constant(node.inputs[1]) is None


def _target(node: ir.Node, shapes: SymbolicShapes) -> list[int] | str:
    """Return the constant target, or why there is none."""
    wanted, given = shapes.content(node.inputs[1]), shapes.of(node.inputs[0])
    if wanted is None or given is None:
        return "what its target is made of is unknown"
    target: list[int] = []
    for axis, item in enumerate(wanted):
        if not isinstance(item, Dim):
            target.append(-1)
        elif item.known == 0 and int_attribute(node, "allowzero", 0):
            return "its target holds an empty axis"
        elif item.known is not None:
            target.append(item.known)
        else:
            target.append(0 if axis < len(given) and given[axis] == item else -1)
    if 0 in [item.known for item in given if item is not None] or target.count(-1) > 1:
        return "more than one axis of its target is unknown"
    return target


def _set_target(node: ir.Node, target: list[int]) -> None:
    graph, old = node.graph, node.inputs[1]
    if graph is None or old is None:
        raise ValueError(f"{node.name} is in no graph")
    name = f"{node.outputs[0].name}_target"
    node.replace_input_with(1, add_initializer(graph, name, np.array(target, np.int64)))
    node.attributes.pop("allowzero", None)
    drop_computed(old)
