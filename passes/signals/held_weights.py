# SPDX-License-Identifier: Apache-2.0
"""What the weights of a layer are in each of its choices, read back from the low-bit form that was made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import BlockQuantized, dequantize_blocks, unpack_codes
from splitfold.passes.layers import Layer
from splitfold.passes.precision import Precision
from splitfold.passes.signals.subject import Subject
from splitfold.passes.values import constant, int_attribute
from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.feeds import Array

__all__ = ["held_weight", "weight_errors"]

_SCALED = {"MatMulIntegerToFloat": (1, 3, 5), "DynamicQuantizeMatMul": (1, 2, 3), "QLinearMatMul": (3, 4, 5),
           "QLinearConv": (3, 4, 5)}  # fmt: skip
"""Positions of codes, scales and zero points of a weight."""
_SCALED_LATER = ("MatMulInteger", "ConvInteger")
_PLAIN = ("MatMul", "Gemm", "Conv")


def weight_errors(subject: Subject, layer: Layer, signal: str) -> dict[Precision, Array]:
    """Return by choice what it does to the weights of `layer`, float32 in their shape; 0 in float.

    Raises:
        UnsupportedError: a form holds its weight in a way that is not known.
    """
    weight = layer.weight_array().astype(np.float32)
    forms = next(piece.forms for piece in subject.pieces if piece.layer is layer)
    found = {}
    for item in subject.choices[layer.name]:
        held = weight if item.weight is None else held_weight(forms[item], layer)
        if held is None:
            raise UnsupportedError(
                f"the signal {signal} cannot read back the weights of layer '{layer.name}' as {item}: take "
                "taylor, which looks at what a layer computes."
            )
        found[item] = held - weight
    return found


def held_weight(form: ir.Model, layer: Layer) -> Array | None:
    """Return the weight that a low-bit form of `layer` computes with, float32 in the shape of its float
    weight; None where it is held in a way that is not known."""
    shape = layer.weight_array().shape
    for node in form.graph:
        found = _held(node)
        if found is not None and found.shape == shape:
            return found.astype(np.float32)
    return None


def _held(node: ir.Node) -> Array | None:
    if node.op_type == "MatMulNBits":
        return _blocks(node)
    if node.op_type in _SCALED:
        codes, scales, zeros = (_array(node, at) for at in _SCALED[node.op_type])
        return None if codes is None or scales is None else _real(codes, scales, zeros, node.op_type)
    if node.op_type in _SCALED_LATER:
        codes, zeros = _array(node, 1), _array(node, 3)
        scales = next(
            (found for found in _late_scales(node) if found.size in (1, _channels(node, codes))), None
        )
        return None if codes is None or scales is None else _real(codes, scales, zeros, node.op_type)
    if node.op_type in _PLAIN:
        weight = node.inputs[1]
        maker = weight.producer() if weight is not None else None
        return _dequantized(maker) if maker is not None else _array(node, 1)
    return None


def _array(node: ir.Node, at: int) -> Array | None:
    value = node.inputs[at] if at < len(node.inputs) else None
    tensor = constant(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def _channels(node: ir.Node, codes: Array | None) -> int:
    if codes is None:
        return 0
    return int(codes.shape[0 if node.op_type == "ConvInteger" else -1])


def _blocks(node: ir.Node) -> Array | None:
    packed, scales, zeros = (_array(node, at) for at in (1, 2, 3))
    if packed is None or scales is None or len([value for value in node.inputs if value is not None]) > 4:
        return None
    bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 32)
    rows, columns = int_attribute(node, "N", 0), int_attribute(node, "K", 0)
    count = scales.size // rows
    codes = unpack_codes(packed.reshape(rows, count, -1), bits, block)
    if zeros is not None and zeros.dtype == np.uint8:
        zeros = unpack_codes(zeros.reshape(rows, -1), bits, count)
    held = BlockQuantized(codes, scales.reshape(rows, count), zeros, bits, columns)
    return dequantize_blocks(held).T


def _real(codes: Array, scales: Array, zeros: Array | None, operator: str) -> Array:
    axis = 0 if "Conv" in operator else codes.ndim - 1
    shape = [-1 if at == axis else 1 for at in range(codes.ndim)]
    centred = codes.astype(np.float32) - (0 if zeros is None else zeros.astype(np.float32).reshape(shape))
    return np.asarray(centred * scales.reshape(shape))


def _late_scales(node: ir.Node) -> Iterator[Array]:
    """Yield the constants that an integer result, after a Cast, is multiplied with."""
    for cast in node.outputs[0].consumers():
        for product in cast.outputs[0].consumers():
            for value in product.inputs if product.op_type == "Mul" else ():
                maker = value.producer() if value is not None else None
                operands = list(maker.inputs) if maker is not None and maker.op_type == "Mul" else [value]
                for operand in operands:
                    tensor = constant(operand)
                    if tensor is not None:
                        yield np.asarray(tensor.numpy())


def _dequantized(maker: ir.Node) -> Array | None:
    if maker.op_type != "DequantizeLinear" or int_attribute(maker, "block_size", 0):
        return None
    codes, scales, zeros = (_array(maker, at) for at in range(3))
    if codes is None or scales is None:
        return None
    axis = int_attribute(maker, "axis", 1) % codes.ndim
    shape = [-1 if at == axis else 1 for at in range(codes.ndim)] if scales.size > 1 else [1] * codes.ndim
    centred = codes.astype(np.float32) - (0 if zeros is None else zeros.astype(np.float32).reshape(shape))
    return np.asarray(centred * scales.reshape(shape))
