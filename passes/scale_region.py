# SPDX-License-Identifier: Apache-2.0
"""Scale regions: the part of a graph through which a scale for each input channel of a linear layer can be
moved into constants, leaving what the model computes as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from splitfold.passes.channels import FREE, Marks, NotEquivariantError, aligned, backward, forward
from splitfold.passes.digraph import tied_groups
from splitfold.passes.identity import display_layer
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.values import constant

__all__ = ["Parameter", "Region", "grow_region"]

_JOINT = {"Add", "Concat", "Max", "Min", "Sub", "Sum", "Where"}
"""Operators all of whose operands must be scaled alike."""
_NORMS = {
    "BatchNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
}
_CHANNELS_FIRST = {"BatchNormalization", "InstanceNormalization"}
_ONE_TO_ONE = {"Concat", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators of which each element of an operand is one of the output: shapes that inference left open are
known from the output's marks."""
_PRODUCTS = {"Div", "MatMul", "Mul"}
_REACH = 300
"""Values after which a region is given up: it has run into the residual stream."""


@dataclass(frozen=True, eq=False)
class Parameter:
    """A constant that takes part in a scale.

    Attributes:
        node, index: the input that reads it; other readers keep the unscaled constant.
        marks: int64, broadcasts to its shape: which scale each element takes, `FREE` is none.
        divides: whether it is divided by the scale (what makes the value), else multiplied (what reads it).
    """

    node: ir.Node
    index: int
    marks: Marks
    divides: bool


@dataclass(frozen=True, eq=False)
class Region:
    """What one set of scales changes.

    Attributes:
        readers: by linear layer, the scale of each of its input channels: int64 [channels], `FREE` is 1.
        parameters: every constant that is divided or multiplied.
        values: values that carry scaled numbers afterwards.
        scales: how many scales there are, after tying.
    """

    readers: Mapping[Layer, Marks]
    parameters: tuple[Parameter, ...]
    values: tuple[ir.Value, ...]
    scales: int

    @property
    def name(self) -> str:
        """User-facing name: the layers that read."""
        return "+".join(dict.fromkeys(layer.name for layer in self.readers))


def grow_region(layer: Layer, layers: Mapping[ir.Node, Layer]) -> Region:
    """Return the region over which the input channels of `layer` can be scaled.

    Args:
        layer: a float linear layer or convolution of the main graph.
        layers: all layers, by node.

    Raises:
        NotEquivariantError: nothing can absorb the scale; the message names the operator in the way.
    """
    growth = _Growth(layers)
    channels = _input_channels(layer)
    shape = [1] * _rank(layer.input)
    shape[_channel_axis(layer)] = channels
    growth.visit(layer.input, np.arange(channels).reshape(shape), None)
    return growth.region(channels)


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise NotEquivariantError(f"the shape of '{value.name}' is unknown")
    return len(value.shape)


def _channel_axis(layer: Layer) -> int:
    return _rank(layer.input) - 1 if layer.is_linear else 1


def _groups(layer: Layer) -> int:
    attribute = layer.node.attributes.get("group")
    return attribute.as_int() if attribute is not None else 1


def _input_channels(layer: Layer) -> int:
    shape = layer.weight_array().shape
    return int(shape[0]) if layer.is_linear else int(shape[1]) * _groups(layer)


