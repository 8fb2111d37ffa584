# SPDX-License-Identifier: Apache-2.0
"""The grids that a compiled layer's weights and activations are rounded to, read from its nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.affine import BlockQuantized, dequantize_blocks, unpack_codes
from splitfold.passes.values import constant, int_attribute
from splitfold.runtime.feeds import Array

__all__ = ["LARGEST", "ActivationGridFacts", "WeightGrid", "activation_grid_of", "weight_grid_of"]

LARGEST = 4_000_000
"""Elements of a weight beyond which a histogram is taken of evenly spaced rows."""


@dataclass(frozen=True)
class WeightGrid:
    """A weight as stored.

    Attributes:
        values: what the codes stand for (a part of the rows where the weight is very large).
        steps: distance of neighbouring values, one for each scale.
        low, high: smallest and largest value that each scale's grid can represent.
        zero: the code of zero, where it is one for all.
        words: form, such as "int8, one grid for each of 384 channels".
    """

    values: Array
    steps: Array
    low: Array
    high: Array
    zero: int | None
    words: str


@dataclass(frozen=True)
class ActivationGridFacts:
    """The grid of an activation.

    Attributes:
        value: name of the float value that is rounded.
        scale, zero_point, low, high: of the grid; None where the runtime chooses it in each run.
    """

    value: str
    scale: float | None = None
    zero_point: int | None = None
    low: float | None = None
    high: float | None = None


def activation_grid_of(value: ir.Value | None) -> ActivationGridFacts | None:
    """Return the grid that `value` (codes, or what was made from codes) was rounded to, or None."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "DynamicQuantizeLinear":
        return ActivationGridFacts(node.inputs[0].name or "")
    if node.op_type != "QuantizeLinear":
        return None
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or scale.size != 1:
        return None
    step = float(scale.numpy().reshape(-1)[0])
    at = int(zero.numpy().reshape(-1)[0]) if zero is not None else 0
    kind = np.iinfo(zero.numpy().dtype if zero is not None else np.uint8)
    return ActivationGridFacts(
        node.inputs[0].name or "", step, at, (int(kind.min) - at) * step, (int(kind.max) - at) * step
    )


def weight_grid_of(node: ir.Node) -> WeightGrid | None:
    """Return the grid of the weight that `node` computes with, or None where it is held in float, or in a
    form that is not known here."""
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return _blocks(node)
    if node.op_type == "MatMulIntegerToFloat":
        return _affine(constant(node.inputs[1]), constant(node.inputs[3]), 1)
    if node.op_type == "MatMulInteger":
        return _affine(constant(node.inputs[1]), _step_after(node), 1)
    if node.op_type == "Gather":
        return _affine(constant(node.inputs[0]), _rows_after(node), 0, unit="rows")
    for value in node.inputs:
        source = value.producer() if value is not None else None
        if source is not None and source.op_type == "DequantizeLinear":
            codes = constant(source.inputs[0])
            if codes is not None and len(codes.shape) > 1:
                zero = constant(source.inputs[2]) if len(source.inputs) > 2 else None
                return _affine(
                    codes,
                    constant(source.inputs[1]),
                    int_attribute(source, "axis", 1),
                    zero,
                    int_attribute(source, "block_size", 0),
                )
    return None


def _affine(
    codes: ir.TensorProtocol | None,
    scale: ir.TensorProtocol | None,
    axis: int,
    zero: ir.TensorProtocol | None = None,
    block: int = 0,
    unit: str = "channels",
) -> WeightGrid | None:
    if codes is None or scale is None or not codes.dtype.is_integer():
        return None
    kind = _limits(codes.dtype)
    shape = tuple(codes.shape.numpy())
    rows = _sampled_rows(codes.size, shape[0])
    held, steps = codes.numpy()[rows].astype(np.float32), scale.numpy().astype(np.float32)
    zeros = zero.numpy().astype(np.float32) if zero is not None else np.zeros_like(steps)
    spread = [_spread(part, shape, axis, block, rows) for part in (steps, zeros)]
    values = (held - spread[1]) * spread[0]
    flat = steps.reshape(-1)
    offsets = np.broadcast_to(zeros, steps.shape).reshape(-1)
    lowest = max(kind[0], -kind[1]) if zero is None or not offsets.any() else kind[0]
    one = f"one grid for each of {flat.size} {unit}" if not block else f"{flat.size} blocks of {block}"
    words = f"{codes.dtype.name.lower()}, {one if flat.size > 1 else 'one grid'}"
    return WeightGrid(
        values, np.abs(flat), (lowest - offsets) * flat, (kind[1] - offsets) * flat, _one(offsets), words
    )


