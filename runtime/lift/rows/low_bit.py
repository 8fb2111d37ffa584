# SPDX-License-Identifier: Apache-2.0
"""com.microsoft operators on low-bit weights that the passes emit: MatMulNBits, GatherBlockQuantized,
MatMulIntegerToFloat, DynamicQuantizeMatMul. Gradients flow to the other input, and to the scales."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.lift.row import Attributes, Row, Rows
from splitfold.runtime.lift.rows.indexing import gather
from splitfold.runtime.lift.rows.integer import integer_product
from splitfold.runtime.lift.rows.quantize import dynamic_quantize_linear

__all__ = ["ROWS", "block_weight", "unpacked"]


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return the numbers of `bits` bits that the bytes along the last axis hold, the lowest bits first."""
    if bits == 8:
        return packed
    parts: list[Tensor] = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)


def block_weight(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    groups: Tensor | None,
    *,
    rows: int,
    columns: int,
    bits: int,
    block_size: int,
) -> Tensor:
    """Return the weight [rows, columns] of a MatMulNBits, of the scales' type."""
    codes = unpacked(packed, bits).reshape(rows, -1)[:, :columns]
    steps = scales.reshape(rows, -1)
    blocks = steps.shape[1]
    if zero_points is None:
        zeros = torch.full_like(steps, 2 ** (bits - 1))
    elif zero_points.dtype.is_floating_point:
        zeros = zero_points.reshape(rows, blocks)
    else:
        zeros = unpacked(zero_points.reshape(rows, -1), bits)[:, :blocks].to(steps.dtype)
    if groups is not None:
        return (codes.to(steps.dtype) - zeros[:, groups.long()]) * steps[:, groups.long()]
    wide_zeros, wide_steps = (item.repeat_interleave(block_size, 1)[:, :columns] for item in (zeros, steps))
    return (codes.to(steps.dtype) - wide_zeros) * wide_steps


def matmul_nbits(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,  # noqa: N803
    N: int,  # noqa: N803
    accuracy_level: int = 0,
    bits: int = 4,
    block_size: int,
    weight_prepacked: int = 0,
) -> Tensor:
    """MatMulNBits: x times the transpose of the dequantized weight [N, K].

    The runtime's accuracy level 4 also rounds x to 8 bits, which is left out here.
    """
    weight = block_weight(
        packed, scales, zero_points, groups, rows=N, columns=K, bits=bits, block_size=block_size
    )
    return F.linear(x, weight.to(x.dtype), bias)


def gather_block_quantized(
    packed: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Tensor:
    """GatherBlockQuantized of unsigned numbers in bytes, blocks along the last axis."""
    if quantize_axis % packed.ndim != packed.ndim - 1 or gather_axis % packed.ndim == packed.ndim - 1:
        raise UnsupportedError("GatherBlockQuantized is handled only with blocks along the last axis.")
    codes = unpacked(gather(packed, indices, axis=gather_axis), bits)
    steps = gather(scales, indices, axis=gather_axis)
    real = codes.to(steps.dtype)
    if zero_points is None:
        centred = real - 2 ** (bits - 1)
    else:
        zeros = unpacked(gather(zero_points, indices, axis=gather_axis), bits)[..., : steps.shape[-1]]
        centred = real - zeros.to(steps.dtype).repeat_interleave(block_size, -1)[..., : codes.shape[-1]]
    spread: Tensor = steps.repeat_interleave(block_size, -1)[..., : codes.shape[-1]]
    found: Tensor = centred * spread
    return found


def refuse_typed(node: ir.Node, _: Attributes) -> str | None:
    """Return why a GatherBlockQuantized is not handled, or None."""
    table = node.inputs[0]
    kind = None if table is None else table.dtype
    return None if kind in (None, ir.DataType.UINT8) else "only a table of bytes (uint8) is handled"


def matmul_integer_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """MatMulIntegerToFloat: the integer product times both scales, plus the bias."""
    product = integer_product(a, b, a_zero, b_zero).to(a_scale.dtype) * (a_scale * b_scale)
    return product if bias is None else product + bias


def dynamic_quantize_matmul(
    x: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """DynamicQuantizeMatMul."""
    codes, scale, zero = dynamic_quantize_linear(x)
    return matmul_integer_to_float(codes, b, scale, b_scale, zero, b_zero, bias)


ROWS: Rows = {
    "DynamicQuantizeMatMul": Row(dynamic_quantize_matmul, fixed=(2, 3)),
    "GatherBlockQuantized": Row(gather_block_quantized, fixed=(2, 3), refuses=refuse_typed),
    "MatMulIntegerToFloat": Row(matmul_integer_to_float, codes=(0, 1), fixed=(2, 3, 4, 5)),
    "MatMulNBits": Row(matmul_nbits, fixed=(2, 3)),
}
