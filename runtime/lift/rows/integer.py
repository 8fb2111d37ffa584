# SPDX-License-Identifier: Apache-2.0
"""Products of integers: exact, as floats that are wide enough, so that gradients pass."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from splitfold.runtime.lift.row import Extra, Row, Rows
from splitfold.runtime.lift.rows.conv import Ints, conv
from splitfold.runtime.lift.rows.quantize import Limits, code_type, quantized

__all__ = ["ROWS", "integer_product"]

_EXACT = 2**24 // 255**2
"""Products of two 8-bit numbers less their zero points whose sum float32 holds exactly."""


def _wide(terms: int) -> torch.dtype:
    return torch.float32 if terms <= _EXACT else torch.float64


def integer_product(a: Tensor, b: Tensor, a_zero: Tensor | None, b_zero: Tensor | None) -> Tensor:
    """Return (A - a_zero) (B - b_zero) for 8-bit integers, exactly, as a float32 or float64."""
    wide = _wide(a.shape[-1])
    left, right = a.to(wide), b.to(wide)
    if a_zero is not None:
        left = left - (a_zero.unsqueeze(-1) if a_zero.ndim == 1 and len(a_zero) > 1 else a_zero).to(wide)
    return left @ (right if b_zero is None else right - b_zero.to(wide))


def matmul_integer(
    a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """MatMulInteger: zero points are one, or one a row of A and one a column of B."""
    return integer_product(a, b, a_zero, b_zero)


def _integer_conv(
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None,
    w_zero: Tensor | None,
    bias: Tensor | None,
    **options: object,
) -> Tensor:
    wide = _wide(w[0].numel())
    left, right = x.to(wide), w.to(wide)
    if x_zero is not None:
        left = left - x_zero.to(wide)
    if w_zero is not None:
        right = right - w_zero.to(wide).reshape(-1, *[1] * (w.ndim - 1))
    product = conv(left, right, **options)  # type: ignore[arg-type]
    if bias is None:
        return product
    return product.double() + bias.double().reshape(-1, *[1] * (w.ndim - 2))


def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """ConvInteger; padding is of the zero point."""
    options = {
        "auto_pad": auto_pad, "dilations": dilations, "group": group, "pads": pads, "strides": strides
    }  # fmt: skip
    return _integer_conv(x, w, x_zero, w_zero, None, **options)


def _requantized(product: Tensor, factor: Tensor, zero: Tensor | None, limits: Limits) -> Tensor:
    return quantized(product.to(torch.float32) * factor, zero, limits)


def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    *,
    limits: Limits,
) -> Tensor:
    """QLinearMatMul."""
    rows = a_scale.unsqueeze(-1) if a_scale.ndim == 1 and len(a_scale) > 1 else a_scale
    factor = (rows.float() * b_scale.float()) / y_scale.float()
    return _requantized(integer_product(a, b, a_zero, b_zero), factor, y_zero, limits)


def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
    limits: Limits,
) -> Tensor:
    """QLinearConv; the bias is of int32, in steps of the product of both scales."""
    options = {
        "auto_pad": auto_pad, "dilations": dilations, "group": group, "pads": pads, "strides": strides
    }  # fmt: skip
    product = _integer_conv(x, w, x_zero, w_zero, bias, **options)
    factor = (x_scale * w_scale / y_scale).reshape(-1, *[1] * (w.ndim - 2))
    return _requantized(product, factor, y_zero, limits)


def _int32(_: ir.Node) -> ir.DataType:
    return ir.DataType.INT32


_SCALES = (1, 2, 4, 5, 6, 7)

ROWS: Rows = {
    "ConvInteger": Row(conv_integer, codes=(0, 1), gives_codes=_int32),
    "MatMulInteger": Row(matmul_integer, codes=(0, 1), gives_codes=_int32),
    "QLinearConv": Row(
        qlinear_conv, codes=(0, 3), gives_codes=code_type(7), fixed=_SCALES, extras=(Extra.RANGE,)
    ),
    "QLinearMatMul": Row(
        qlinear_matmul, codes=(0, 3), gives_codes=code_type(7), fixed=_SCALES, extras=(Extra.RANGE,)
    ),
}
