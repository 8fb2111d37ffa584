# SPDX-License-Identifier: Apache-2.0
"""Models of one convolution in each of its forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from splitfold.runtime.costs.builder import Builder, Built
from splitfold.runtime.costs.kernel import Form, Kernel, Shape

__all__ = ["conv_model"]

_SCALE = np.float32(0.05)
_ZERO = np.uint8(128)


def conv_model(kernel: Kernel, shape: Shape) -> Built:
    """Return the model of a form of a two-dimensional Conv with a bias.

    QLinearConv goes from codes to codes, as between two others; the runtime's own change of layout around it
    is in its time, which neighbours share.

    Args:
        shape: images, channels, outputs, height, width, kernel, stride, groups.
    """
    images, channels, outputs, height, width, size, stride, groups = shape
    graph = Builder()
    before, after = (size - 1) // 2, size // 2
    attributes: dict[str, Any] = {
        "kernel_shape": [size, size],
        "strides": [stride, stride],
        "pads": [before, before, after, after],
        "group": groups,
    }
    own = (outputs, channels // groups, size, size)
    if kernel.form is Form.STATIC_INT8:
        return _static(graph, (images, channels, height, width), own, attributes)
    x = graph.input(graph.normal(images, channels, height, width))
    if kernel.form is Form.FLOAT:
        weight, bias = graph.constant(graph.normal(*own)), graph.constant(graph.normal(outputs))
        return graph.built(graph.one("Conv", x, weight, bias, **attributes))
    codes, scale, zero = graph.add("DynamicQuantizeLinear", x, outputs=3)
    weight = graph.constant(graph.rng.integers(-127, 128, own, np.int8))
    product = graph.one("ConvInteger", codes, weight, zero, **attributes)
    scales = graph.constant(np.full((outputs, 1, 1), _SCALE))
    wide = graph.one("Cast", product, to=int(ir.DataType.FLOAT))
    return graph.built(graph.one("Mul", wide, graph.one("Mul", scale, scales)))


def _static(
    graph: Builder, given: tuple[int, ...], own: tuple[int, ...], attributes: dict[str, Any]
) -> Built:
    x = graph.input(graph.rng.integers(0, 256, given, np.uint8))
    weight = graph.constant(graph.rng.integers(-127, 128, own, np.int8))
    scale, zero = graph.constant(np.array(_SCALE)), graph.constant(np.array(_ZERO))
    scales, zeros = graph.constant(np.full(own[0], _SCALE)), graph.constant(np.zeros(own[0], np.int8))
    bias = graph.constant(graph.rng.integers(-1000, 1000, own[0], np.int32))
    inputs = (x, scale, zero, weight, scales, zeros, scale, zero, bias)
    return graph.built(graph.one("QLinearConv", *inputs, **attributes), ir.DataType.UINT8)
