# SPDX-License-Identifier: Apache-2.0
"""Shapes with symbolic sizes, carried through the arithmetic on shapes that exporters write out.

onnx's own inference gives up where a model computes the target of a Reshape from other shapes. Here sizes are
products of a number and symbols, and small tensors of integers are followed by content. It is meant for
analyses: two different symbols that are broadcast against each other are taken for equal, and no symbol for
1.
"""

from __future__ import annotations

import onnx_ir as ir

from splitfold.passes.dims import Dim, Shape, declared_shape
from splitfold.passes.shape_rules import output_shape
from splitfold.passes.small_contents import SMALL, Contents, Item, contents_of

__all__ = ["SymbolicShapes", "symbolic_shapes"]


class SymbolicShapes:
    """What is known of the values of one model; `symbolic_shapes` makes it."""

    def __init__(self) -> None:
        self._shapes: dict[ir.Value, Shape] = {}
        self._contents: dict[ir.Value, Contents] = {}

    def of(self, value: ir.Value | None) -> Shape | None:
        """Return the shape of `value`, or None where its rank is unknown."""
        if value is None:
            return None
        return self._shapes[value] if value in self._shapes else declared_shape(value)

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the number of axes, or None."""
        shape = self.of(value)
        return None if shape is None else len(shape)

    def content(self, value: ir.Value | None) -> Contents | None:
        """Return the elements of a small tensor of rank 0 or 1, or None."""
        if value is None:
            return None
        if value not in self._contents and value.const_value is not None and value.const_value.size <= SMALL:
            array = value.const_value.numpy()
            if array.dtype.kind in "iufb" and array.ndim <= 1:
                self._contents[value] = tuple(_item(element) for element in array.reshape(-1).tolist())
        return self._contents.get(value)

    def scalar(self, value: ir.Value | None) -> float | None:
        """Return the one number that `value` holds, constant or computed from known sizes; None otherwise."""
        if value is not None and value.const_value is not None and value.const_value.size == 1:
            array = value.const_value.numpy()
            return float(array.reshape(-1)[0]) if array.dtype.kind in "iufb" else None
        content = self.content(value)
        if content is None or len(content) != 1:
            return None
        item = content[0]
        if isinstance(item, Dim):
            return None if item.known is None else float(item.known)
        return None if item is None else float(item)

    def visit(self, node: ir.Node) -> None:
        """Learn the outputs of `node` from its inputs."""
        content = contents_of(node, self.content, self.of) if node.domain in ("", "ai.onnx") else None
        if content is not None:
            self._contents[node.outputs[0]] = content
        for position, output in enumerate(node.outputs):
            declared = declared_shape(output)
            found = output_shape(node, self, position)
            if found is None or (declared is not None and len(declared) != len(found)):
                continue
            if declared is not None:
                found = tuple(_closer(mine, its) for mine, its in zip(found, declared, strict=True))
            self._shapes[output] = found


def _item(element: float) -> Item:
    return Dim(element) if isinstance(element, int) and not isinstance(element, bool) else element


def _closer(mine: Dim | None, declared: Dim | None) -> Dim | None:
    return declared if mine is None or (declared is not None and declared.known is not None) else mine


def symbolic_shapes(model: ir.Model) -> SymbolicShapes:
    """Return what is known of the values of all graphs of a canonical model, which it leaves as it is."""
    found = SymbolicShapes()
    for node in model.graph.all_nodes():
        found.visit(node)
    return found
