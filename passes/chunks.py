# SPDX-License-Identifier: Apache-2.0
"""Channels cut into chunks: where the borders lie, the values of the chunks, and layers cut along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from splitfold.passes.branches import Branch, BranchKind, mark_branch
from splitfold.passes.carriers import weight_graph
from splitfold.passes.emit_parts import add_up, emit_branch
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.provenance import mark_new
from splitfold.passes.values import add_initializer, emit, int_attribute
from splitfold.runtime.feeds import Array

__all__ = [
    "ChunkedValues",
    "channels_of",
    "cut_input",
    "cut_output",
    "even_sizes",
    "groups_of",
    "with_channels",
]


def even_sizes(channels: int, parts: int) -> list[int]:
    """Return the sizes of at most `parts` chunks, as equal as can be, the larger ones first."""
    count = min(channels, parts)
    return [channels // count + (at < channels % count) for at in range(count)]


def channels_of(value: ir.Value, axis: int) -> int | None:
    """Return the size of `value` along `axis`, or None where it is not known."""
    shape = value.shape
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def groups_of(layer: Layer) -> int:
    """Return the groups of channels of a convolution, else 1."""
    return int_attribute(layer.node, "group", 1) if layer.kind is LayerKind.CONV else 1


@dataclass
class ChunkedValues:
    """Values cut along an axis: by the Concat that made them, where its operands are the chunks, else by one
    Split, which all readers share."""

    made: dict[tuple[ir.Value, ir.Graph | None, int, tuple[int, ...]], list[ir.Value]] = field(
        default_factory=dict
    )

    def sizes(self, value: ir.Value, axis: int, parts: int) -> list[int] | None:
        """Return the sizes of the operands of the Concat along `axis` that makes `value`, at most `parts`, or
        None."""
        operands = _operands(value, axis)
        found = [channels_of(operand, axis) for operand in operands]
        sizes = [size for size in found if size]
        return sizes if 2 <= len(sizes) == len(operands) <= parts else None

    def of(self, value: ir.Value, axis: int, sizes: Sequence[int], before: ir.Node) -> list[ir.Value]:
        """Return the chunks of `value`, emitted before `before` where nobody asked for them yet."""
        operands = _operands(value, axis)
        if [channels_of(operand, axis) for operand in operands] == list(sizes):
            return operands
        key = (value, before.graph, axis, tuple(sizes))
        if key not in self.made:
            self.made[key] = _split(value, axis, sizes, before)
        return self.made[key]


def _operands(value: ir.Value, axis: int) -> list[ir.Value]:
    """Return the operands of the Concat along `axis` that makes `value`; none where there is no such node."""
    maker = value.producer()
    rank = None if value.shape is None else len(value.shape)
    if maker is None or maker.op_type != "Concat" or rank is None:
        return []
    along = int_attribute(maker, "axis", 0)
    return [it for it in maker.inputs if it is not None] if along % rank == axis % rank else []


def _split(value: ir.Value, axis: int, sizes: Sequence[int], before: ir.Node) -> list[ir.Value]:
    graph = before.graph
    if graph is None:
        raise ValueError(f"{before.name} is in no graph")
    held = add_initializer(graph, f"{value.name}_chunk_sizes", np.array(sizes, np.int64))
    names = [f"{value.name}_chunk{number}" for number in range(1, len(sizes) + 1)]
    first = emit(before, "Split", [value, held], attributes={"axis": axis}, names=names, like=value)
    maker = first.producer()
    if maker is None:
        raise ValueError("emit made no node")
    for chunk, size in zip(maker.outputs, sizes, strict=True):
        chunk.type, chunk.shape = value.type, with_channels(value, axis, size)
        mark_new(chunk)
    return list(maker.outputs)


def with_channels(value: ir.Value, axis: int, size: int) -> ir.Shape | None:
    """Return the shape of `value` with `size` channels."""
    if value.shape is None:
        return None
    dims = list(value.shape)
    dims[axis] = size
    return ir.Shape(dims)


def cut_input(layer: Layer, chunks: Sequence[ir.Value], sizes: Sequence[int]) -> ir.Value:
    """Emit a layer for each chunk of the input channels of `layer`, and return the sum of their outputs.

    x W = sum of x_i W_i, W_i the rows of W of chunk i. The bias stands on the first. A grouped convolution is
    cut between its groups, and the outputs are concatenated.
    """
    groups = groups_of(layer)
    if groups > 1:
        weight = layer.weight_array()
        per_in, per_out = weight.shape[1], len(weight) // groups
        outs = [size // per_in * per_out for size in sizes]
        return _joined(layer, list(chunks), outs, [size // per_in for size in sizes], BranchKind.GROUP)
    axis = 0 if layer.is_linear else 1
    edges = np.cumsum([0, *sizes])
    outputs = []
    for number, chunk in enumerate(chunks, start=1):
        part = layer.weight_array().take(range(edges[number - 1], edges[number]), axis)
        held = _held(layer, part, f"chunk{number}")
        bias = layer.bias if number == 1 else None
        value = emit_branch(layer, chunk, held, bias, f"{layer.output.name}_chunk{number}")
        mark_branch(value, layer.output, Branch(BranchKind.CHUNK, number, len(sizes)))
        outputs.append(value)
    return add_up(layer, outputs)


def cut_output(layer: Layer, sizes: Sequence[int]) -> ir.Value:
    """Emit a convolution of one group for each slice of the output channels of `layer`, and return the
    concatenation of their outputs."""
    ones = [1] * len(sizes)
    return _joined(layer, [layer.input] * len(sizes), sizes, ones, BranchKind.SLICE)


def _joined(
    layer: Layer,
    chunks: Sequence[ir.Value],
    sizes: Sequence[int],
    groups: Sequence[int],
    kind: BranchKind,
) -> ir.Value:
    """Emit convolutions of some output channels each, `sizes` of them, of their own input and groups, and
    return the concatenation of their outputs."""
    edges = np.cumsum([0, *sizes])
    outputs = []
    for number, chunk in enumerate(chunks, start=1):
        rows = range(edges[number - 1], edges[number])
        held = _held(layer, layer.weight_array().take(rows, 0), f"{kind.value}{number}")
        bias = _bias_of(layer, rows, f"{kind.value}{number}")
        name = f"{layer.output.name}_{kind.value}{number}"
        value = emit_branch(layer, chunk, held, bias, name, groups[number - 1])
        value.shape = with_channels(layer.output, 1, len(rows))
        mark_branch(value, layer.output, Branch(kind, number, len(sizes)))
        outputs.append(value)
    name = f"{layer.output.name}_joined"
    return emit(layer.node, "Concat", outputs, attributes={"axis": 1}, names=[name], like=layer.output)


def _held(layer: Layer, part: Array, what: str) -> ir.Value:
    return add_initializer(weight_graph(layer), f"{layer.weight.name}_{what}", np.ascontiguousarray(part))


def _bias_of(layer: Layer, rows: range, what: str) -> ir.Value | None:
    bias = layer.bias
    if bias is None or bias.const_value is None:
        return None
    part = bias.const_value.numpy().take(rows, 0)
    return add_initializer(weight_graph(layer), f"{bias.name}_{what}", part)
