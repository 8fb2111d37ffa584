# SPDX-License-Identifier: Apache-2.0
"""Passes that each do one thing wrong, at the layer that their option names: for tests of what is said about
it, and of how small the part is that still shows it. They are importable, as a reproducer needs them."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, Pass
from splitfold.passes.identity import layers_of
from splitfold.passes.opset import raise_opset
from splitfold.passes.values import add_initializer, emit
from splitfold.runtime.feeds import Array

__all__ = [
    "AddedOutput",
    "BadIndex",
    "BreakShape",
    "DropBias",
    "Hidden",
    "Int8AroundReshape",
    "OneBit",
    "OutOfOrder",
    "Planted",
    "Raising",
    "ScaleWeight",
    "Silent",
    "ToNan",
    "UnknownAttribute",
    "UntypedOutput",
]


@dataclass(frozen=True)
class Planted(Pass):
    """Fails at one layer; does nothing where there is none.

    Args:
        layer: its name.
        everywhere: also in subgraphs.
    """

    contract: ClassVar[Contract] = Contract.EXACT
    layer: str = ""
    everywhere: bool = False


@dataclass(frozen=True)
class OnProduct(Planted):
    """Harms the product of the layer."""

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        for node in model.graph.all_nodes() if self.everywhere else model.graph:
            if node.op_type == "MatMul" and layers_of(node) == (self.layer,) and _weight(node) is not None:
                self.harm(node, model)
                return True
        return False

    @abc.abstractmethod
    def harm(self, node: ir.Node, model: ir.Model) -> None:
        """Do it."""


def _weight(node: ir.Node) -> Array | None:
    value = node.inputs[1]
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _replace(node: ir.Node, model: ir.Model, array: Array) -> None:
    held = add_initializer(model.graph, "planted", np.ascontiguousarray(array, np.float32))
    node.replace_input_with(1, held)


def _reader(node: ir.Node) -> ir.Node:
    return node.outputs[0].uses()[0].node


class ScaleWeight(OnProduct):
    name = "plant-scale"

    def harm(self, node: ir.Node, model: ir.Model) -> None:
        _replace(node, model, _weight(node) * 1.01)


class DropBias(OnProduct):
    name = "plant-drop-bias"

    def harm(self, node: ir.Node, model: ir.Model) -> None:
        add = _reader(node)
        add.outputs[0].replace_all_uses_with(node.outputs[0])
        model.graph.remove(add, safe=True)


class BreakShape(OnProduct):
    name = "plant-break-shape"

    def harm(self, node: ir.Node, model: ir.Model) -> None:
        _replace(node, model, _weight(node)[:, :-1])


class Raising(OnProduct):
    name = "plant-raising"

    def harm(self, node: ir.Node, model: ir.Model) -> None:
        def check(columns: int) -> None:
            raise IndexError(f"tuple index {columns} out of range")

        check(int(_weight(node).shape[1]))


class Hidden(Planted):
    """Raises where no variable points at a layer, and only where two layers are there."""

    name = "plant-hidden"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        layers = {layer for other in model.graph for layer in layers_of(other)}
        if {self.layer, self.layer.replace("output", "intermediate")} <= layers:
            raise ValueError("zero-size array to reduction operation maximum")
        return False


class Silent(ScaleWeight):
    """Says that it changed nothing."""

    name = "plant-silent"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        return not super().rewrite(model, context, findings)


class UnknownAttribute(OnProduct):
    """The runtime refuses the model too."""

    name = "plant-unknown-attribute"

    def harm(self, node: ir.Node, model: ir.Model) -> None:
        node.attributes["colour"] = ir.AttrInt64("colour", 3)


class OutOfOrder(OnProduct):
    """The runtime does not mind."""

    name = "plant-out-of-order"

    def harm(self, node: ir.Node, model: ir.Model) -> None:
        reader = _reader(node)
        model.graph.remove(node)
        model.graph.insert_after(reader, node)


class UntypedOutput(Planted):
    """Only the ONNX checker minds."""

    name = "plant-untyped-output"

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        model.graph.outputs[0].type = None
        return True


class AddedOutput(OnProduct):
    name = "plant-added-output"

    def harm(self, node: ir.Node, model: ir.Model) -> None:
        model.graph.outputs.append(node.outputs[0])


class OneBit(OnProduct):
    """Holds a weight in one bit, badly."""

    name = "plant-one-bit"
    contract = Contract.LOSSY

    def harm(self, node: ir.Node, model: ir.Model) -> None:
        weight = _weight(node)
        _replace(node, model, np.where(weight > 0, 1.0, -1.0) * np.abs(weight).max())


class ToNan(OnProduct):
    name = "plant-nan"
    contract = Contract.LOSSY

    def harm(self, node: ir.Node, model: ir.Model) -> None:
        weight = _weight(node).copy()
        weight[0, 0] = np.nan
        _replace(node, model, weight)


class BadIndex(OnProduct):
    """The runtime opens the model, and fails in a node of it."""

    name = "plant-bad-index"

    def harm(self, node: ir.Node, model: ir.Model) -> None:
        far = add_initializer(model.graph, "far", np.array([10**6], np.int64))
        row = emit(node, "Gather", [node.inputs[1], far], names=["row"])
        total = emit(node, "ReduceSum", [row], names=["total"], attributes={"keepdims": 0})
        readers = _readers(node.outputs[0])
        _redirect(readers, emit(readers[0][0], "Add", [node.outputs[0], total], names=["shifted"]))


class Int8AroundReshape(Planted):
    """At opset 21 the runtime opens it as it is written, but not after its own rewrites."""

    name = "plant-int8-around-reshape"
    contract = Contract.LOSSY

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        raise_opset(model, 21)
        nodes = [node for node in model.graph if node.op_type == "Reshape" and self.layer in layers_of(node)]
        for node in nodes[:1]:
            value = node.inputs[0]
            assert value is not None
            node.replace_input_with(0, _round_trip(node, value, model))
            readers = _readers(node.outputs[0])
            _redirect(readers, _round_trip(readers[0][0], node.outputs[0], model))
            findings.apply(self.layer, "rounded")
        return bool(nodes)


def _readers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    return [(use.node, use.idx) for use in value.uses()]


def _redirect(readers: Iterable[tuple[ir.Node, int]], value: ir.Value) -> None:
    for node, position in readers:
        node.replace_input_with(position, value)


def _round_trip(before: ir.Node, value: ir.Value, model: ir.Model) -> ir.Value:
    scale = add_initializer(model.graph, "scale", np.array(0.05, np.float32))
    zero = add_initializer(model.graph, "zero", np.array(0, np.int8))
    codes = emit(
        before, "QuantizeLinear", [value, scale, zero], names=["codes"], like=value, dtype=ir.DataType.INT8
    )
    return emit(before, "DequantizeLinear", [codes, scale, zero], names=["rounded"], like=value)
