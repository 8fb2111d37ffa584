# SPDX-License-Identifier: Apache-2.0
"""com.microsoft operators from quantized numbers to quantized numbers, as the runtime's own tools write them:
dequantize, compute, quantize."""

from __future__ import annotations

import functools

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.lift.row import Extra, Row, Rows
from splitfold.runtime.lift.rows.conv import Ints
from splitfold.runtime.lift.rows.integer import integer_product
from splitfold.runtime.lift.rows.pool import average_pool
from splitfold.runtime.lift.rows.quantize import (
    Limits,
    code_type,
    dequantize_linear,
    quantize_linear,
    quantized,
    real,
)

__all__ = ["ROWS"]


def _again(x: Tensor, scale: Tensor, zero: Tensor | None, limits: Limits) -> Tensor:
    return quantized(x / scale, zero, limits)


def qlinear_add(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    limits: Limits,
) -> Tensor:
    """QLinearAdd."""
    return _again(real(a, a_scale, a_zero) + real(b, b_scale, b_zero), scale, zero, limits)


def qlinear_mul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    limits: Limits,
) -> Tensor:
    """QLinearMul."""
    return _again(real(a, a_scale, a_zero) * real(b, b_scale, b_zero), scale, zero, limits)


def qlinear_sigmoid(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    limits: Limits,
) -> Tensor:
    """QLinearSigmoid."""
    return _again(torch.sigmoid(real(x, x_scale, x_zero)), scale, zero, limits)


def qlinear_leaky_relu(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    alpha: float = 0.01,
    limits: Limits,
) -> Tensor:
    """QLinearLeakyRelu."""
    return _again(F.leaky_relu(real(x, x_scale, x_zero), alpha), scale, zero, limits)


def qlinear_softmax(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = -1,
    opset: int,
    limits: Limits,
) -> Tensor:
    """QLinearSoftmax along one axis."""
    if opset < 13 and axis % x.ndim != x.ndim - 1:
        raise UnsupportedError("QLinearSoftmax before opset 13 is handled only along the last axis.")
    return _again(torch.softmax(real(x, x_scale, x_zero), axis), scale, zero, limits)


def qlinear_global_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    channels_last: int = 0,
    limits: Limits,
) -> Tensor:
    """QLinearGlobalAveragePool."""
    axes = tuple(range(1, x.ndim - 1)) if channels_last else tuple(range(2, x.ndim))
    return _again(real(x, x_scale, x_zero).mean(axes, True), scale, zero, limits)


def qlinear_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    channels_last: int = 0,
    count_include_pad: int = 0,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
    limits: Limits,
) -> Tensor:
    """QLinearAveragePool."""
    values = real(x, x_scale, x_zero)
    found = average_pool(
        values.movedim(-1, 1) if channels_last else values,
        kernel_shape=kernel_shape,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        pads=pads,
        strides=strides,
    )
    return _again(found.movedim(1, -1) if channels_last else found, scale, zero, limits)


def qlinear_concat(scale: Tensor, zero: Tensor, *parts: Tensor, axis: int, limits: Limits) -> Tensor:
    """QLinearConcat of (numbers, scale, zero point) each."""
    triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    values = [real(numbers, step, middle) for numbers, step, middle in triples]
    return _again(torch.cat(values, axis), scale, zero, limits)


def qgemm(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    c: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
    limits: Limits | None,
) -> Tensor:
    """QGemm: C is of int32, in steps of alpha times the product of both scales; a float without an output
    scale."""
    product = integer_product(a.T if transA else a, b.T if transB else b, a_zero, b_zero)
    whole = product if c is None else product.double() + c.double()
    factor = alpha * a_scale * b_scale
    if scale is None or limits is None:
        return whole.to(a_scale.dtype) * factor
    return quantized(whole.float() * (factor / scale), zero, limits)


def _gemm_type(node: ir.Node) -> ir.DataType:
    """Return the type of a QGemm's quantized output, UNDEFINED where it is a float."""
    stated = len(node.inputs) > 8 and node.inputs[8] is not None
    return code_type(8)(node) if stated else ir.DataType.UNDEFINED


_RANGE = (Extra.RANGE,)
_pair = functools.partial(Row, codes=(0, 3), fixed=(1, 4, 6), gives_codes=code_type(7), extras=_RANGE)
_single = functools.partial(Row, codes=(0,), fixed=(1, 3), gives_codes=code_type(4), extras=_RANGE)

ROWS: Rows = {
    "DequantizeLinear": Row(dequantize_linear, codes=(0,), fixed=(1, 2)),
    "QGemm": Row(qgemm, codes=(0, 3), fixed=(1, 4, 7), gives_codes=_gemm_type, extras=_RANGE),
    "QLinearAdd": _pair(qlinear_add),
    "QLinearAveragePool": _single(qlinear_average_pool),
    "QLinearConcat": Row(
        qlinear_concat, codes=tuple(range(2, 300, 3)), fixed=(0,), gives_codes=code_type(1), extras=_RANGE
    ),
    "QLinearGlobalAveragePool": _single(qlinear_global_average_pool),
    "QLinearLeakyRelu": _single(qlinear_leaky_relu),
    "QLinearMul": _pair(qlinear_mul),
    "QLinearSigmoid": _single(qlinear_sigmoid),
    "QLinearSoftmax": _single(qlinear_softmax),
    "QuantizeLinear": Row(quantize_linear, gives_codes=code_type(2), fixed=(1, 2), extras=_RANGE),
}
