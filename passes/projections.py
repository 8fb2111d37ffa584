# SPDX-License-Identifier: Apache-2.0
"""Projections: products of an input with a constant weight, in float or in a low-bit form, that can be one
where they share the input."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.quantizers import dequantized_by
from splitfold.passes.values import constant, float_attribute, int_attribute, sole_consumer
from splitfold.runtime.feeds import Array

__all__ = ["Form", "Projection", "projection_of"]


class Form(enum.Enum):
    """How a projection is written."""

    FLOAT = "MatMul"
    """MatMul of a float weight [K, N]."""
    GEMM = "Gemm"
    """The same with a bias of its own."""
    DEQUANTIZED = "DequantizeLinear, MatMul"
    """MatMul of a weight [K, N] that is dequantized, per column or in blocks along K."""
    INTEGER = "MatMulIntegerToFloat"
    """com.microsoft::MatMulIntegerToFloat, a scale per column."""
    DYNAMIC = "MatMulInteger"
    """MatMulInteger, Cast and Mul by the product of the input's scale and those of the columns."""
    BLOCKS = "MatMulNBits"
    """com.microsoft::MatMulNBits: a row of packed codes per column."""


@dataclass(frozen=True, eq=False)
class Projection:
    """One product.

    Attributes:
        form: how it is written.
        node: the operator that multiplies.
        gone: all nodes that computed `output`, last first, when it is replaced.
        output: what it computes, bias included.
        columns: N.
        weight: initializer of the weight or its codes.
        pieces: what is joined column by column: arrays of `weight`, scales and zero points, whose last axis
            (first axis for BLOCKS) goes over the columns; an absent one is None.
        bias: [N], or None.
        key: what it must have in common with those that it is joined with.
    """

    form: Form
    node: ir.Node
    gone: tuple[ir.Node, ...]
    output: ir.Value
    columns: int
    weight: ir.Value
    pieces: tuple[Array | None, ...]
    bias: Array | None
    key: Hashable


def projection_of(node: ir.Node) -> Projection | None:
    """Return the projection that `node` is the product of, or None."""
    reader = _READERS.get((node.domain, node.op_type))
    return reader(node) if reader is not None and node.graph is not None else None


def _matmul(node: ir.Node) -> Projection | None:
    weight = node.inputs[1]
    held = _matrix(weight)
    if held is None or weight is None:
        return _dequantized(node)
    if held.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    return _with_tail(Form.FLOAT, node, weight, (_array(held),), (held.dtype,))


def _dequantized(node: ir.Node) -> Projection | None:
    found = dequantized_by(node.inputs[1])
    if found is None:
        return None
    dequantize, grid = found
    codes = dequantize.inputs[0]
    held = _matrix(codes)
    if codes is None or held is None or len(dequantize.outputs[0].uses()) > 1:
        return None
    if grid.axis is not None and grid.axis != (0 if grid.block else 1):
        return None
    scales, zeros = (_constant_input(dequantize, position) for position in (1, 2))
    if grid.axis is None:
        scales, zeros = (_spread(values, held.shape.numpy()[1]) for values in (scales, zeros))
    key = (held.dtype, grid.block, zeros is None, grid.domain)
    pieces = (_array(held), scales, zeros)
    return _with_tail(Form.DEQUANTIZED, node, codes, pieces, key, also=(dequantize,))


def _gemm(node: ir.Node) -> Projection | None:
    weight, held = node.inputs[1], _matrix(node.inputs[1])
    plain = not any(int_attribute(node, name, 0) for name in ("transA", "transB"))
    plain &= all(float_attribute(node, name, 1.0) == 1 for name in ("alpha", "beta"))
    if weight is None or held is None or not plain or not held.dtype.is_floating_point():
        return None
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = _bias(given, held.shape.numpy()[1])
    if given is not None and bias is None:
        return None
    key = (Form.GEMM, node.inputs[0], held.dtype)
    return Projection(
        Form.GEMM, node, (node,), node.outputs[0], held.shape.numpy()[1], weight, (_array(held),), bias, key
    )


def _integer(node: ir.Node) -> Projection | None:
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    weight, held = inputs[1], _matrix(inputs[1])
    if weight is None or held is None:
        return None
    columns = held.shape.numpy()[1]
    scales, zeros = (_spread(_constant_input(node, position), columns) for position in (3, 5))
    bias = _bias(inputs[6], columns)
    unread = [(inputs[3], scales), (inputs[5], zeros), (inputs[6], bias)]
    if any(value is not None and array is None for value, array in unread):
        return None
    key = (Form.INTEGER, inputs[0], _content(inputs[2]), _content(inputs[4]), held.dtype, zeros is None)
    pieces = (_array(held), scales, zeros)
    return Projection(Form.INTEGER, node, (node,), node.outputs[0], columns, weight, pieces, bias, key)


