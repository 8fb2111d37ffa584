# SPDX-License-Identifier: Apache-2.0
"""The model that measures a case, and the forms that each operation has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitfold.runtime.costs.builder import Built
from splitfold.runtime.costs.convolution import conv_model
from splitfold.runtime.costs.kernel import Case, Form, Kernel, Operation, Shape
from splitfold.runtime.costs.linear import linear_model
from splitfold.runtime.costs.others import (
    attention_model,
    conversion_model,
    gelu_model,
    norm_model,
    softmax_model,
)

__all__ = ["FORMS", "case_model"]

_MODELS: Mapping[Operation, Callable[[Kernel, Shape], Built]] = {
    Operation.MATMUL: linear_model,
    Operation.CONV: conv_model,
    Operation.SOFTMAX: softmax_model,
    Operation.NORM: norm_model,
    Operation.GELU: gelu_model,
    Operation.ATTENTION: attention_model,
    Operation.QUANTIZE: conversion_model,
    Operation.DEQUANTIZE: conversion_model,
    Operation.CAST: conversion_model,
}

FORMS: Mapping[Operation, tuple[Kernel, ...]] = {
    Operation.MATMUL: (
        Kernel(Operation.MATMUL),
        Kernel(Operation.MATMUL, Form.DYNAMIC_INT8),
        Kernel(Operation.MATMUL, Form.STATIC_INT8),
        Kernel(Operation.MATMUL, Form.STATIC_QDQ),
        *(Kernel.blocks(bits, 32) for bits in (2, 4, 8)),
        *(Kernel.blocks(bits, 128, zero_points=False) for bits in (2, 4, 8)),
        Kernel.blocks(4, 32, level=0),
        Kernel.blocks(8, 32, level=0),
    ),
    Operation.CONV: tuple(
        Kernel(Operation.CONV, form) for form in (Form.FLOAT, Form.STATIC_INT8, Form.DYNAMIC_INT8)
    ),
    Operation.SOFTMAX: tuple(Kernel(Operation.SOFTMAX, form) for form in (Form.FLOAT, Form.INT8)),
    Operation.NORM: tuple(Kernel(Operation.NORM, form) for form in (Form.FLOAT, Form.FUSED)),
    Operation.GELU: tuple(Kernel(Operation.GELU, form) for form in (Form.FLOAT, Form.FUSED)),
    Operation.ATTENTION: tuple(
        Kernel(Operation.ATTENTION, form) for form in (Form.FLOAT, Form.FUSED, Form.MASKED, Form.STANDARD)
    ),
    Operation.QUANTIZE: tuple(Kernel(Operation.QUANTIZE, form) for form in (Form.FLOAT, Form.DYNAMIC)),
    Operation.DEQUANTIZE: (Kernel(Operation.DEQUANTIZE),),
    Operation.CAST: (Kernel(Operation.CAST),),
}
"""The kernels that are measured of each operation, the float one first."""


def case_model(case: Case) -> Built:
    """Return the model of a case, with random weights, and its feeds."""
    return _MODELS[case.kernel.operation](case.kernel, case.shape)
