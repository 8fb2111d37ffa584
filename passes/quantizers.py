# SPDX-License-Identifier: Apache-2.0
"""QuantizeLinear and DequantizeLinear nodes as they stand in a graph, ours or another tool's, and their
grids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.values import constant, int_attribute

__all__ = ["DEQUANTIZE", "QUANTIZE", "Grid", "dequantized_by", "grid_of"]

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_DOMAINS = ("", "com.microsoft")
_WHOLE = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16}
_SMALLEST, _LARGEST = 1e-30, 1e30
"""Scales between which (q - z) * s neither vanishes nor overflows in float32."""


@dataclass(frozen=True)
class Grid:
    """The constant parameters of a Q or DQ node; equal grids are equal in bits.

    Attributes:
        domain: of the operator.
        kind: type of the codes.
        scale_kind: type of the scale, and of the float side.
        scales, zero_points: bytes in C order; a missing zero point is zeros.
        shape: of the scales, () where there is one.
        axis: axis that they go along, from 0; None where there is one scale.
        block: elements along `axis` that share a scale, 0 where it is one index.
        smallest, largest: magnitude of the scales.
    """

    domain: str
    kind: ir.DataType
    scale_kind: ir.DataType
    scales: bytes
    zero_points: bytes
    shape: tuple[int, ...]
    axis: int | None
    block: int
    smallest: float
    largest: float

    @property
    def is_whole(self) -> bool:
        """Whether the codes are whole numbers of 8 bits, which every operator that moves elements takes."""
        return self.kind in (ir.DataType.INT8, ir.DataType.UINT8)

    @property
    def returns_codes(self) -> bool:
        """Whether Q(DQ(q)) is q for all codes q.

        With n = q - z of at most 16 bits, fl(fl(n s) / s) is off n by at most n 2^-23 < 1/2, so that it
        rounds to n; only where n s stays a normal number.
        """
        fits = self.smallest >= _SMALLEST and self.largest <= _LARGEST
        return self.kind in _WHOLE and self.scale_kind is ir.DataType.FLOAT and fits


def grid_of(node: ir.Node | None, op_type: str) -> Grid | None:
    """Return the grid of `node` where it is a Q (or DQ, as `op_type` says) with constant parameters, else
    None."""
    if node is None or node.op_type != op_type or node.domain not in _DOMAINS:
        return None
    scale = constant(node.inputs[1])
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    zero = constant(zero_value)
    if scale is None or (zero is None and zero_value is not None):
        return None
    kind = _kind(node, zero)
    if kind is None or (zero is not None and kind is not zero.dtype):
        return None
    axis = _axis(node, scale)
    if axis == -1:
        return None
    size = np.abs(scale.numpy().astype(np.float64))
    zeros = zero.numpy() if zero is not None else np.zeros(scale.shape.numpy(), kind.numpy())
    return Grid(
        node.domain,
        kind,
        scale.dtype,
        scale.numpy().tobytes(),
        zeros.tobytes(),
        tuple(scale.shape.numpy()) if axis is not None else (),
        axis,
        int_attribute(node, "block_size", 0),
        float(size.min(initial=np.inf)),
        float(size.max(initial=0)),
    )


def _kind(node: ir.Node, zero: ir.TensorProtocol | None) -> ir.DataType | None:
    """Return the type of the codes; None where it is unknown, or the node says more than a grid does."""
    declared = node.inputs[0] if node.op_type == DEQUANTIZE else node.outputs[0]
    known = declared.dtype if declared is not None else None
    asked = int_attribute(node, "output_dtype", 0)
    if node.op_type == QUANTIZE and asked:
        known = ir.DataType(asked)
    elif asked or int_attribute(node, "precision", 0):
        return None
    if zero is not None:
        return zero.dtype if known in (None, zero.dtype) else None
    return known if known is not None or node.op_type == DEQUANTIZE else ir.DataType.UINT8


def _axis(node: ir.Node, scale: ir.TensorProtocol) -> int | None:
    """Return the axis of the scales, None where there is one scale, -1 where it cannot be told."""
    if scale.size == 1 and not int_attribute(node, "block_size", 0):
        return None
    axis = int_attribute(node, "axis", 1)
    data = node.inputs[0]
    rank = len(data.shape) if data is not None and data.shape is not None else None
    if axis >= 0:
        return axis
    return -1 if rank is None else axis + rank


def dequantized_by(value: ir.Value | None) -> tuple[ir.Node, Grid] | None:
    """Return the DQ that makes `value`, and its grid, or None."""
    node = value.producer() if value is not None else None
    grid = grid_of(node, DEQUANTIZE)
    return None if node is None or grid is None else (node, grid)