def _dynamic(node: ir.Node) -> Projection | None:
    """Read MatMulInteger(q, W, zx, zw) -> Cast -> Mul(_, Mul(sx, sw))."""
    inputs = [*node.inputs, *[None] * (4 - len(node.inputs))]
    weight, held = inputs[1], _matrix(inputs[1])
    cast = _next(node, "Cast")
    product = _next(cast, "Mul") if cast is not None else None
    if weight is None or held is None or cast is None or product is None:
        return None
    step = _other(product, cast.outputs[0]).producer()
    if step is None or step.op_type != "Mul" or len(step.outputs[0].uses()) > 1:
        return None
    columns = held.shape.numpy()[1]
    scale = next((value for value in step.inputs if constant(value) is not None), None)
    scales = _spread(_array(constant(scale)), columns)
    zeros = _spread(_constant_input(node, 3), columns)
    if scale is None or scales is None or (inputs[3] is not None and zeros is None):
        return None
    kind = cast.attributes["to"].as_int()
    key = (inputs[2], _other(step, scale), kind, held.dtype, zeros is None)
    pieces = (_array(held), scales, zeros)
    return _with_tail(Form.DYNAMIC, node, weight, pieces, key, chain=(product, cast, node), also=(step,))


def _next(node: ir.Node, op_type: str) -> ir.Node | None:
    """Return what alone reads `node`, where it is an `op_type` in the same graph."""
    found = sole_consumer(node.outputs[0])
    fits = found is not None and (found.domain, found.op_type) == ("", op_type) and found.graph is node.graph
    return found if fits else None


def _blocks(node: ir.Node) -> Projection | None:
    """Read MatMulNBits without group indices and without a bias of its own."""
    weight = node.inputs[1]
    codes, scales, zeros = (_constant_input(node, position) for position in (1, 2, 3))
    columns = int_attribute(node, "N", 0)
    more = [value for value in node.inputs[4:] if value is not None]
    unread = len(node.inputs) > 3 and node.inputs[3] is not None and zeros is None
    if weight is None or codes is None or scales is None or len(weight.uses()) > 1 or more or unread:
        return None
    names = ("K", "bits", "block_size", "accuracy_level")
    key = (*(int_attribute(node, name, 0) for name in names), None if zeros is None else zeros.dtype)
    rows = [None if each is None else each.reshape(columns, -1) for each in (scales, zeros)]
    return _with_tail(Form.BLOCKS, node, weight, (codes, *rows), key, columns=columns)


_READERS: dict[tuple[str, str], Callable[[ir.Node], Projection | None]] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "MatMulInteger"): _dynamic,
    ("com.microsoft", "MatMulIntegerToFloat"): _integer,
    ("com.microsoft", "MatMulNBits"): _blocks,
}


def _with_tail(
    form: Form,
    node: ir.Node,
    weight: ir.Value,
    pieces: tuple[Array | None, ...],
    key: tuple[Hashable, ...],
    *,
    chain: tuple[ir.Node, ...] = (),
    also: tuple[ir.Node, ...] = (),
    columns: int = 0,
) -> Projection:
    """Return the projection with the Add of a constant bias that alone reads it, if there is one."""
    gone = chain or (node,)
    output = gone[0].outputs[0]
    count = columns or (weight.shape.numpy()[1] if weight.shape is not None else 0)
    add = _next(gone[0], "Add")
    bias = _bias(_other(add, output), count) if add is not None else None
    if add is not None and bias is not None:
        gone, output = (add, *gone), add.outputs[0]
    gone = (*gone, *also)
    return Projection(form, node, gone, output, count, weight, pieces, bias, (form, node.inputs[0], *key))


def _other(node: ir.Node, value: ir.Value) -> ir.Value:
    found = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    if found is None:
        raise ValueError(f"{node.name}: input missing")
    return found


def _matrix(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return a constant [K, N] that one operator alone reads, or None."""
    tensor = constant(value)
    alone = value is not None and len(value.uses()) == 1
    return tensor if tensor is not None and alone and len(tensor.shape) == 2 else None


def _array(tensor: ir.TensorProtocol | None) -> Array | None:
    return None if tensor is None else np.asarray(tensor.numpy())


def _constant_input(node: ir.Node, position: int) -> Array | None:
    return _array(constant(node.inputs[position])) if len(node.inputs) > position else None


def _spread(values: Array | None, columns: int) -> Array | None:
    """Return one of `values` for each column, or None where they do not fit."""
    if values is None or values.size not in (1, columns):
        return None
    return np.ascontiguousarray(np.broadcast_to(values.reshape(-1), (columns,)))


def _bias(value: ir.Value | None, columns: int) -> Array | None:
    tensor = constant(value)
    fits = tensor is not None and tuple(tensor.shape.numpy()) == (columns,)
    return _array(tensor) if fits and tensor is not None and tensor.dtype.is_floating_point() else None


def _content(value: ir.Value | None) -> Hashable:
    """Return what two inputs have in common that hold the same."""
    tensor = constant(value)
    return value if tensor is None else (tensor.dtype, tensor.numpy().tobytes())
