# SPDX-License-Identifier: Apache-2.0
"""A linear layer written as two: its outlier channels, and the rest."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitfold.passes.branches import Branch, BranchKind, Part, mark_branch
from splitfold.passes.carriers import weight_graph, with_bias
from splitfold.passes.layers import Layer
from splitfold.passes.outlier_cuts import Axis, Cut
from splitfold.passes.values import add_initializer, emit
from splitfold.runtime.feeds import Array

__all__ = ["emit_cut"]


def emit_cut(layer: Layer, cut: Cut) -> ir.Value:
    """Emit both parts of `layer` before it, and return the value that takes the place of its output.

    Input channels: y = x W_rest + Gather(x, channels) W_channels, where W_rest is W with those rows set to
    zero: a zero costs its few bits, and leaving the row out would cost a copy of x. Output channels: y is the
    concatenation of both products, put into order by a Gather of its columns.
    """
    whole = _by_input(layer, cut) if cut.axis is Axis.INPUT else _by_output(layer, cut)
    return with_bias(layer, whole)


def _by_input(layer: Layer, cut: Cut) -> ir.Value:
    weight = layer.weight_array()
    rest = weight.copy()
    rest[cut.channels] = 0
    picked = _gather(layer, layer.input, cut.channels, f"{layer.output.name}_picked")
    parts = [
        _product(layer, layer.input, rest, Part.REST, BranchKind.PART),
        _product(layer, picked, weight[cut.channels], Part.OUTLIERS, BranchKind.PART),
    ]
    return emit(layer.node, "Add", parts, names=[f"{layer.output.name}_whole"], like=layer.output)


def _by_output(layer: Layer, cut: Cut) -> ir.Value:
    weight = layer.weight_array()
    others = np.setdiff1d(np.arange(weight.shape[1]), cut.channels)
    parts = [
        _product(layer, layer.input, weight[:, others], Part.REST, BranchKind.SLICE),
        _product(layer, layer.input, weight[:, cut.channels], Part.OUTLIERS, BranchKind.SLICE),
    ]
    joined = emit(
        layer.node,
        "Concat",
        parts,
        attributes={"axis": -1},
        names=[f"{layer.output.name}_joined"],
        like=layer.output,
    )
    order = np.argsort(np.concatenate([others, cut.channels]))
    return _gather(layer, joined, order, f"{layer.output.name}_whole")


def _product(layer: Layer, data: ir.Value, weight: Array, part: Part, kind: BranchKind) -> ir.Value:
    name = layer.weight.name
    held = add_initializer(weight_graph(layer), f"{name}_{part.value}", np.ascontiguousarray(weight))
    product = emit(
        layer.node, "MatMul", [data, held], names=[f"{layer.output.name}_{part.value}"], like=layer.output
    )
    product.shape = _narrowed(layer.output, weight.shape[1])
    mark_branch(product, layer.output, Branch(kind, 1 if part is Part.REST else 2, 2, part))
    return product


def _gather(layer: Layer, data: ir.Value, channels: Array, name: str) -> ir.Value:
    indices = np.ascontiguousarray(channels, np.int32)
    held = add_initializer(weight_graph(layer), f"{layer.weight.name}_channels", indices)
    picked = emit(layer.node, "Gather", [data, held], attributes={"axis": -1}, names=[name], like=data)
    picked.shape = _narrowed(data, len(channels))
    return picked


def _narrowed(value: ir.Value, channels: int) -> ir.Shape | None:
    """Return the shape of `value` with another number of channels."""
    return None if value.shape is None else ir.Shape([*list(value.shape)[:-1], channels])
