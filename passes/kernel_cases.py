# SPDX-License-Identifier: Apache-2.0
"""The kernels that a model could run in, at the shapes that given inputs make of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from splitfold.passes.dims import declare_shape, declared_shape
from splitfold.passes.layers import Layer, LayerKind, find_layers
from splitfold.passes.symbolic_shapes import SymbolicShapes, symbolic_shapes
from splitfold.passes.values import int_attribute
from splitfold.runtime.costs.kernel import Case, Operation, Shape
from splitfold.runtime.costs.models import FORMS
from splitfold.runtime.feeds import Feeds

__all__ = ["ConcreteShapes", "kernel_cases", "layer_shape"]

_GELU = ("Erf", "Gelu", "FastGelu")


class ConcreteShapes:
    """Shapes of a model's values for given sizes of its inputs.

    Args:
        model: canonical form; not changed.
        feeds: inputs, of which only the shapes count.
    """

    def __init__(self, model: ir.Model, feeds: Feeds) -> None:
        self.model = model.clone()
        _bind(self.model, feeds)
        self._found: SymbolicShapes = symbolic_shapes(self.model)
        graphs = list(self.model.graphs())
        made = [value for graph in graphs for node in graph for value in node.outputs]
        self._values = {value.name: value for value in (*self.model.graph.inputs, *made)}

    def of(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Return the shape of a value of the model, named as there; None where it is not known."""
        shape = self._found.of(None if value is None else self._values.get(value.name, value))
        sizes = [None if dim is None else dim.known for dim in shape] if shape is not None else [None]
        return tuple(size for size in sizes if size is not None) if None not in sizes else None

    def size(self, value: ir.Value | None) -> int | None:
        """Return the number of elements of a value of the model; None where it is not known."""
        shape = self.of(value)
        return None if shape is None else math.prod(shape)


def _bind(model: ir.Model, feeds: Feeds) -> None:
    """Put the sizes of `feeds` in the place of the symbols that the model's inputs have for them."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        array = feeds.get(value.name or "")
        if array is None or value.shape is None:
            continue
        for dim, size in zip(declared_shape(value) or (), array.shape, strict=False):
            if dim is not None and dim.factor == 1 and len(dim.symbols) == 1:
                sizes[dim.symbols[0]] = size
        value.shape = ir.Shape(array.shape)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            _fill(value, sizes)


def _fill(value: ir.Value, sizes: Mapping[str, int]) -> None:
    shape = declared_shape(value)
    if shape is None or value.shape is None or value.shape.is_static():
        return
    filled = []
    for dim in shape:
        if dim is not None and set(dim.symbols) <= sizes.keys():
            dim = type(dim)(dim.factor * math.prod(sizes[name] for name in dim.symbols))
        filled.append(dim)
    declare_shape(value, tuple(filled))


def kernel_cases(model: ir.Model, feeds: Feeds) -> tuple[list[Case], list[str]]:
    """Return the cases that say what each part of `model` takes in each of its forms, each once, and the
    names of layers whose shape is not known.

    Args:
        model: float model in canonical form; not changed.
        feeds: example inputs, of which only the shapes count.
    """
    shapes = ConcreteShapes(model, feeds)
    found: dict[Case, None] = {}
    unknown = []
    for layer in find_layers(shapes.model)[0]:
        if layer.kind is LayerKind.EMBEDDING:
            continue
        shape = layer_shape(layer, shapes)
        if shape is None:
            unknown.append(layer.name)
            continue
        found |= dict.fromkeys(_layer_cases(layer, shape, shapes))
    for node in shapes.model.graph.all_nodes():
        found |= dict.fromkeys(_node_cases(node, shapes))
    return list(found), unknown


def layer_shape(layer: Layer, shapes: ConcreteShapes) -> Shape | None:
    """Return the sizes of a layer as `splitfold.runtime.costs.kernel.AXES` wants them; None where they are
    not known, or the convolution is none of two dimensions and one kernel size."""
    given = shapes.of(layer.input)
    if given is None or not given or 0 in given:
        return None
    if layer.is_linear:
        depth, columns = layer.weight_array().shape
        return (math.prod(given[:-1]), int(depth), int(columns))
    outputs, _, *size = layer.weight_array().shape
    strides = _numbers(layer.node, "strides") or [1, 1]
    if len(given) != 4 or len(set(size)) != 1 or len(set(strides)) != 1:
        return None
    return (
        *given[:2],
        int(outputs),
        *given[2:],
        int(size[0]),
        strides[0],
        int_attribute(layer.node, "group", 1),
    )


def _numbers(node: ir.Node, name: str) -> list[int]:
    attribute = node.attributes.get(name)
    return [] if attribute is None else [int(item) for item in attribute.as_ints()]


def _layer_cases(layer: Layer, shape: Shape, shapes: ConcreteShapes) -> Iterator[Case]:
    operation = Operation.MATMUL if layer.is_linear else Operation.CONV
    yield from _all(operation, shape)
    for value, conversion in ((layer.input, Operation.QUANTIZE), (layer.output, Operation.DEQUANTIZE)):
        given = shapes.of(value)
        if given:
            yield from _all(conversion, (math.prod(given),))


def _node_cases(node: ir.Node, shapes: ConcreteShapes) -> Iterator[Case]:
    given = shapes.of(node.inputs[0]) if node.inputs else None
    if not given or 0 in given:
        return
    rows = (math.prod(given[:-1]), given[-1])
    if node.op_type == "Softmax":
        yield from _all(Operation.SOFTMAX, rows)
        size = _head_size(node, given, shapes)
        if size is not None:
            yield from _all(Operation.ATTENTION, (*given[:3], size))
    elif node.op_type == "LayerNormalization":
        yield from _all(Operation.NORM, rows)
    elif node.op_type in _GELU:
        yield from _all(Operation.GELU, rows)


def _head_size(softmax: ir.Node, given: Sequence[int], shapes: ConcreteShapes) -> int | None:
    """Return how wide a head is where `softmax` is that of self-attention, [batch, heads, tokens, tokens]."""
    if len(given) != 4 or given[2] != given[3]:
        return None
    for use in softmax.outputs[0].uses():
        if use.node.op_type == "MatMul" and use.idx == 0:
            other = shapes.of(use.node.inputs[1])
            return other[-1] if other else None
    return None


def _all(operation: Operation, shape: Shape) -> Iterator[Case]:
    for kernel in FORMS[operation]:
        yield Case(kernel, shape)
