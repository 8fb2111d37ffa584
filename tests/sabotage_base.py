# SPDX-License-Identifier: Apache-2.0
"""What passes of the sabotage suite have in common: each harms one layer, chosen by seed, and does not say
which. It claims to have rewritten every layer alike."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from zlib import crc32

import numpy as np
import onnx_ir as ir

from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.identity import display_layer
from splitfold.runtime.feeds import Array

__all__ = ["Sabotage", "Seen", "insert_after", "is_dense", "is_square", "op", "set_tensor", "weight_of"]


@dataclass(frozen=True)
class Seen:
    """How a sabotage shows.

    Attributes:
        numbers: the model runs on, and its outputs are finite and off.
        kind: name of the `Failure` with which compilation stops; None where a lossy pass is let through.
    """

    numbers: bool
    kind: str | None


@dataclass(frozen=True)
class Sabotage(LayerPass):
    """Harms one node of one layer.

    Args:
        seed: which layer.
    """

    contract: ClassVar[Contract] = Contract.EXACT
    seen: ClassVar[Seen] = Seen(numbers=True, kind="MOVED")
    modified: ClassVar[bool] = True
    """What it says about itself."""
    seed: int = 0

    @abc.abstractmethod
    def fits(self, node: ir.Node) -> bool:
        """Whether `node` can be harmed in this way."""

    @abc.abstractmethod
    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        """Do it."""

    def planted(self, model: ir.Model) -> str:
        """The layer that is harmed in a canonical `model`."""
        return display_layer(self.victim(model))

    def victim(self, model: ir.Model) -> ir.Node:
        """The node that is harmed."""
        nodes = [node for node in model.graph if self.fits(node)]
        return min(nodes, key=lambda node: crc32(f"{self.seed} {self.name} {node.name}".encode()))

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        victim = self.victim(model)
        planted = display_layer(victim)
        for layer in dict.fromkeys(display_layer(node) for node in model.graph):
            if reason := self.unwanted(layer):
                findings.skip(layer, reason)
                continue
            findings.apply(layer, "rewritten")
            if layer == planted:
                self.harm(victim, model.graph)
        return self.modified


def weight_of(node: ir.Node) -> Array:
    return _tensor(node.inputs[1])


def _tensor(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return np.array(value.const_value.numpy())


def set_tensor(value: ir.Value | None, array: Array) -> None:
    assert value is not None
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
    value.shape = ir.Shape(array.shape)


def is_dense(node: ir.Node) -> bool:
    """A MatMul of a constant weight, whose effect a softmax does not swallow."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    return node.op_type == "MatMul" and value is not None and value.const_value is not None


def is_square(node: ir.Node) -> bool:
    return is_dense(node) and len(set(weight_of(node).shape)) == 1


def insert_after(node: ir.Node, make: Callable[[ir.Value], Sequence[ir.Node]]) -> None:
    """Let all readers of `node` read the last of the nodes that `make` returns for its output."""
    value, graph = node.outputs[0], node.graph
    assert graph is not None
    readers = [(use.node, use.idx) for use in value.uses()]
    made = make(value)
    graph.insert_after(node, list(made))
    for reader, position in readers:
        reader.replace_input_with(position, made[-1].outputs[0])


def op(operator: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: Any) -> ir.Node:
    made = ir.node(operator, list(inputs), attributes)
    made.outputs[0].type = ir.TensorType(dtype) if dtype is not None else inputs[0].type
    made.outputs[0].shape = inputs[0].shape
    return made