def _spread(part: Array, shape: tuple[int, ...], axis: int, block: int, rows: slice) -> Array:
    """Return scales (or zero points) so that they broadcast against `rows` of a weight of `shape`."""
    at = axis % len(shape)
    if part.size == 1:
        return part
    if not block:
        part = part.reshape([-1 if i == at else 1 for i in range(len(shape))])
        return part[rows] if at == 0 else part
    blocks = np.arange(shape[at]) // block
    return np.take(part, blocks[rows], 0) if at == 0 else np.take(part[rows], blocks, at)


def _limits(dtype: ir.DataType) -> tuple[int, int]:
    bits = dtype.bitwidth
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.is_signed() else (0, 2**bits - 1)


def _one(offsets: Array) -> int | None:
    return int(offsets[0]) if offsets.size and (offsets == offsets[0]).all() else None


def _sampled_rows(size: int, rows: int) -> slice:
    """Return evenly spaced rows, all of them where the weight is not very large."""
    every = -(-size // LARGEST) if rows > 1 else 1
    return slice(None, None, max(every, 1))


def _blocks(node: ir.Node) -> WeightGrid | None:
    """Return the grid of a MatMulNBits or GatherBlockQuantized: codes packed along the last axis."""
    table = node.op_type == "GatherBlockQuantized"
    codes, scale = constant(node.inputs[0 if table else 1]), constant(node.inputs[2])
    zero = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 32)
    if codes is None or scale is None or codes.dtype is not ir.DataType.UINT8:
        return None
    scales = scale.numpy().astype(np.float32)
    rows = scales.shape[0] if scales.ndim > 1 else int_attribute(node, "N", 1)
    scales = scales.reshape(rows, -1)
    count = scales.shape[1]
    zeros = None if zero is None else unpack_codes(zero.numpy().reshape(rows, -1), bits, count)
    kept = _sampled_rows(rows * count * block, rows)
    unpacked = unpack_codes(codes.numpy().reshape(rows, -1)[kept], bits, count * block)
    part = BlockQuantized(
        unpacked.reshape(-1, count, block),
        scales[kept],
        None if zeros is None else zeros[kept],
        bits,
        int_attribute(node, "K", count * block),
    )
    values = dequantize_blocks(part)
    half = 2.0 ** (bits - 1)
    offsets = np.full(scales.shape, half, np.float32) if zeros is None else zeros.astype(np.float32)
    ends = np.stack([-offsets * scales, (2**bits - 1 - offsets) * scales])
    words = f"{bits} bits, {scales.size} blocks of {block}"
    return WeightGrid(
        values,
        np.abs(scales).reshape(-1),
        ends.min(0).reshape(-1),
        ends.max(0).reshape(-1),
        _one(offsets.reshape(-1)),
        words,
    )


def _step_after(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the weight's scales of a dynamic layer: Cast, then Mul by (activation's scale x weight's)."""
    for product in _products_after(node):
        for factor in product.inputs:
            source = factor.producer() if factor is not None else None
            if source is not None and source.op_type == "Mul":
                return next((held for part in source.inputs if (held := constant(part)) is not None), None)
    return None


def _rows_after(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the scales [rows, 1] of a table: Cast, then Mul by a Gather of them."""
    for product in _products_after(node):
        for factor in product.inputs:
            source = factor.producer() if factor is not None else None
            if source is not None and source.op_type == "Gather" and source is not node:
                return constant(source.inputs[0])
    return None


def _products_after(node: ir.Node) -> Iterator[ir.Node]:
    for cast in node.successors():
        if cast.op_type == "Cast":
            yield from (after for after in cast.successors() if after.op_type == "Mul")