@dataclass
class _Growth:
    layers: Mapping[ir.Node, Layer]
    marks: dict[ir.Value, Marks] = field(default_factory=dict)
    ties: list[tuple[int, int]] = field(default_factory=list)
    readers: dict[Layer, Marks] = field(default_factory=dict)
    parameters: dict[tuple[ir.Node, int], Parameter] = field(default_factory=dict)
    factors: dict[ir.Node, int] = field(default_factory=dict)
    """By product, the operand that carries its scale."""

    def copy(self) -> _Growth:
        return _Growth(
            self.layers,
            dict(self.marks),
            list(self.ties),
            dict(self.readers),
            dict(self.parameters),
            dict(self.factors),
        )

    def take(self, other: _Growth) -> None:
        self.marks, self.ties = other.marks, other.ties
        self.readers, self.parameters, self.factors = other.readers, other.parameters, other.factors

    def region(self, channels: int) -> Region:
        found = {int(mark) for marks in self.marks.values() for mark in marks.flat} | {FREE}
        groups = tied_groups(sorted(found | set(range(channels))), self.ties)
        number: dict[int, int] = {}
        count = 0
        for group in groups:
            free = FREE in group
            number |= dict.fromkeys(group, FREE if free else count)
            count += not free
        final = np.vectorize(number.__getitem__, otypes=[np.int64])
        return Region(
            {layer: final(marks) for layer, marks in self.readers.items()},
            tuple(
                Parameter(item.node, item.index, final(item.marks), item.divides)
                for item in self.parameters.values()
            ),
            tuple(self.marks),
            count,
        )

    def visit(self, value: ir.Value, marks: Marks, origin: ir.Node | None) -> None:
        """Let `value` be scaled, and with it all that makes or reads it; `origin` made it from a scaled
        operand already."""
        if value in self.marks:
            self._tie(self.marks[value], marks)
            return
        if (marks == FREE).all():
            return
        if len(self.marks) > _REACH:
            raise NotEquivariantError("the scale runs through the residual stream")
        self.marks[value] = marks
        if value.is_graph_output():
            raise NotEquivariantError(f"'{value.name}' is an output of the model")
        for use in value.uses():
            self._read(value, use.node, use.idx, marks)
        self._made(value, marks, origin)

    def _tie(self, first: Marks, second: Marks) -> None:
        if first.shape != second.shape:
            shape = np.broadcast_shapes(first.shape, second.shape)
            first, second = np.broadcast_to(first, shape), np.broadcast_to(second, shape)
        differing = first != second
        self.ties.extend(
            (int(a), int(b)) for a, b in zip(first[differing].flat, second[differing].flat, strict=True)
        )

    def _read(self, value: ir.Value, node: ir.Node, index: int, marks: Marks) -> None:
        layer = self.layers.get(node)
        if node.graph is not value.graph:
            raise NotEquivariantError(f"'{value.name}' is read in a subgraph")
        if layer is not None and layer.input is value and layer.kind is not LayerKind.EMBEDDING:
            self._reader(layer, marks)
            return
        if node.op_type in _PRODUCTS and self.factors.setdefault(node, index) != index:
            raise _refusal(node, "both operands of a product would be scaled")
        if node.op_type in ("Shape", "Size"):
            return
        try:
            whole = self.marks.get(node.outputs[0])
            if whole is not None and node.op_type in _ONE_TO_ONE:
                self._tie(backward(node, 0, whole, index), marks)
                return
            made = forward(node, index, marks)
        except NotEquivariantError as error:
            raise _refusal(node, str(error)) from error
        for output, moved in made:
            self.visit(node.outputs[output], moved, node)

    def _reader(self, layer: Layer, marks: Marks) -> None:
        vector = _vector(marks, _channel_axis(layer), layer.node)
        index = layer.node.inputs.index(layer.weight)
        self.readers[layer] = vector
        self.parameters[layer.node, index] = Parameter(
            layer.node, index, _reader_marks(layer, vector), divides=False
        )

    def _made(self, value: ir.Value, marks: Marks, origin: ir.Node | None) -> None:
        node = value.producer()
        if node is None:
            raise NotEquivariantError(f"'{value.name}' is an input of the model")
        if node is origin and node.op_type not in _JOINT:
            return
        layer = self.layers.get(node)
        if layer is not None:
            self._absorbed_by_layer(layer, marks)
        elif node.op_type in _NORMS and node.outputs[0] is value:
            self._absorbed_by_norm(node, marks)
        else:
            self._passed_back(node, value, marks)

    def _absorbed_by_layer(self, layer: Layer, marks: Marks) -> None:
        if layer.kind is LayerKind.EMBEDDING:
            if len(list(layer.weight.uses())) > 1:
                raise _refusal(layer.node, "its table is shared with another layer")
            self._divide(layer.node, 0, _vector(marks, marks.ndim - 1, layer.node)[None, :])
            return
        axis = marks.ndim - 1 if layer.is_linear else 1
        vector = _vector(marks, axis, layer.node)
        shape = [1] * len(layer.weight_array().shape)
        shape[layer.channel_axis] = -1
        self._divide(layer.node, layer.node.inputs.index(layer.weight), vector.reshape(shape))
        if layer.bias is not None:
            self._divide(layer.node, 2, vector)

    def _absorbed_by_norm(self, node: ir.Node, marks: Marks) -> None:
        axis = 1 if node.op_type in _CHANNELS_FIRST else marks.ndim - 1
        vector = _vector(marks, axis, node)
        for index in (1, 2)[: len(node.inputs) - 1]:
            if node.inputs[index] is not None:
                self._divide(node, index, vector)

    def _divide(self, node: ir.Node, index: int, marks: Marks) -> None:
        value = node.inputs[index]
        tensor = constant(value)
        if tensor is None:
            raise _refusal(node, f"its parameter {index} is not constant")
        try:
            np.broadcast_shapes(marks.shape, tensor.shape.numpy())
        except ValueError as error:
            raise _refusal(node, f"its parameter {index} has an unexpected shape") from error
        present = self.parameters.get((node, index))
        if present is not None:
            self._tie(present.marks, marks)
        self.parameters[node, index] = Parameter(node, index, marks, divides=True)

    def _passed_back(self, node: ir.Node, value: ir.Value, marks: Marks) -> None:
        output = next(i for i, item in enumerate(node.outputs) if item is value)
        try:
            if node.op_type in _JOINT:
                first = 1 if node.op_type == "Where" else 0
                for index in range(first, len(node.inputs)):
                    self._back(node, output, marks, index)
            elif node.op_type in ("Mul", "Div") and (at := _constant_operand(node, marks)) is not None:
                self._absorbed_by_factor(node, at, marks)
            else:
                self._any_operand(node, output, marks)
        except NotEquivariantError as error:
            raise _refusal(node, str(error)) from error

    def _back(self, node: ir.Node, output: int, marks: Marks, index: int) -> None:
        value = node.inputs[index]
        tensor = constant(value)
        if tensor is not None and node.op_type != "Concat":
            self._divide(node, index, aligned(marks, len(tensor.shape)))
        elif tensor is not None:
            self._divide(node, index, backward(node, output, marks, index))
        elif value is not None:
            if node.op_type in _PRODUCTS and self.factors.setdefault(node, index) != index:
                raise NotEquivariantError("both operands of a product would be scaled")
            self.visit(value, backward(node, output, marks, index), None)

    def _absorbed_by_factor(self, node: ir.Node, at: int, marks: Marks) -> None:
        tensor = constant(node.inputs[at])
        moved = aligned(marks, len(tensor.shape) if tensor is not None else 0)
        if node.op_type == "Div":
            self.parameters[node, at] = Parameter(node, at, moved, divides=False)
        else:
            self._divide(node, at, moved)

    def _any_operand(self, node: ir.Node, output: int, marks: Marks) -> None:
        """Take the first operand through which the scale can go on: of a product one operand suffices."""
        computed = [i for i, value in enumerate(node.inputs) if value is not None and constant(value) is None]
        failure: NotEquivariantError | None = None
        for index in computed if node.op_type in ("Mul", "MatMul") else computed[:1]:
            attempt = self.copy()
            try:
                attempt._back(node, output, marks, index)
            except NotEquivariantError as error:
                failure = error
                continue
            self.take(attempt)
            return
        raise failure or NotEquivariantError(f"{node.op_type} has no computed operand")


