# SPDX-License-Identifier: Apache-2.0
"""Quantizers with straight-through gradients.

Quantized numbers are carried as floats between a quantizer and what reads them, so that autograd sees
y = clamp(x / s) + z with the derivative 1 for rounding and 0 where numbers saturate (Bengio et al.,
arXiv:1308.3432); an integer tensor would end the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from splitfold.runtime.lift.constants import constant_of
from splitfold.runtime.lift.dtypes import torch_dtype
from splitfold.runtime.lift.row import Extra, Row, Rows

__all__ = ["ROWS", "code_type", "quantized", "real", "rounded"]

Limits = tuple[int, int]


def rounded(x: Tensor) -> Tensor:
    """Return x rounded half to even, with the gradient of x."""
    return x + (x.round() - x).detach()


def quantized(x: Tensor, zero: Tensor | None, limits: Limits) -> Tensor:
    """Return x, in steps of a quantizer, rounded, with the zero point added, and kept within `limits`."""
    low, high = limits
    if zero is None:
        return rounded(x.clamp(low, high))
    shift = zero.to(x.dtype)
    return rounded(torch.minimum(torch.maximum(x, low - shift), high - shift)) + shift


def spread(values: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Return scales or zero points so that they broadcast with `x`: one, one an index of `axis`, or one a
    block along it."""
    if values.ndim == 0 or (values.numel() == 1 and not block):
        return values.reshape(())
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return values.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def real(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1, block: int = 0) -> Tensor:
    """Return (x - zero) * scale, of the scale's type."""
    wide = x.to(torch.float32 if scale.dtype.itemsize < 4 else scale.dtype)
    if zero is not None:
        wide = wide - spread(zero, x, axis, block).to(wide.dtype)
    return (wide * spread(scale, x, axis, block)).to(scale.dtype)


def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    limits: Limits,
) -> Tensor:
    """QuantizeLinear to integers: one scale, one an index of `axis`, or one a block along it."""
    wide = x.to(torch.float32) if x.dtype.itemsize < 4 or not x.dtype.is_floating_point else x
    steps = wide / spread(scale, x, axis, block_size).to(wide.dtype)
    zero = None if zero_point is None else spread(zero_point, x, axis, block_size)
    return quantized(steps, zero, limits)


def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """DequantizeLinear."""
    found = real(x, scale, zero_point, axis, block_size)
    return found.to(torch_dtype(output_dtype)) if output_dtype else found


def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DynamicQuantizeLinear to uint8: (numbers, scale, zero point); no gradient flows by way of the scale."""
    seen = x.detach()
    low, high = seen.amin().clamp(max=0), seen.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, 255)
    return quantized(x / scale, zero, (0, 255)), scale, zero.to(torch.uint8)


def code_type(position: int, default: ir.DataType = ir.DataType.UINT8) -> Callable[[ir.Node], ir.DataType]:
    """Return a function that finds the type of a node's quantized output: that of its zero point, which is
    the input at `position`."""

    def find(node: ir.Node) -> ir.DataType:
        zero = node.inputs[position] if position < len(node.inputs) else None
        tensor = None if zero is None else constant_of(zero)
        named = node.attributes.get("output_dtype")
        if tensor is not None:
            return tensor.dtype
        if zero is not None and zero.dtype is not None:
            return zero.dtype
        if named is not None and named.as_int():
            return ir.DataType(named.as_int())
        return node.outputs[0].dtype or default

    return find


def _uint8(_: ir.Node) -> ir.DataType:
    return ir.DataType.UINT8


ROWS: Rows = {
    "DequantizeLinear": Row(dequantize_linear, codes=(0,), fixed=(1, 2)),
    "DynamicQuantizeLinear": Row(dynamic_quantize_linear, many=True, gives_codes=_uint8),
    "QuantizeLinear": Row(quantize_linear, gives_codes=code_type(2), fixed=(1, 2), extras=(Extra.RANGE,)),
}
