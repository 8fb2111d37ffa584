# SPDX-License-Identifier: Apache-2.0
"""Bytes of a layer in a precision, as they are written: codes with their padding, scales, zero points, and
what stays in float."""

from __future__ import annotations

import math

import onnx_ir as ir

from splitfold.passes.fake_bits import weight_bits_stored
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.precision import ActivationRange, Precision, WeightPrecision
from splitfold.passes.values import constant

__all__ = ["beside_bytes", "weight_bytes_in", "weight_count"]

_FLOAT = 4
_INPUT_GRID = _FLOAT + 1
"""Scale and zero point of a static grid: one a quantized tensor."""
_INT32_BIAS = 4 + _FLOAT + 4
"""Code, scale and zero point of one bias of a convolution behind DequantizeLinear."""


def weight_count(layer: Layer) -> int:
    """Return how many weights the layer has, the bias left out."""
    return math.prod(layer.weight_array().shape)


def weight_bytes_in(layer: Layer, precision: Precision) -> int:
    """Return the bytes of the layer's weight in `precision`: codes with padding, scales, zero points.

    3-bit codes of blocks are stored in 4 bits. A simulated precision is counted as what its codes would take.
    """
    weight = precision.weight
    if weight is None:
        return _held(layer.weight)
    if precision.simulated:
        return -(-weight_bits_stored(layer, weight.bits) // 8)
    if weight.block is not None:
        return _block_bytes(layer, weight, weight.block)
    return weight_count(layer) + _channels(layer) * (_FLOAT + 1)


def beside_bytes(layer: Layer, precision: Precision) -> int:
    """Return the bytes that the layer stores beside its weight in `precision`: its bias, and static grids.

    A static grid's scale and zero point are counted for each layer, and twice for a convolution, whose output
    has one too; layers that read one value share them, so that what is really stored may be a few bytes less.
    """
    activation = precision.activation
    if precision.simulated or activation is None or activation.range is ActivationRange.DYNAMIC:
        return _held(layer.bias)
    if layer.kind is not LayerKind.CONV:
        return _held(layer.bias) + _INPUT_GRID
    return (_channels(layer) * _INT32_BIAS if layer.bias is not None else 0) + 2 * _INPUT_GRID


def _held(value: ir.Value | None) -> int:
    tensor = constant(value)
    return 0 if tensor is None else int(tensor.nbytes)


def _channels(layer: Layer) -> int:
    return int(layer.weight_array().shape[layer.channel_axis])


def _block_bytes(layer: Layer, weight: WeightPrecision, block: int) -> int:
    """Return the bytes of MatMulNBits; the zero points of each column are padded to whole bytes."""
    rows, columns = layer.weight_array().shape
    bits = 4 if weight.bits == 3 else weight.bits
    blocks = -(-rows // block)
    zeros = 0 if weight.symmetric else _bytes(blocks * bits)
    return int(columns * (_bytes(blocks * block * bits) + blocks * _FLOAT + zeros))


def _bytes(bits: int) -> int:
    return -(-bits // 8)