def _constant_operand(node: ir.Node, marks: Marks) -> int | None:
    """Return the operand of a product that is constant and can hold a scale for each marked element."""
    for index in (1,) if node.op_type == "Div" else (0, 1):
        tensor = constant(node.inputs[index])
        if tensor is None:
            continue
        shape = tensor.shape.numpy()
        aligned = [1] * (marks.ndim - len(shape)) + list(shape)
        if all(size == 1 or dim == size for size, dim in zip(marks.shape, aligned, strict=True)):
            return index
    return None


def _vector(marks: Marks, axis: int, node: ir.Node) -> Marks:
    if any(size != 1 for at, size in enumerate(marks.shape) if at != axis):
        raise _refusal(node, "the scaled axis is not its channel axis")
    return marks.reshape(-1)


def _reader_marks(layer: Layer, vector: Marks) -> Marks:
    """Return the marks of a reading weight: rows of [K, N]; of a Conv [out, in / groups, ...] by group."""
    if layer.is_linear:
        return vector[:, None]
    shape = layer.weight_array().shape
    groups = _groups(layer)
    by_group = np.repeat(vector.reshape(groups, -1), shape[0] // groups, axis=0)
    return by_group.reshape(*by_group.shape, *[1] * (len(shape) - 2))


def _refusal(node: ir.Node, reason: str) -> NotEquivariantError:
    if "(at '" in reason:
        return NotEquivariantError(reason)
    return NotEquivariantError(f"{reason} (at '{display_layer(node)}', {node.op_type})")
