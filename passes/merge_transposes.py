# SPDX-License-Identifier: Apache-2.0
"""Merge Transposes that follow each other, also where axes are joined for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.dims import Shape
from splitfold.passes.identity import display_layer, inherit
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import drop_computed, drop_unused, emit, ints_attribute, replace_value

__all__ = ["MergeTransposesPass"]


@dataclass(frozen=True)
class MergeTransposesPass(LayerPass):
    """Write a chain of Transposes as one, or none. Exact, bit for bit.

    Exporters turn the keys of an attention twice: once to put heads before tokens, and once, with batch and
    heads joined, for the product with the queries. Each copies all keys.

    Before::

        k = Reshape(Transpose(Reshape(Transpose(x, [0, 2, 1, 3]), [-1, t, d]), [0, 2, 1]), [b, h, d, t])

    After::

        k = Transpose(x, [0, 2, 3, 1])
    """

    name: ClassVar[str] = "merge-transposes"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "a Transpose whose input is turned already"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        turned = [node for node in model.graph.all_nodes() if _perm(node) is not None]
        self.check_patterns(map(display_layer, turned))
        shapes = symbolic_shapes(model) if turned else SymbolicShapes()
        changed = False
        for node in turned:
            if self.unwanted(display_layer(node)) is None:
                changed |= _unjoin(node, shapes)
        for node in [node for node in model.graph.all_nodes() if _perm(node) is not None]:
            reason = self.unwanted(display_layer(node))
            if reason is not None:
                findings.skip(display_layer(node), reason)
            elif done := _merge(node):
                findings.apply(display_layer(node), done)
        return changed or bool(findings.applied)


def _perm(node: ir.Node | None) -> tuple[int, ...] | None:
    """Return the permutation of a Transpose, or None."""
    if node is None or node.op_type != "Transpose" or node.domain != "" or node.inputs[0] is None:
        return None
    shape = node.inputs[0].shape
    given = ints_attribute(node, "perm")
    return given if given is not None or shape is None else tuple(reversed(range(len(shape))))


def _unjoin(node: ir.Node, shapes: SymbolicShapes) -> bool:
    """Let a Transpose of the last two axes, between a Reshape that joins the others and one that parts them
    again, work on all axes; return whether it did."""
    joined = node.inputs[0].producer() if node.inputs[0] is not None else None
    uses = list(node.outputs[0].uses())
    parted = uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
    if joined is None or parted is None or _perm(node) != (0, 2, 1):
        return False
    if (joined.op_type, parted.op_type) != ("Reshape", "Reshape") or uses[0].idx != 0:
        return False
    source, result = joined.inputs[0], parted.outputs[0]
    found = [shapes.of(value) for value in (source, joined.outputs[0], result)]
    if source is None or not _is_same(found):
        return False
    rank = len(found[0] or ())
    perm = [*range(rank - 2), rank - 1, rank - 2]
    made = emit(
        parted, "Transpose", [source], attributes={"perm": perm}, names=[f"{result.name}_turned"], like=result
    )
    replace_value(result, made)
    targets = [parted.inputs[1], joined.inputs[1]]
    drop_unused([parted, node, joined])
    for target in targets:
        drop_computed(target)
    return True


def _is_same(found: Sequence[Shape | None]) -> bool:
    """Whether a tensor [..., p, q], joined to [m, p, q], becomes [..., q, p] with the same first axes."""
    source, joined, result = found
    if source is None or joined is None or result is None or len(joined) != 3 or len(source) != len(result):
        return False
    known = [*source, *joined[1:], *result]
    *first, p, q = source
    return None not in known and joined[1:] == (p, q) and list(result) == [*first, q, p] and len(source) > 3


def _merge(node: ir.Node) -> str:
    """Merge `node` with the Transpose that it reads; return what was done, or nothing."""
    outer, data = _perm(node), node.inputs[0]
    before = data.producer() if data is not None else None
    inner = _perm(before)
    if outer is None or inner is None or before is None or before.inputs[0] is None:
        return ""
    perm = tuple(inner[axis] for axis in outer)
    if perm == tuple(range(len(perm))):
        if before.inputs[0].is_graph_input() and node.outputs[0].is_graph_output():
            return ""
        source = before.inputs[0].producer()
        inherit(
            [source] if source is not None else [use.node for use in node.outputs[0].uses()], [node, before]
        )
        replace_value(node.outputs[0], before.inputs[0])
        drop_unused([node, before])
        return "two Transposes that undo each other are gone"
    inherit([node], [before])
    node.replace_input_with(0, before.inputs[0])
    node.attributes["perm"] = ir.AttrInt64s("perm", perm)
    drop_unused([before])
    return f"two Transposes are one, {list(perm)}"
